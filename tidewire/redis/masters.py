"""Following the masters of a topology whose masters change."""

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
"""Approximate interval, in seconds, between checks of which servers are masters. It adds to the time of a failover."""
MAX_LOOK_S = 1.0
"""Maximum seconds for a node to answer a check before another one is asked."""


class MasterWatch(Backend):
    """A backend whose masters change. It checks them every second, and at once when one cannot be reached.

    A server that hangs keeps its connections open. Only a check with another server tells that it has been replaced.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._watching: asyncio.Task[None] | None = None
        self._doubted = asyncio.Event()

    async def reach(self) -> None:
        if self._watching is None:
            await self._look()
            self._watching = asyncio.create_task(self._watch(), name="watch_masters")
        await super().reach()

    async def __aexit__(self, *_: object) -> None:
        if self._watching:
            await end([self._watching])
        await super().__aexit__()

    def doubt(self) -> None:
        """Check soon."""
        self._doubted.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._doubted.wait()
            self._doubted.clear()
            with contextlib.suppress(RedisError, OSError):
                await self._look()
            await asyncio.sleep(0.1)  # between two checks, however many callers doubt

    async def _look(self) -> None:
        """Ask for the present masters, and break the connections to replaced ones."""
        raise NotImplementedError

    def _moved(self) -> None:
        for subscriber in self._subscribers:
            subscriber.look()
        for callback in self._when_moved:
            callback()


def break_connections(client: Redis, unless_at: Address | None = None) -> None:
    """Abort a client's connections, even those that wait for an answer. Its readers and retries make new ones.

    redis-py's own `disconnect` waits until everything is written, which never happens with a server that hangs.
    """
    pool: Any = client.connection_pool
    for connection in (*pool._available_connections, *pool._in_use_connections):
        if connection._writer is not None and (connection.host, connection.port) != unless_at:
            connection._writer.transport.abort()
