"""The facts that decisions need: what they ask for, and what they are told. No I/O; `fetching` finds them out."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from tidewire.model.records import FirstReply, ItemRecord
from tidewire.model.values import ItemKey, Scalar

PAGE_BYTES = 1 << 20
"""Size at which a page of a query ends, with a `next`."""
CHORE_BATCH = 500
"""Maximum expired items, or forgotten versions, of one commit."""


# Structs, because named tuples of two classes are equal if their values are.


class ItemFact(Struct, frozen=True):
    key: ItemKey


class CountFact(Struct, frozen=True):
    """The number of items with a partition-key value."""

    table: str
    partition: Scalar


class PageFact(Struct, frozen=True):
    """Records between two bounds of ZRANGEBYLEX, at most `limit` of about `size_bytes`, and whether there are more."""

    order: bytes
    items: bytes
    low: bytes
    high: bytes
    limit: int
    reverse: bool
    size_bytes: int = PAGE_BYTES


class Page(NamedTuple):
    records: list[ItemRecord]
    more: bool


class RequestFact(Struct, frozen=True):
    """The first reply to a request id."""

    user: str
    request: str


class LastNumberFact(Struct, frozen=True):
    """The number of the last command that was done for a gateway; 0 if none is known."""

    gateway: str


class ConnectedFact(Struct, frozen=True):
    """Up to 200 connections of a gateway in this partition: (user, connection)."""

    gateway: str


class KindFact(Struct, frozen=True):
    """The kind of a table's sort keys in all partitions: "s" or "n"; None before the first item."""

    table: str


class DueFact(Struct, frozen=True):
    """Keys of items that expired before a time (ms), at most CHORE_BATCH."""

    now: int


class ChangesFact(Struct, frozen=True):
    """The state of the partition's change stream."""


NEVER = (2**63, 0)
"""An id later than any other."""


class Stream(NamedTuple):
    length: int
    first: tuple[int, int]  # id of its first entry
    read_by_all: tuple[int, int]  # all groups have acknowledged everything before it; NEVER for all
    unread: dict[str, int]  # by group: number of unacknowledged entries
    size_bytes: int = 0  # its memory; 0 if the server does not say
    counted: bool = True  # whether the server knows for each group how many entries it has not read


class TombstonesFact(Struct, frozen=True):
    """Keys of items deleted before a time (ms), at most CHORE_BATCH."""

    before: int


class FieldsFact(Struct, frozen=True):
    """The number of items and tombstones with a partition-key value."""

    table: str
    partition: Scalar


Fact = (
    ItemFact
    | CountFact
    | PageFact
    | RequestFact
    | LastNumberFact
    | ConnectedFact
    | KindFact
    | DueFact
    | ChangesFact
    | TombstonesFact
    | FieldsFact
)
Value = ItemRecord | int | str | Page | FirstReply | Stream | list[tuple[str, str]] | list[ItemKey] | None
Sizes = dict[Fact, int]
"""Sizes of facts in Redis, in bytes."""
