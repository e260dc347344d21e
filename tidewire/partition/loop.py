"""The loop under store and broadcaster, for one partition that is owned: read, decide, link, commit and read on.

Each step is one function call under the fence, and can be repeated. Whoever owns the partition next finds what was not
acknowledged, does it again, and the links skip what had already arrived: the effect is that of once, in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tidewire.functions import Batch, Functions, Operation, Owned, Wait
from tidewire.keys import Home


class Outcome(NamedTuple):
    """What was decided about the first `consumed` entries of a batch; the others come again with the next."""

    consumed: int
    operations: Sequence[Operation]
    links: Mapping[Home, Sequence[Any]] = {}
    """For each destination: calls in order, each what the worker's `Link` takes."""
    wait: Wait | None = None
    """What to wait for after the commit."""


class Tenure(Protocol):
    """What a service does with a partition while it owns it. One object for each time it is owned."""

    def destinations(self) -> Iterable[Home]:
        """The partitions that may be written to: they are stamped before the first read."""

    async def decide(self, batch: Batch) -> Outcome | None:
        """What follows from a batch, of which at least one entry is consumed. Reads, but writes nothing.

        A batch may be empty: then it is asked for what time brings, and None is nothing.
        """

    async def committed(self, *, confirmed: bool) -> None:
        """The last outcome is done; `confirmed` unless the wait that it asked for was in vain."""


Idle = Callable[[tuple[int, int]], Awaitable[None]]
Link = Callable[[Home, str, int, Any], Awaitable[Any]]
"""Sends one call to a destination: (it, source, epoch, what the tenure gave for it)."""
Together = Callable[[Iterable[Coroutine[Any, Any, Any]]], Awaitable[Any]]


async def concurrently(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Calls to different destinations do not wait for each other."""
    pending = list(calls)
    if len(pending) == 1:
        await pending[0]
    elif pending:
        async with asyncio.TaskGroup() as group:
            for call in pending:
                group.create_task(call)


class PartitionLoop:
    """Runs until cancelled or fenced. `idle` waits until the stream may have an entry after that id."""

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
        together: Together = concurrently,
    ) -> None:
        self._functions = functions
        self._owned = owned
        self._tenure = tenure
        self._source = source
        self._idle = idle
        self._batch = batch
        self._link = link
        self._together = together
        self._next: Batch | None = None
        self.commits = 0

    async def run(self) -> None:
        epoch = self._owned.fence.epoch
        # Before the first read: what a predecessor, paused between reading and writing, may still send comes too late.
        await self._together(
            self._functions.link_stamp(to, self._source, epoch, self._owned.fell) for to in self._tenure.destinations()
        )
        while True:
            await self.turn()

    async def turn(self) -> None:
        """One batch, which the commit before it has brought, or an idle while."""
        batch, self._next = self._next or await self._functions.batch(self._owned, self._batch), None
        outcome = await self._tenure.decide(batch)
        if outcome is None:
            await self._idle(batch.last)
            return
        # Before the acknowledgement: an effect may be sent twice, and is taken once; it is never forgotten.
        await self._together(self._send(to, calls) for to, calls in outcome.links.items())
        self.commits += 1
        acknowledged = [id_ for id_, _ in batch.entries[: outcome.consumed]]
        confirmed, following = await self._functions.commit(
            self._owned, self.commits, acknowledged, outcome.operations, outcome.wait, count=self._batch
        )
        await self._tenure.committed(confirmed=confirmed)
        self._next = following

    async def _send(self, to: Home, calls: Sequence[Any]) -> None:
        assert self._link or not calls
        for call in calls:
            await self._link(to, self._source, self._owned.fence.epoch, call)  # type: ignore[misc]
