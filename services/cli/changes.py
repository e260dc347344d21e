"""`tidewire changes`: print the change records of a table, old and new."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import typer
from redis.exceptions import RedisError

from tidewire.errors import ConfigurationError
from tidewire.model.records import Change, Id, Position, id_text, stream_id, unpack
from tidewire.redis.backend import Backend, StreamEntry
from tidewire.tasks import end

from . import change_formats, output, reach

PAGE = 100
"""Entries fetched at once from one partition. Each may hold two images of the largest size."""
RETRY_S = 0.5
LARGEST = 2**64 - 1


class Found(NamedTuple):
    """A change and its place. The lesser of two was written first. No two have the same id and partition."""

    id: Id
    partition: int
    position: Position
    change: Change


class Show(Protocol):
    """Where changes go. `at_once` means: flush now, because the next changes may come much later."""

    def __call__(self, all_found: Iterable[Found], /, *, at_once: bool) -> None: ...


class ServerReplaced(Exception):
    """`up` has restarted, and its server has another address. Reading continues there after `read`."""

    def __init__(self, read: dict[int, Id]) -> None:
        super().__init__()
        self.read = read


def starts(partitions: int, after: Sequence[Position]) -> dict[int, Id]:
    """Return the stream id after which each partition begins.

    A partition that a position names begins after it. The others begin at the time of the earliest position. Without
    a position, all begin at their oldest change.

    Raises:
        ConfigurationError: two positions are of the same partition.
    """
    if not after:
        return dict.fromkeys(range(partitions), (0, 0))
    earliest = min(position.ms for position in after)
    ids: dict[int, Id] = dict.fromkeys(range(partitions), (earliest - 1, LARGEST) if earliest else (0, 0))
    named: set[int] = set()
    for position in after:
        if position.partition in named:
            raise ConfigurationError(f"--from: two positions are of partition {position.partition}: give one for each")
        named.add(position.partition)
        ids[position.partition] = position.ms, position.seq
    return ids


class Printer:
    """Print the records of one table, and find the server again after `up` restarts."""

    def __init__(self, table: str, after: list[str], format_: str, *, follow: bool, as_json: bool) -> None:
        self._table = table
        self._after = after
        self._format = format_
        self._follow = follow
        self._as_json = as_json
        self._begin: dict[int, Id] | None = None
        self._address: str | None = None  # where the server of `up` is now; None with --redis

    def run(self, redis: str | None, data: Path, stage: str | None) -> None:
        """Print until the newest change, or until Ctrl-C. Raises ConfigurationError."""
        while True:
            self._address = None if redis else reach.address_of_up(data)
            try:
                reach.with_redis(redis, data, stage, lambda backend: self._print(backend, data))
            except ServerReplaced as error:
                self._begin = error.read
            else:
                return

    async def _print(self, backend: Backend, data: Path) -> None:
        keys = backend.keys
        declared = reach.declaration_of(self._table, await reach.declarations(backend), keys.stage)
        if self._begin is None:
            positions = [change_formats.parse_position(text, keys.partitions) for text in self._after]
            self._begin = starts(keys.partitions, positions)
            for position in positions:
                await _warn_of_gap(backend, position)

        def show(all_found: Iterable[Found], /, *, at_once: bool) -> None:
            for found in all_found:
                record = self._record(found, declared.stream_view, keys.stage)
                output.show(record, as_json=self._as_json, indent=None, at_once=False)
            if at_once:
                output.flush()

        def replaced() -> bool:
            return reach.has_moved(data, self._address)

        await print_changes(backend, self._table, self._begin, show, follow=self._follow, replaced=replaced)

    def _record(self, found: Found, stream_view: str, stage: str) -> dict[str, Any]:
        if self._format == "json":
            return change_formats.as_json(found.position, found.change, stream_view)
        try:
            return change_formats.as_dynamodb(found.position, found.change, stream_view, stage)
        except change_formats.Unrepresentable as error:
            typer.echo(f"tidewire: the change {found.position} is left out: {error}", err=True)
            return {"eventID": str(found.position), "error": str(error)}


async def print_changes(
    backend: Backend, table: str, begin: Mapping[int, Id], show: Show, *, follow: bool, replaced: Callable[[], bool]
) -> None:
    """Show a table's changes after `begin`, from all partitions, by time. With `follow`, continue until cancelled.

    Raises:
        ServerReplaced: Redis does not answer, and `replaced` found the server at another address.
    """
    readers = [_Reader(backend, table, partition, id_) for partition, id_ in begin.items()]
    async for found in _by_time([reader.past() for reader in readers]):
        show([found], at_once=False)
    show([], at_once=True)
    if follow:
        try:
            await _follow(readers, show, replaced)
        except ServerReplaced:
            raise ServerReplaced({reader.partition: reader.last for reader in readers}) from None


async def _warn_of_gap(backend: Backend, after: Position) -> None:
    """Print a warning if the changes that follow a position may have been trimmed."""
    oldest: Any = await backend.commands.xrange(backend.keys.changes(after.partition), count=1)
    if oldest and (id_ := stream_id(oldest[0][0])) > (after.ms, after.seq):
        kept = Position(after.partition, after.generation, *id_)
        typer.echo(f"tidewire: {after} is no longer kept, the oldest change of its partition is {kept}", err=True)


class _Reader:
    """The changes of one table in one partition."""

    def __init__(self, backend: Backend, table: str, partition: int, after: Id) -> None:
        self._backend = backend
        self._table = table
        self.partition = partition
        self._stream = backend.keys.changes(partition)
        self.last = after

    async def past(self) -> AsyncIterator[Found]:
        """The changes written until now."""
        newest: Any = await self._backend.commands.xrevrange(self._stream, count=1)
        if not newest:
            return
        until, more = stream_id(newest[0][0]), True
        while more and self.last < until:
            ms, seq = self.last
            low = id_text((ms, seq + 1) if seq < LARGEST else (ms + 1, 0))
            entries: Any = await self._backend.commands.xrange(self._stream, low, f"{until[0]}-{until[1]}", PAGE)
            for found in await self._found(entries):
                yield found
            more = len(entries) == PAGE

    async def coming(self) -> list[Found]:
        """The changes written after those. Waits up to a second for one."""
        read = await self._backend.read({self._stream: f"{self.last[0]}-{self.last[1]}"}, PAGE)
        return await self._found([entry for _, entries in read for entry in entries])

    async def _found(self, entries: list[StreamEntry]) -> list[Found]:
        if not entries:
            return []
        self.last = stream_id(entries[-1][0])
        changes = ((stream_id(id_), Change(*unpack(fields[b"r"]))) for id_, fields in entries if b"r" in fields)
        return [
            Found(id_, self.partition, Position(self.partition, change.generation, *id_), change)
            for id_, change in changes
            if change.table == self._table
        ]


async def _by_time(partitions: list[AsyncIterator[Found]]) -> AsyncIterator[Found]:
    """Merge the changes of all partitions, the oldest first. Each partition keeps its own order."""
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


async def _follow(readers: list[_Reader], show: Show, replaced: Callable[[], bool]) -> None:
    """Show new changes of all partitions as they are written, until cancelled."""
    tasks = [asyncio.create_task(_read_on(reader, show, replaced)) for reader in readers]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end(tasks)


async def _read_on(reader: _Reader, show: Show, replaced: Callable[[], bool]) -> None:
    """Show new changes of one partition. While Redis does not answer, retry and check whether it has moved."""
    answers = True
    while True:
        try:
            found = await reader.coming()
        except (RedisError, OSError) as error:
            if answers:
                typer.echo(f"tidewire: Redis does not answer, trying again: {error}", err=True)
            answers = False
            if replaced():
                raise ServerReplaced({}) from None
            await asyncio.sleep(RETRY_S)
            continue
        answers = True
        if found:
            show(found, at_once=True)
