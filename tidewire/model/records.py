"""What lies in Redis, as MessagePack arrays of the tuples below.

A field that is added later goes to the end, and has a default.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

JSON = Any
Item = dict[str, Any]
Id = tuple[int, int]
"""The id of a stream's entry: ms and seq."""


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes | str) -> Any:
    return msgpack.unpackb(data, raw=False, strict_map_key=False)


def text(raw: bytes | str) -> str:
    """A name as Redis gave it."""
    return raw.decode() if isinstance(raw, bytes) else raw


class ItemRecord(NamedTuple):
    """An item at rest. `item` is None for a tombstone, which keeps versions from going back."""

    version: int
    at: int  # ms since 1970
    by: str
    item: Item | None


class Command(NamedTuple):
    """A request on its way to the store."""

    action: str
    body: dict[str, Any]
    user: str
    role: str  # "client" or "service"
    claims: dict[str, Any]
    connection: str | None
    request: str | None  # the client's own: the same user's same id gives the first result again
    request_ttl_ms: int
    deadline: int  # ms since 1970, server time: older than that, it is not done
    reply_to: str  # gateway
    number: int  # of the request within that gateway, greater than all before: what comes again is known by it
    trace: str | None = None  # W3C traceparent


class Reply(NamedTuple):
    """The answer: a result, or an error as {code, message, details}."""

    number: int
    result: JSON
    error: dict[str, Any] | None


class DirectMessage(NamedTuple):
    """A frame for one connection, on its way to the gateway that has it."""

    connection: str
    frame: dict[str, Any]
    deadline: int  # ms since 1970, server time
    reply_to: str  # gateway
    number: int


class Change(NamedTuple):
    """What the store appends for each write. Both images, always: who could see the old one must hear of it."""

    event: str  # INSERT, MODIFY or REMOVE; SEND for a message to a user, which is in no table
    table: str
    key: dict[str, Any]
    version: int
    new: Item | None
    old: Item | None
    at: int  # ms since 1970
    by: str
    connection: str | None
    request: str | None
    transaction: str | None = None  # the same for all changes of one; they come one after another
    more: bool = False  # another change of the transaction follows
    trace: str | None = None  # W3C traceparent
    generation: int = 0  # of the partition when it was written: what was written before a fall back keeps its own
    previous: Any = (
        None  # id of the partition's change before it, as [ms, seq]: where that was not passed, there is a gap
    )
    opens: list[Any] | None = None  # of a membership: as `Opened`, what its member may gain or lose sight of


class Opened(NamedTuple):
    """The items of one table and group that are looked at when a membership changes, as they are at that moment."""

    table: str
    records: list[Any]  # as `ItemRecord`, the last of the sort order first
    whole: bool  # whether these are all


class Declaration(NamedTuple):
    """A table as an application declares it, for those who work on a stage without its application."""

    key: tuple[str, ...]
    stream_view: str
    expires: str | None
    indexes: dict[str, tuple[str, str]]


class Authorization(NamedTuple):
    """A gateway's question to the authorizers."""

    auth_key: str
    reply_to: str
    number: int


class Principal(NamedTuple):
    """Who a credential stands for."""

    user: str
    role: str
    claims: dict[str, Any]
    credential: str  # id of the API key, for revocation
    expires_at: int | None  # ms since 1970


class Credential(NamedTuple):
    """An API key at rest: the SHA-256 of its secret, never the secret."""

    digest: bytes
    user: str
    role: str
    claims: dict[str, Any]
    created_at: int  # ms since 1970
    expires_at: int | None
    revoked_at: int | None


class FeedBody(NamedTuple):
    """What a feed's entry carries: the type of the frame, and the rest of it as JSON text of an object."""

    type: str  # change, message, reset; RECHECK is for the gateway alone
    rest: bytes
    asks: Any = True  # the condition that a connection's claims must meet, as in tidewire/model/claims.py


RECHECK = "recheck"
"""The user may no longer follow all topics: each of the connections is to be looked at."""


class Position(NamedTuple):
    """Where a change stands: its partition, that partition's generation, and its id in the change stream."""

    partition: int
    generation: int
    ms: int
    seq: int

    def __str__(self) -> str:
        return f"{self.partition}-{self.generation}-{self.ms}-{self.seq}"


def stream_id(raw: bytes | str) -> Id:
    """b"1795409459002-3" → (1795409459002, 3)."""
    ms, _, seq = (raw.decode() if isinstance(raw, bytes) else raw).partition("-")
    return int(ms), int(seq or 0)
