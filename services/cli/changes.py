"""`tidewire changes`: the change records of a table, as they were written and as they come."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple, Protocol

import typer
from redis.exceptions import RedisError

from tidewire.model.records import Change, Position, stream_id, unpack
from tidewire.redis.backend import Backend, Entry
from tidewire.tasks import end

PAGE = 100
"""Entries that are fetched at once from one partition: each may have two images of the largest size."""
RETRY_S = 0.5
LARGEST = 2**64 - 1

Id = tuple[int, int]


class Found(NamedTuple):
    """A change and where it stands. The lesser of two was written first; no two have the same id and partition."""

    id: Id
    partition: int
    position: Position
    change: Change


class Show(Protocol):
    """Where changes go. `at_once`: nothing may be kept back, the next ones may be long in coming."""

    def __call__(self, all_found: Iterable[Found], /, *, at_once: bool) -> None: ...


def starts(partitions: int, after: Position | None) -> dict[int, Id]:
    """Of each partition, the id after which to begin: the position's own and, in the others, what precedes its time."""
    if after is None:
        return dict.fromkeys(range(partitions), (0, 0))
    before = (after.ms - 1, LARGEST) if after.ms else (0, 0)
    return dict.fromkeys(range(partitions), before) | {after.partition: (after.ms, after.seq)}


async def print_changes(backend: Backend, table: str, after: Position | None, show: Show, *, follow: bool) -> None:
    """Show a table's changes, those of all partitions by time; with `follow` go on with what comes, until cancelled."""
    readers = [
        _Reader(backend, table, partition, id_) for partition, id_ in starts(backend.keys.partitions, after).items()
    ]
    if after is not None:
        await _tell_of_gap(backend, after)
    async for found in _by_time([reader.past() for reader in readers]):
        show([found], at_once=False)
    show([], at_once=True)
    if follow:
        await _follow(readers, show)


async def _tell_of_gap(backend: Backend, after: Position) -> None:
    """Say so where the changes next after a position may be trimmed."""
    oldest: Any = await backend.commands.xrange(backend.keys.changes(after.partition), count=1)
    if oldest and (id_ := stream_id(oldest[0][0])) > (after.ms, after.seq):
        kept = Position(after.partition, after.generation, *id_)
        typer.echo(f"tidewire: {after} is no longer kept, the oldest change of its partition is {kept}", err=True)


class _Reader:
    """The changes of one table in one partition."""

    def __init__(self, backend: Backend, table: str, partition: int, after: Id) -> None:
        self._backend = backend
        self._table = table
        self._partition = partition
        self._stream = backend.keys.changes(partition)
        self._last = after

    async def past(self) -> AsyncIterator[Found]:
        """What was written until now."""
        newest: Any = await self._backend.commands.xrevrange(self._stream, count=1)
        if not newest:
            return
        until, more = stream_id(newest[0][0]), True
        while more and self._last < until:
            ms, seq = self._last
            low = f"{ms}-{seq + 1}" if seq < LARGEST else f"{ms + 1}-0"
            entries: Any = await self._backend.commands.xrange(self._stream, low, f"{until[0]}-{until[1]}", PAGE)
            for found in await self._found(entries):
                yield found
            more = len(entries) == PAGE

    async def coming(self) -> list[Found]:
        """What is written after that, waiting up to a second."""
        read = await self._backend.read({self._stream: f"{self._last[0]}-{self._last[1]}"}, PAGE)
        return await self._found([entry for _, entries in read for entry in entries])

    async def _found(self, entries: list[Entry]) -> list[Found]:
        if not entries:
            return []
        self._last = stream_id(entries[-1][0])
        changes = ((stream_id(id_), Change(*unpack(fields[b"r"]))) for id_, fields in entries if b"r" in fields)
        return [
            Found(id_, self._partition, Position(self._partition, change.generation, *id_), change)
            for id_, change in changes
            if change.table == self._table
        ]


async def _by_time(partitions: list[AsyncIterator[Found]]) -> AsyncIterator[Found]:
    """One after another, the oldest first; each partition's in its own order."""
    heads: list[tuple[Found, AsyncIterator[Found]]] = []
    for partition, first in zip(
        partitions, await asyncio.gather(*(anext(partition, None) for partition in partitions)), strict=True
    ):
        if first is not None:
            heads.append((first, partition))
    heapq.heapify(heads)
    while heads:
        found, partition = heads[0]
        yield found
        following = await anext(partition, None)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, (following, partition))


async def _follow(readers: list[_Reader], show: Show) -> None:
    """Show what comes, as it comes, until cancelled."""
    tasks = [asyncio.create_task(_read_on(reader, show)) for reader in readers]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end(tasks)


async def _read_on(reader: _Reader, show: Show) -> None:
    answers = True
    while True:
        try:
            found = await reader.coming()
        except (RedisError, OSError) as error:
            if answers:
                typer.echo(f"tidewire: Redis does not answer, trying again: {error}", err=True)
            answers = False
            await asyncio.sleep(RETRY_S)
            continue
        answers = True
        if found:
            show(found, at_once=True)
