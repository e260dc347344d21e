"""The loop of a worker over one partition that it owns: read, decide, link, commit.

Each step is one function call, fenced by the lease's epoch and the partition's generation, and may be repeated. If the
worker dies, the next owner reads everything that was not acknowledged, and decides it again. Effects that had reached
other partitions are recognized there and dropped. So each entry takes effect once, in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from redis.exceptions import RedisError

from tidewire.errors import Fenced
from tidewire.model.records import Id
from tidewire.redis.functions import Batch, Functions, Owned, RedisCommand, Stamp, Wait
from tidewire.redis.keys import Home

T = TypeVar("T")

MAX_BATCH_BYTES = 4 << 20
"""Maximum bytes of the entries in a batch. It holds at least one entry, and a whole transaction of any size."""


class Incomplete(Exception):
    """The batch ends within its first transaction. It must be extended before it can be decided."""


class Decoder(Generic[T]):
    """Decodes the entries of batches. Each is decoded once, although entries that are not consumed come again."""

    def __init__(self, decode: Callable[[dict[bytes, bytes]], T]) -> None:
        self._decode = decode
        self._decoded: dict[Id, T] = {}

    def entries(self, batch: Batch) -> list[tuple[Id, T]]:
        """Return the decoded entries of a batch, in order."""
        known = self._decoded
        self._decoded = {id_: known[id_] if id_ in known else self._decode(fields) for id_, fields in batch.entries}
        return list(self._decoded.items())


class Outcome(NamedTuple):
    """The decision on the first `consumed` entries of a batch. The next batch begins with the others."""

    consumed: int
    operations: Sequence[RedisCommand]
    links: Mapping[Home, Sequence[Any]] = {}
    """For each destination, calls in their order. The worker's `Link` sends them."""
    wait: Wait | None = None
    """The confirmation to wait for after the commit: replicas, or the disk."""


class Tenure(Protocol):
    """The work of a service on one partition, from taking it to losing it. A new owner makes a new object."""

    def destinations(self) -> Iterable[Home]:
        """Partitions that effects may go to. The loop stamps them before its first read."""

    async def decide(self, batch: Batch) -> Outcome | None:
        """Decide a batch, and consume at least one of its entries. It may read from Redis, and writes nothing.

        A long decision awaits between its steps, so that other partitions of the process get their turn. An empty batch
        asks for timed work, such as expiry; None means that there is none.

        Raises:
            Incomplete: a longer batch is needed. Not allowed if the batch is `at_end`.
        """

    async def committed(self, *, confirmed: bool) -> None:
        """The last outcome is committed. `confirmed` is false if the wait that it asked for ran out."""


Idle = Callable[[tuple[int, int]], Awaitable[None]]
"""Waits until the stream may have an entry after an id."""
Link = Callable[[Home, str, int, Any], Awaitable[Any]]
"""Sends one call to a destination, with the source, its epoch, and the call as the tenure made it."""
SendStamp = Callable[[Home, Stamp], Awaitable[bool]]
"""Announces a new owner at a destination. False if a later owner has stamped it already."""
Together = Callable[[Iterable[Coroutine[Any, Any, Any]]], Awaitable[Any]]


async def concurrently(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Make calls to different destinations at the same time."""
    pending = list(calls)
    if len(pending) == 1:
        await pending[0]
    elif pending:
        async with asyncio.TaskGroup() as group:
            for call in pending:
                group.create_task(call)


class PartitionLoop:
    """The loop. It runs until it is cancelled or fenced.

    `stamp` makes one call for each destination by default. A process that takes many partitions combines them: see
    `Stamps`.
    """

    def __init__(
        self,
        functions: Functions,
        owned: Owned,
        tenure: Tenure,
        *,
        source: str,
        idle: Idle,
        batch: int,
        link: Link | None = None,
        stamp: SendStamp | None = None,
        together: Together = concurrently,
    ) -> None:
        self._functions = functions
        self._owned = owned
        self._tenure = tenure
        self._source = source
        self._idle = idle
        self._batch = batch
        self._link = link
        self._stamp = stamp or self._stamp_alone
        self._together = together
        self._next: Batch | None = None
        self.commits = 0

    async def run(self) -> None:
        """Stamp all destinations, then work on one batch after another. Raises Fenced, and redis-py's errors."""
        # A predecessor that was paused between its read and its send may still send. The stamps make the destinations
        # refuse it. Only then is it safe to read, and to send the same effects again.
        await self._together(self._announce(to) for to in self._tenure.destinations())
        while True:
            await self.turn()

    async def turn(self) -> None:
        """Work on one batch, which the last commit has returned, or wait for one."""
        batch, self._next = self._next or await self._read(), None
        while True:
            try:
                outcome = await self._tenure.decide(batch)
                break
            except Incomplete:
                batch = await self._extended(batch)
        if outcome is None:
            await self._idle(batch.last)
            return
        # Send before acknowledging. A crash between the two repeats the effects, and the destinations drop the repeats.
        # In the other order it would lose them.
        await self._together(self._send(to, calls) for to, calls in outcome.links.items())
        self._next = await self._commit(batch, outcome)

    async def _read(self) -> Batch:
        return await self._functions.batch(self._owned, self._batch, MAX_BATCH_BYTES)

    async def _extended(self, batch: Batch) -> Batch:
        more = await self._functions.batch(self._owned, self._batch, MAX_BATCH_BYTES, batch.entries[-1][0])
        return more._replace(entries=batch.entries + more.entries, at_end=not more.entries)

    async def _commit(self, batch: Batch, outcome: Outcome) -> Batch:
        """Commit an outcome. The next batch has the entries that were not consumed, then those that the commit read."""
        self.commits += 1
        acknowledged = [id_ for id_, _ in batch.entries[: outcome.consumed]]
        held = batch.entries[outcome.consumed :]
        left_bytes = MAX_BATCH_BYTES - sum(len(value) for _, fields in held for value in fields.values())
        confirmed, following = await self._functions.commit(
            self._owned,
            self.commits,
            acknowledged,
            outcome.operations,
            outcome.wait,
            count=max(self._batch - len(held), 0),
            size_bytes=max(left_bytes, 0),
            after=held[-1][0] if held else (0, 0),
        )
        await self._tenure.committed(confirmed=confirmed)
        return following._replace(entries=held + following.entries)

    async def _announce(self, to: Home) -> None:
        if not await self._stamp(to, Stamp(self._source, self._owned.fence.epoch, self._owned.losses)):
            raise Fenced(f"{self._source}: a later owner has stamped {to.partition.decode()}")

    async def _stamp_alone(self, to: Home, stamp: Stamp) -> bool:
        (taken,) = await self._functions.link_stamp(to, [stamp])
        return taken

    async def _send(self, to: Home, calls: Sequence[Any]) -> None:
        assert self._link or not calls
        for call in calls:
            await self._link(to, self._source, self._owned.fence.epoch, call)  # type: ignore[misc]


class Stamps:
    """Combines the stamps of all partitions that a process takes, by destination.

    A process that takes P partitions at once would make P calls to each of P destinations. Here, one call to a
    destination is in flight at a time, and the next one carries all stamps that arrived meanwhile.
    """

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._gathered: dict[Home, list[tuple[Stamp, asyncio.Future[bool]]]] = {}
        self._sending: dict[Home, asyncio.Task[None]] = {}

    async def __call__(self, to: Home, stamp: Stamp) -> bool:
        taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._gathered.setdefault(to, []).append((stamp, taken))
        if to not in self._sending:
            self._sending[to] = asyncio.create_task(self._send(to), name="stamps")
        return await taken

    async def _send(self, to: Home) -> None:
        try:
            while gathered := self._gathered.pop(to, None):
                await self._send_some(to, gathered)
        finally:
            del self._sending[to]

    async def _send_some(self, to: Home, gathered: list[tuple[Stamp, asyncio.Future[bool]]]) -> None:
        try:
            answers = await self._functions.link_stamp(to, [stamp for stamp, _ in gathered])
        except (RedisError, OSError) as error:
            for _, taken in gathered:
                if not taken.done():
                    taken.set_exception(error)
            return
        for (_, taken), answer in zip(gathered, answers, strict=True):
            if not taken.done():
                taken.set_result(answer)
