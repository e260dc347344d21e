"""Fetching facts from Redis: many of any kind in one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from tidewire.model.records import FirstReply, ItemRecord, stream_id, text, unpack
from tidewire.model.values import ItemKey
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Arg
from tidewire.redis.keys import ConsumerGroup, Keys

from .facts import (
    CHORE_BATCH,
    NEVER,
    ChangesFact,
    ConnectedFact,
    CountFact,
    DueFact,
    Fact,
    FieldsFact,
    ItemFact,
    KindFact,
    LastNumberFact,
    Page,
    PageFact,
    RequestFact,
    Sizes,
    Stream,
    TombstonesFact,
    Value,
)

MAX_FETCH = 512
"""Maximum facts of one round trip. Other work gets its turn between two."""


async def fetch(
    backend: Backend, partition: int, facts: Iterable[Fact], sizes: Sizes | None = None, *, max_bytes: int = 0
) -> dict[Fact, Value]:
    """Fetch facts concurrently: simple ones in few round trips, pages in calls of their own.

    `sizes` receives the bytes of each. With `max_bytes`, fetching stops soon after that many, and the rest is missing.
    """
    simple: list[Fact] = []
    others: list[Fact] = []
    for fact in facts:
        (others if isinstance(fact, PageFact | ChangesFact) else simple).append(fact)
    sizes = {} if sizes is None else sizes
    known: dict[Fact, Value] = {}
    fetched_bytes = 0
    for begin in range(0, max(len(simple), len(others)), MAX_FETCH):
        some = simple[begin : begin + MAX_FETCH]
        pages = others[begin : begin + MAX_FETCH] if not max_bytes else []
        found, *values = await asyncio.gather(
            _simple(backend, partition, some, sizes), *(_other(backend, partition, fact, sizes) for fact in pages)
        )
        known |= {**found, **dict(zip(pages, values, strict=True))}
        fetched_bytes += sum(sizes.get(fact, 0) for fact in some)
        if max_bytes and fetched_bytes > max_bytes:
            return known
    if max_bytes:
        for fact in others:  # one at a time, because each may be a whole page
            known[fact] = await _other(backend, partition, fact, sizes)
            fetched_bytes += sizes.get(fact, 0)
            if fetched_bytes > max_bytes:
                break
    return known


async def _simple(backend: Backend, partition: int, facts: Sequence[Fact], sizes: Sizes) -> dict[Fact, Value]:
    if not facts:
        return {}
    raw = await backend.calls([_command(backend.keys, partition, fact) for fact in facts])
    sizes.update((fact, len(answer)) for fact, answer in zip(facts, raw, strict=True) if isinstance(answer, bytes))
    return {fact: _value(fact, answer) for fact, answer in zip(facts, raw, strict=True)}


def _command(keys: Keys, partition: int, fact: Fact) -> tuple[Arg, ...]:  # noqa: PLR0911 - one for each kind of fact
    match fact:
        case ItemFact(key):
            return "HGET", keys.items(key.table, key.partition), key.field
        case RequestFact(user, request):
            return "GET", keys.request(partition, user, request)
        case LastNumberFact(gateway):
            return "GET", keys.last_number(partition, gateway)
        case KindFact(table):
            return "HGET", keys.sort_kinds(), table
        case CountFact(table, value):
            return "ZCARD", keys.order(table, value)
        case FieldsFact(table, value):
            return "HLEN", keys.items(table, value)
        case ConnectedFact(gateway):
            return "SRANDMEMBER", keys.connected(partition, gateway), 200
        case DueFact(now):
            return "ZRANGEBYSCORE", keys.expiries(partition), "-inf", str(now / 1000), "LIMIT", 0, CHORE_BATCH
        case TombstonesFact(before):
            return "ZRANGEBYSCORE", keys.tombstones(partition), "-inf", f"({before}", "LIMIT", 0, CHORE_BATCH
    raise AssertionError(f"{fact} is asked for in a way of its own")


def _value(fact: Fact, raw: Any) -> Value:
    if isinstance(fact, CountFact | FieldsFact | LastNumberFact):
        return int(raw or 0)
    if isinstance(fact, ConnectedFact):
        return sorted((user, connection) for user, connection in map(unpack, raw))
    if isinstance(fact, DueFact | TombstonesFact):
        return [ItemKey(*unpack(member)) for member in raw]
    if raw is None:
        return None
    if isinstance(fact, KindFact):
        return text(raw)
    return FirstReply(*unpack(raw)) if isinstance(fact, RequestFact) else ItemRecord(*unpack(raw))


async def _other(backend: Backend, partition: int, fact: Fact, sizes: Sizes) -> Value:
    if isinstance(fact, PageFact):
        return await _page(backend, fact, sizes)
    return await _stream(backend, partition)


async def settle_kind(backend: Backend, table: str, kind: str) -> str:
    """Settle the kind of a table's sort keys, and return it. Another partition may have settled it first.

    It stays if the write that needed it is not committed, because that was a valid write.
    """
    kinds = backend.keys.sort_kinds()
    _, settled = await backend.calls([("HSETNX", kinds, table, kind), ("HGET", kinds, table)])
    return text(settled)


async def _page(backend: Backend, fact: PageFact, sizes: Sizes) -> Page:
    found, cut = await backend.functions.page(
        fact.order,
        fact.items,
        fact.low,
        fact.high,
        reverse=fact.reverse,
        count=fact.limit + 1,
        size_bytes=fact.size_bytes,
    )
    sizes[fact] = sum(len(record) for _, record in found)
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
    if ConsumerGroup.BROADCASTER not in unread:
        read.append((0, 0))  # the group has not begun
    counted = ConsumerGroup.BROADCASTER in unread and all(group.get("lag") is not None for group in groups)
    size_bytes = await _memory_of(backend, stream)
    return Stream(int(info["length"]), first, min(read), unread, size_bytes, counted)


async def _memory_of(backend: Backend, key: bytes) -> int:
    try:
        return int(await backend.commands.memory_usage(key, samples=0) or 0)  # measure all entries, not a sample
    except (ResponseError, NotImplementedError):
        return 0  # fakeredis


async def _read_by(backend: Backend, stream: bytes, group: Any, last: tuple[int, int]) -> tuple[int, int]:
    """Return the first id that a group has not acknowledged."""
    if group["pending"]:
        pending: Any = await backend.commands.xpending(stream, group["name"])
        if pending["min"]:
            return stream_id(pending["min"])
    ms, seq = stream_id(group["last-delivered-id"])
    return NEVER if (ms, seq) >= last else (ms, seq + 1)
