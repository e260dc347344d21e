"""Following the masters of a topology that changes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis
from redis.exceptions import (
    RedisError,
)

from tidewire.redis.backend import Backend
from tidewire.redis.cluster_wire import Address
from tidewire.tasks import end

log = structlog.get_logger(__name__)

REPLACED = Counter("tidewire_redis_masters_total", "Masters that were replaced by another server.")

LOOK_S = 1.0
"""Time between two looks at who the master is. It is part of the time that a failover takes."""
MAX_LOOK_S = 1.0
"""Longest time for a node to answer such a look before another one is asked."""


class MasterWatch(Backend):
    """A backend whose masters change. It looks once a second who they are, and at once when one cannot be reached.

    A server that hangs keeps its connections: nothing but a look at the others tells that it has been replaced.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._watching: asyncio.Task[None] | None = None
        self._doubted = asyncio.Event()

    async def reach(self) -> None:
        await super().reach()
        if self._watching is None:
            await self._look()
            self._watching = asyncio.create_task(self._watch(), name="watch_masters")

    async def __aexit__(self, *_: object) -> None:
        if self._watching:
            await end([self._watching])
        await super().__aexit__()

    def doubt(self) -> None:
        """Look soon."""
        self._doubted.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._doubted.wait()
            self._doubted.clear()
            with contextlib.suppress(RedisError, OSError):
                await self._look()
            await asyncio.sleep(0.1)  # between two looks, however much is doubted

    async def _look(self) -> None:
        """Ask who the masters are, and break the connections to those that were replaced."""
        raise NotImplementedError

    def _moved(self) -> None:
        for subscriber in self._subscribers:
            subscriber.look()
        for told in self._when_moved:
            told()


def break_connections(client: Redis, unless_at: Address | None = None) -> None:
    """End a client's connections at once, those that wait for an answer too; its readers and retries make new ones.

    redis-py's own `disconnect` waits until all is written, which a server that hangs never lets happen.
    """
    pool: Any = client.connection_pool
    for connection in (*pool._available_connections, *pool._in_use_connections):
        if connection._writer is not None and (connection.host, connection.port) != unless_at:
            connection._writer.transport.abort()
