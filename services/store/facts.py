"""What the store must know to decide, and how it is fetched: by name, in one round trip, whatever it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tidewire.app import App, ItemKey
from tidewire.backend import Backend
from tidewire.keys import Scalar, sort_bytes
from tidewire.records import ItemRecord, Reply, unpack

PAGE_BYTES = 1 << 20
"""A page of a query ends here, with a `next`."""


class ItemFact(NamedTuple):
    key: ItemKey


class CountFact(NamedTuple):
    """How many items a partition-key value has."""

    table: str
    partition: Scalar


class PageFact(NamedTuple):
    """Up to `limit` items between two sort keys (exclusive), with one more to see whether there is more."""

    table: str
    partition: Scalar
    after: Scalar | None
    before: Scalar | None
    prefix: str | None
    limit: int
    reverse: bool


class Page(NamedTuple):
    records: list[ItemRecord]
    more: bool


class RequestFact(NamedTuple):
    """The first reply to an idempotent request."""

    user: str
    request: str


class ConnectedFact(NamedTuple):
    """Connections of a gateway in this partition, a few hundred of them: (user, connection)."""

    gateway: str


Fact = ItemFact | CountFact | PageFact | RequestFact | ConnectedFact
Value = ItemRecord | int | Page | Reply | list[tuple[str, str]] | None


async def fetch(backend: Backend, app: App, partition: int, facts: Iterable[Fact]) -> dict[Fact, Value]:
    """All of them, concurrently: simple ones in one pipeline, pages in calls of their own."""
    wanted = list(facts)
    simple = [fact for fact in wanted if not isinstance(fact, PageFact)]
    pages = [fact for fact in wanted if isinstance(fact, PageFact)]
    values, found = await asyncio.gather(
        _simple(backend, partition, simple), asyncio.gather(*(_page(backend, fact) for fact in pages))
    )
    return dict[Fact, Value](zip(simple, values, strict=True)) | dict(zip(pages, found, strict=True))


async def _simple(backend: Backend, partition: int, facts: Sequence[Fact]) -> list[Value]:
    keys = backend.keys
    if not facts:
        return []
    async with backend.commands.pipeline(transaction=False) as pipeline:
        for fact in facts:
            if isinstance(fact, ItemFact):
                pipeline.hget(keys.items(fact.key.table, fact.key.partition), fact.key.field)
            elif isinstance(fact, CountFact):
                pipeline.zcard(keys.order(fact.table, fact.partition))
            elif isinstance(fact, RequestFact):
                pipeline.get(keys.request(partition, fact.user, fact.request))
            elif isinstance(fact, ConnectedFact):
                pipeline.srandmember(keys.connected(partition, fact.gateway), 200)
        raw = await pipeline.execute()
    return [_value(fact, answer) for fact, answer in zip(facts, raw, strict=True)]


def _value(fact: Fact, raw: object) -> Value:
    if isinstance(fact, CountFact):
        assert isinstance(raw, int)
        return raw
    if isinstance(fact, ConnectedFact):
        assert isinstance(raw, list | set)
        return sorted((user, connection) for user, connection in map(unpack, raw))
    if raw is None:
        return None
    assert isinstance(raw, bytes)
    return Reply(*unpack(raw)) if isinstance(fact, RequestFact) else ItemRecord(*unpack(raw))


async def _page(backend: Backend, fact: PageFact) -> Page:
    low, high = bounds(fact)
    found, cut = await backend.functions.page(
        backend.keys.order(fact.table, fact.partition),
        backend.keys.items(fact.table, fact.partition),
        low,
        high,
        reverse=fact.reverse,
        count=fact.limit + 1,
        size_bytes=PAGE_BYTES,
    )
    records = [ItemRecord(*unpack(record)) for _, record in found]
    return Page(records[: fact.limit], cut or len(found) > fact.limit)


def bounds(fact: PageFact) -> tuple[bytes, bytes]:
    """The range of sort bytes, as ZRANGEBYLEX has it."""
    low = [b"-"] if fact.after is None else [b"(" + sort_bytes(fact.after)]
    high = [b"+"] if fact.before is None else [b"(" + sort_bytes(fact.before)]
    if fact.prefix:
        start = sort_bytes(fact.prefix)
        low.append(b"[" + start)
        high.append(b"(" + start + b"\xff")  # beyond all of UTF-8
    # "-" and "+" compare below "(" only by accident of ASCII, hence the explicit choice.
    lowest = max(low, key=lambda bound: b"" if bound == b"-" else bound[1:])
    highest = min(high, key=lambda bound: (1, b"") if bound == b"+" else (0, bound[1:]))
    return lowest, highest
