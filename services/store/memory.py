"""Which Redis nodes are full, so that the store refuses growing writes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import structlog
from prometheus_client import Gauge
from redis.exceptions import RedisError, ResponseError

from tidewire.redis.backend import Backend

log = structlog.get_logger(__name__)

LOOK_S = 1.0
FULL_PERCENT = 97
"""Share of maxmemory from which growing writes are refused. The rest is for deletes, trims, expiry and replies."""

FULL = Gauge("tidewire_redis_full", "Partitions whose node of Redis has too little memory left for writes.")


def fullness(info: Mapping[str, Any]) -> str | None:
    """Return why a node accepts no growing writes, by its INFO memory; None if it does."""
    used, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not most or 100 * used < FULL_PERCENT * most:
        return None
    return (
        f"Redis is full: it uses {used} bytes, and its maxmemory is {most}. Nothing was done. Reads and deletes still "
        f"work. Delete items or raise maxmemory, then try again: writes are refused from {FULL_PERCENT} % on"
    )


class Memory:
    """The memory of the nodes that have the partitions. `run` measures it every second."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._full: dict[int, str] = {}

    def full(self, partition: int) -> str | None:
        """Return why the node of a partition accepts no growing writes; None if it does."""
        return self._full.get(partition)

    def refused(self, partition: int) -> str:
        """Note that a node has refused a command for want of memory.

        Returns what `full` says until the next measurement.
        """
        why = "Redis is full: it has reached its maxmemory. Nothing was done. Delete items or raise maxmemory"
        return self._full.setdefault(partition, why)

    async def run(self) -> None:
        """Measure until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(LOOK_S)
        except ResponseError as error:  # a Redis user without INFO; or fakeredis, which has no memory to speak of
            if "unknown command" not in str(error):
                log.warning("redis_memory_unknown", error=str(error))
            await asyncio.Event().wait()

    async def look(self) -> None:
        """Ask each node once. A node that does not answer keeps its state. Raises ResponseError if INFO is refused."""
        fullness_of: dict[int, str | None] = {}
        was_full = bool(self._full)
        for partition in range(self._backend.keys.partitions):
            try:
                node = self._backend.node_of(self._backend.keys.partition(partition))
                if id(node) not in fullness_of:
                    fullness_of[id(node)] = fullness(await node.info("memory"))
            except ResponseError:
                raise
            except (RedisError, OSError):
                continue
            why = fullness_of[id(node)]
            if why is None:
                self._full.pop(partition, None)
            else:
                self._full[partition] = why
        FULL.set(len(self._full))
        if self._full and not was_full:
            log.error("redis_full", partitions=len(self._full), message=next(iter(self._full.values())))
        elif was_full and not self._full:
            log.info("redis_no_longer_full")
