"""What the store must know to decide, and how it is fetched: by name, in one round trip, whatever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from msgspec import Struct
from redis.exceptions import ResponseError

from tidewire.app import ItemKey
from tidewire.backend import Backend
from tidewire.functions import Arg
from tidewire.keys import Keys, Scalar
from tidewire.records import ItemRecord, Reply, stream_id, unpack

PAGE_BYTES = 1 << 20
"""A page of a query ends here, with a `next`."""
AT_A_TIME = 500
"""So many expired items, or forgotten versions, go into one commit."""


# Structs, as named tuples of two kinds are equal when their values are.


class ItemFact(Struct, frozen=True):
    key: ItemKey


class CountFact(Struct, frozen=True):
    """How many items a partition-key value has."""

    table: str
    partition: Scalar


class PageFact(Struct, frozen=True):
    """Up to `limit` records between two bounds of ZRANGEBYLEX, and whether there are more."""

    order: bytes
    items: bytes
    low: bytes
    high: bytes
    limit: int
    reverse: bool


class Page(NamedTuple):
    records: list[ItemRecord]
    more: bool


class RequestFact(Struct, frozen=True):
    """The first reply to an idempotent request."""

    user: str
    request: str


class AskedFact(Struct, frozen=True):
    """The number of the last command that was done for a gateway; 0 when none is remembered."""

    gateway: str


class ConnectedFact(Struct, frozen=True):
    """Connections of a gateway in this partition, a few hundred of them: (user, connection)."""

    gateway: str


class KindFact(Struct, frozen=True):
    """Of what kind a table's sort keys are, in all partitions: "s" or "n". Where no item came before, this kind."""

    table: str
    kind: str


class DueFact(Struct, frozen=True):
    """Keys of items that expired before now (ms), at most AT_A_TIME."""

    now: int


class ChangesFact(Struct, frozen=True):
    """How the partition's change stream stands."""


NEVER = (2**63, 0)
"""Later than any id of a stream."""


class Stream(NamedTuple):
    length: int
    first: tuple[int, int]  # id of its first entry
    read_by_all: tuple[int, int]  # every group has acknowledged what is before that; NEVER, where that is all
    unread: dict[str, int]  # by group: entries that it has not acknowledged


class TombstonesFact(Struct, frozen=True):
    """Keys of items deleted before that time (ms), at most AT_A_TIME."""

    before: int


class FieldsFact(Struct, frozen=True):
    """How many items and tombstones a partition-key value has."""

    table: str
    partition: Scalar


Fact = (
    ItemFact
    | CountFact
    | PageFact
    | RequestFact
    | AskedFact
    | ConnectedFact
    | KindFact
    | DueFact
    | ChangesFact
    | TombstonesFact
    | FieldsFact
)
Value = ItemRecord | int | str | Page | Reply | Stream | list[tuple[str, str]] | list[ItemKey] | None


async def fetch(backend: Backend, partition: int, facts: Iterable[Fact]) -> dict[Fact, Value]:
    """All of them, concurrently: simple ones in one round trip, the others in calls of their own."""
    simple: list[Fact] = []
    others: list[Fact] = []
    for fact in facts:
        (others if isinstance(fact, PageFact | KindFact | ChangesFact) else simple).append(fact)
    if not others:
        return await _simple(backend, partition, simple)
    known, *found = await asyncio.gather(
        _simple(backend, partition, simple), *(_other(backend, partition, fact) for fact in others)
    )
    return {**known, **dict(zip(others, found, strict=True))}


async def _simple(backend: Backend, partition: int, facts: Sequence[Fact]) -> dict[Fact, Value]:
    if not facts:
        return {}
    raw = await backend.calls([_command(backend.keys, partition, fact) for fact in facts])
    return {fact: _value(fact, answer) for fact, answer in zip(facts, raw, strict=True)}


def _command(keys: Keys, partition: int, fact: Fact) -> tuple[Arg, ...]:  # noqa: PLR0911 - one for each kind of fact
    match fact:
        case ItemFact(key):
            return "HGET", keys.items(key.table, key.partition), key.field
        case RequestFact(user, request):
            return "GET", keys.request(partition, user, request)
        case AskedFact(gateway):
            return "GET", keys.asked(partition, gateway)
        case CountFact(table, value):
            return "ZCARD", keys.order(table, value)
        case FieldsFact(table, value):
            return "HLEN", keys.items(table, value)
        case ConnectedFact(gateway):
            return "SRANDMEMBER", keys.connected(partition, gateway), 200
        case DueFact(now):
            return "ZRANGEBYSCORE", keys.expiries(partition), "-inf", str(now / 1000), "LIMIT", 0, AT_A_TIME
        case TombstonesFact(before):
            return "ZRANGEBYSCORE", keys.tombstones(partition), "-inf", f"({before}", "LIMIT", 0, AT_A_TIME
    raise AssertionError(f"{fact} is asked for in a way of its own")


def _value(fact: Fact, raw: Any) -> Value:
    if isinstance(fact, CountFact | FieldsFact | AskedFact):
        return int(raw or 0)
    if isinstance(fact, ConnectedFact):
        return sorted((user, connection) for user, connection in map(unpack, raw))
    if isinstance(fact, DueFact | TombstonesFact):
        return [ItemKey(*unpack(member)) for member in raw]
    if raw is None:
        return None
    return Reply(*unpack(raw)) if isinstance(fact, RequestFact) else ItemRecord(*unpack(raw))


async def _other(backend: Backend, partition: int, fact: Fact) -> Value:
    if isinstance(fact, PageFact):
        return await _page(backend, fact)
    return await _kind(backend, fact) if isinstance(fact, KindFact) else await _stream(backend, partition)


async def _kind(backend: Backend, fact: KindFact) -> str:
    # The first one who asks decides, for all partitions: nothing but this is written to know it.
    kinds = backend.keys.sort_kinds()
    _, kind = await backend.calls([("HSETNX", kinds, fact.table, fact.kind), ("HGET", kinds, fact.table)])
    return str(kind.decode())


async def _page(backend: Backend, fact: PageFact) -> Page:
    found, cut = await backend.functions.page(
        fact.order,
        fact.items,
        fact.low,
        fact.high,
        reverse=fact.reverse,
        count=fact.limit + 1,
        size_bytes=PAGE_BYTES,
    )
    records = [ItemRecord(*unpack(record)) for _, record in found]
    return Page(records[: fact.limit], cut or len(found) > fact.limit)


async def _stream(backend: Backend, partition: int) -> Stream:
    stream = backend.keys.changes(partition)
    try:
        info: Any = await backend.commands.xinfo_stream(stream)
    except ResponseError as error:
        if "no such key" not in str(error).lower():
            raise
        return Stream(0, (0, 0), (0, 0), {})
    groups: list[Any] = await backend.commands.xinfo_groups(stream)
    first = stream_id(info["first-entry"][0]) if info["first-entry"] else NEVER
    last = stream_id(info["last-generated-id"])
    unread = {group["name"].decode(): int(group.get("lag") or 0) + int(group["pending"]) for group in groups}
    read = [await _read_by(backend, stream, group, last) for group in groups]
    if "broadcaster" not in unread:
        read.append((0, 0))  # it has not begun
    return Stream(int(info["length"]), first, min(read), unread)


async def _read_by(backend: Backend, stream: bytes, group: Any, last: tuple[int, int]) -> tuple[int, int]:
    """The first id that a group has not acknowledged."""
    if group["pending"]:
        pending: Any = await backend.commands.xpending(stream, group["name"])
        if pending["min"]:
            return stream_id(pending["min"])
    ms, seq = stream_id(group["last-delivered-id"])
    return NEVER if (ms, seq) >= last else (ms, seq + 1)
