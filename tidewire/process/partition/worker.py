"""The partition worker: it owns this process's fair share of the partitions, among the live workers of its group."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError

from tidewire.errors import Declined, Fenced
from tidewire.process.partition.loop import Link, PartitionLoop, Stamps, Tenure
from tidewire.process.registry import Registry
from tidewire.process.settings import Settings
from tidewire.process.versions import Versions
from tidewire.redis.backend import Backend, Waiter
from tidewire.redis.functions import Owned
from tidewire.tasks import end, leaf

log = structlog.get_logger(__name__)

TAKEN = Counter("tidewire_partitions_taken_total", "Partitions taken.", ["group"])
GENERATION = Gauge("tidewire_partition_generation", "When Redis last went back there, in ms; 0: never.", ["partition"])


def fair_share(workers: Sequence[str], me: str, partitions: int) -> int:
    """Return how many partitions `me` should own. What does not divide evenly goes to the first workers by id."""
    if me not in workers:
        return 0
    each, odd = divmod(partitions, len(workers))
    return each + (sorted(workers).index(me) < odd)


class Plan(NamedTuple):
    """The next steps of a worker towards its share. Other workers may still own the partitions to take."""

    hand_over: list[int]
    extra: list[int]
    """Partitions to take beyond the fair share."""
    others: list[int]
    """Partitions to take, in this order, until `room` of them are owned."""
    room: int


def plan(
    owned: Iterable[int], share: int, partitions: int, declined: Collection[int] = (), offered: Collection[int] = ()
) -> Plan:
    """Plan towards a fair share, without partitions that this worker has `declined`, and with those `offered` to it.

    Offered partitions, which other workers decline, do not count towards the share. Otherwise the worker would hand
    over another one for each of them.
    """
    owned = sorted(owned)
    counted = [partition for partition in owned if partition not in offered]
    free = [partition for partition in range(partitions) if partition not in owned]
    return Plan(
        counted[share:],
        [partition for partition in free if partition in offered],
        [partition for partition in free if partition not in offered and partition not in declined],
        max(share - len(counted), 0),
    )


class Worker:
    """Takes partitions of one group, works on them and hands them over.

    Args:
        group: the group's name.
        backend: the stage.
        registry: this process's registration.
        settings: lease and batch size.
        stream: returns the key of a partition's stream.
        tenure: makes the work on a partition for one ownership.
        link: sends effects to other partitions.
        versions: knows which partitions are left to workers with other tables.
    """

    def __init__(
        self,
        group: str,
        backend: Backend,
        registry: Registry,
        settings: Settings,
        *,
        stream: Callable[[int], bytes],
        tenure: Callable[[int, Owned], Tenure],
        link: Link | None = None,
        versions: Versions | None = None,
    ) -> None:
        self.group = group
        self._backend = backend
        self._registry = registry
        self._settings = settings
        self._stream = stream
        self._tenure = tenure
        self._link = link
        self._stamps = Stamps(backend.functions)
        self._versions = versions
        self._loops: dict[int, PartitionLoop] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._owned: dict[int, Owned] = {}
        self._lost: list[tuple[int, Owned]] = []
        self._retry_at: dict[int, float] = {}
        self._commits_before = 0
        self._draining = False

    @property
    def partitions(self) -> list[int]:
        """The partitions that are owned at the moment, sorted."""
        return sorted(self._tasks)

    @property
    def commits(self) -> int:
        """Number of commits since the start."""
        return self._commits_before + sum(loop.commits for loop in self._loops.values())

    async def run(self) -> None:
        """Own the fair share until `drain`. Errors of Redis are retried; any other error of a loop ends the worker."""
        try:
            while not self._draining:
                try:
                    await self._reap()
                    await self._stop_lost()
                    await self._balance()
                except (RedisError, OSError) as error:
                    log.warning("partitions_unreachable", group=self.group, error=str(error))
                # A sixth of a lease: twice for each heartbeat.
                await asyncio.sleep(self._settings.lease_ms / 6000)
        finally:
            await asyncio.gather(*(self._stop(partition) for partition in self.partitions))

    async def drain(self) -> None:
        """Hand over all partitions at once. The worker leaves the group first, so that no share includes it."""
        self._draining = True
        try:
            await self._registry.leave()
            await asyncio.gather(*(self._hand_over(partition) for partition in self.partitions))
        except (RedisError, OSError) as error:
            log.warning("hand_over_failed", group=self.group, error=str(error))

    async def _balance(self) -> None:
        partitions, versions = self._backend.keys.partitions, self._versions
        share = fair_share(self._registry.live(self._registry.kind), self._registry.id, partitions)
        declined, offered = (versions.declined(self.group), versions.offered(self.group)) if versions else ((), ())
        todo = plan(self.partitions, share, partitions, declined, offered)
        for partition in todo.hand_over:
            await self._hand_over(partition)
        for partition in todo.extra:
            await self._take_if_due(partition)
        room = todo.room
        for partition in todo.others:
            if room <= 0:
                break
            room -= await self._take_if_due(partition)

    async def _take_if_due(self, partition: int) -> bool:
        """Take a partition, unless the last attempt has just failed. Returns whether it is owned now."""
        if not self._draining and self._retry_at.get(partition, 0) <= time.monotonic():
            await self._take(partition)
        return partition in self._tasks

    async def _take(self, partition: int) -> None:
        keys, stream = self._backend.keys, self._stream(partition)
        owned = await self._backend.functions.lease_take(
            keys.lease(partition, self.group),
            keys.home(partition),
            stream,
            self.group,
            self._registry.id,
            self._settings.lease_ms,
        )
        if owned is None:
            return
        await self._backend.ensure_group(stream, self.group)
        idle = self._backend.waiter(stream)
        loop = PartitionLoop(
            self._backend.functions,
            owned,
            self._tenure(partition, owned),
            source=f"{self.group}:{partition}",
            idle=idle,
            batch=self._settings.batch,
            link=self._link,
            stamp=self._stamps,
        )
        self._owned[partition], self._loops[partition] = owned, loop
        self._registry.leases.hold(owned, lambda: self._lost.append((partition, owned)))
        self._tasks[partition] = asyncio.create_task(_run(loop, idle), name=f"{self.group}:{partition}")
        TAKEN.labels(self.group).inc()
        GENERATION.labels(partition).set(owned.fence.generation)
        log.info("partition_taken", group=self.group, partition=partition, epoch=owned.fence.epoch)

    async def _stop_lost(self) -> None:
        """Stop work on partitions whose lease another worker has, as the keeper found out."""
        while self._lost:
            partition, owned = self._lost.pop()
            if self._owned.get(partition) is owned:
                await self._stop(partition)
                log.warning("partition_lost", group=self.group, partition=partition)

    async def _reap(self) -> None:
        """Clean up loops that have ended by themselves."""
        for partition, task in list(self._tasks.items()):
            if not task.done():
                continue
            error, owned = task.exception(), self._owned[partition]
            cause = _cause(error)
            await self._stop(partition)
            self._retry_at[partition] = time.monotonic() + 0.5
            if isinstance(cause, Fenced):
                log.warning("partition_lost", group=self.group, partition=partition)
            elif isinstance(cause, Declined) and self._versions:
                self._versions.decline(self.group, partition, cause.names)
                with contextlib.suppress(Fenced):
                    await self._backend.functions.lease_release(owned)
            elif isinstance(cause, RedisError | OSError):
                log.warning("partition_failed", group=self.group, partition=partition, error=str(cause))
            elif error:
                raise error

    async def _hand_over(self, partition: int) -> None:
        owned = self._owned.get(partition)
        if owned is None:
            return
        await self._stop(partition)
        try:
            await self._backend.functions.lease_release(owned)
        except Fenced:
            return
        log.info("partition_released", group=self.group, partition=partition)

    async def _stop(self, partition: int) -> None:
        task = self._tasks.pop(partition, None)
        if task is None:
            return  # a drain, a lost lease or the end of the service is stopping it already
        loop = self._loops.pop(partition)
        self._registry.leases.let_go(self._owned.pop(partition))
        self._commits_before += loop.commits
        await end([task])


async def _run(loop: PartitionLoop, idle: Waiter) -> None:
    try:
        await loop.run()
    finally:
        await idle.aclose()


def _cause(error: BaseException | None) -> BaseException | None:
    """Return the error behind an exception group: a Fenced if there is one, else the first."""
    if isinstance(error, BaseExceptionGroup):
        return leaf(error.subgroup(Fenced) or error)
    return error
