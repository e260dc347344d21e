"""The table `connections`: this gateway's connections as items, and the removal of those of dead gateways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

import structlog
from redis.exceptions import RedisError

from tidewire.app import CONNECTIONS
from tidewire.errors import NotFound, RequestError
from tidewire.process.registry import FORGET_AFTER_MS, Registration
from tidewire.redis.keys import ServiceKind

from .connection import Connection
from .core import Core

log = structlog.get_logger(__name__)

RETRY_S = 0.5
SWEEP_AGAIN_S = 10.0
"""Seconds between two sweeps of a dead gateway: one of its writes may still have been in flight."""
RESTORE_BATCH = 100
"""Connections of one partition whose items are restored at a time."""
SWEPT_FOR_MS = 3_600_000
"""How long, in ms, the registry remembers that a gateway was swept.

One that is paused for longer restores its items.
"""


class Presence:
    """Writes this gateway's connections through the store, and sweeps those of dead gateways."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tasks: set[asyncio.Task[None]] = set()
        self._items: dict[Connection, dict[str, Any]] = {}
        self._to_restore: dict[int, dict[Connection, None]] = {}  # by partition, in order
        self._swept: dict[str, float] = {}  # dead gateway: when to look again

    def connected(self, connection: Connection) -> None:
        """Write the item of a new connection, in the background."""
        self._items[connection] = item = {
            "user": connection.principal.user,
            "connection": connection.id,
            "gateway": connection.id.rpartition("-")[0],
            "connected_at": connection.connected_at,
            "source_ip": connection.peer.source_ip,
            "user_agent": connection.peer.user_agent[:512],
            "claims": connection.principal.claims,
        }
        self._begin(self._write(connection, "put", {"table": CONNECTIONS, "item": item}))

    def disconnected(self, connection: Connection) -> None:
        """Delete the item of a closed connection, in the background."""
        self._items.pop(connection, None)
        key = {"user": connection.principal.user, "connection": connection.id}
        self._begin(self._write(connection, "delete", {"table": CONNECTIONS, "key": key}))

    def restore(self, connections: Iterable[Connection]) -> None:
        """Write the items of open connections again, because Redis may have lost them.

        An equal item makes no change.
        """
        for connection in connections:
            partition = self._partition_of(connection)
            if partition not in self._to_restore:
                self._to_restore[partition] = {}
                self._begin(self._restore(partition))
            self._to_restore[partition][connection] = None

    async def settle(self, timeout_s: float) -> None:
        """Wait for writes under way. Items that are not deleted by then are left to a sweep."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _partition_of(self, connection: Connection) -> int:
        return self._core.backend.keys.partition_of(connection.principal.user)

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work, name="presence")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, connection: Connection, action: str, body: dict[str, Any]) -> None:
        """Retry until it is stored. Requests to one partition keep their order, so a delete comes after its put."""
        while action == "delete" or connection.open:
            try:
                await self._core.command(self._partition_of(connection), action, body, connection.principal.user)
                return
            except NotFound:
                return  # a sweep has deleted it
            except RequestError as error:
                log.warning("connection_not_stored", connection=connection.id, action=action, error=error.message)
                await asyncio.sleep(RETRY_S)

    async def _restore(self, partition: int) -> None:
        """Restore the items of a partition in batches, so that other requests get their turn between them."""
        waiting, count = self._to_restore[partition], 0
        try:
            while batch := list(islice(waiting, RESTORE_BATCH)):
                for connection in batch:
                    del waiting[connection]
                items = [(connection, self._items[connection]) for connection in batch if connection in self._items]
                await asyncio.gather(
                    *(self._write(one, "put", {"table": CONNECTIONS, "item": item}) for one, item in items)
                )
                count += len(items)
        finally:
            del self._to_restore[partition]
        log.info("connections_restored", partition=partition, count=count)

    # ── sweeping ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Sweep until cancelled. The live gateway with the lowest id does it. If it dies, the next one does."""
        registry = self._core.registry
        while True:
            await asyncio.sleep(self._core.settings.lease_ms / 6000)
            if registry.live(ServiceKind.GATEWAY)[:1] != [registry.id]:
                continue
            for gateway in registry.dead(ServiceKind.GATEWAY):
                if self._swept.get(gateway.id, 0) < time.monotonic():
                    try:
                        await self._sweep(gateway)
                    except (RequestError, RedisError, OSError) as error:
                        log.warning("sweep_failed", gateway=gateway.id, error=str(error))

    async def _sweep(self, dead: Registration) -> None:
        """Delete the items of a dead gateway, repeatedly: one of its writes may still arrive after the first sweep."""
        keys, functions = self._core.backend.keys, self._core.backend.functions
        # The mark makes the death final: a gateway that wakes up finds it with its next heartbeat, and takes another
        # id.
        if not await functions.service_sweep(keys.services(), keys.swept(), dead.id, SWEPT_FOR_MS):
            return
        removed = sum(
            await asyncio.gather(*(self._sweep_partition(dead.id, number) for number in range(keys.partitions)))
        )
        if removed:
            log.info("connections_swept", gateway=dead.id, count=removed)
        elif dead.silent_ms > FORGET_AFTER_MS:
            await functions.service_forget(keys.services(), dead.id)
            self._swept.pop(dead.id, None)
            return
        self._swept[dead.id] = time.monotonic() + SWEEP_AGAIN_S

    async def _sweep_partition(self, gateway: str, partition: int) -> int:
        removed = 0
        while True:
            found = int(await self._core.command(partition, "sweep", {"gateway": gateway}))
            removed += found
            if not found:
                return removed
