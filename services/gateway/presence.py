"""Connections as items of the table `connections`, and the connections of gateways that died."""

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

from .connection import Connection
from .core import Core

log = structlog.get_logger(__name__)

AGAIN_S = 0.5
SWEEP_AGAIN_S = 10.0
RESTORE_BATCH = 100
"""Connections of one partition whose items are put again at once."""
SWEPT_KEPT_MS = 3_600_000
"""How long the registry remembers that a gateway was swept, in ms. One that is paused for longer restores its items."""


class Presence:
    """Writes and removes this gateway's connections through the store, and sweeps those of dead gateways."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tasks: set[asyncio.Task[None]] = set()
        self._items: dict[Connection, dict[str, Any]] = {}
        self._unsure: dict[int, dict[Connection, None]] = {}  # by partition, in order; its items are put again
        self._swept: dict[str, float] = {}  # dead gateway: when to look again

    def connected(self, connection: Connection) -> None:
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
        self._items.pop(connection, None)
        key = {"user": connection.principal.user, "connection": connection.id}
        self._begin(self._write(connection, "delete", {"table": CONNECTIONS, "key": key}))

    def restore(self, connections: Iterable[Connection]) -> None:
        """Put the items of open connections again, as Redis may have lost them. It changes nothing where it has not."""
        for connection in connections:
            partition = self._core.backend.keys.partition_of(connection.principal.user)
            if partition not in self._unsure:
                self._unsure[partition] = {}
                self._begin(self._restore(partition))
            self._unsure[partition][connection] = None

    async def settle(self, timeout_s: float) -> None:
        """Wait for what is on its way; what is not stored by then is left to be swept."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work, name="presence")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, connection: Connection, action: str, body: dict[str, Any]) -> None:
        """Until it is stored. Requests of one partition keep their order, so that a removal comes after its put."""
        while action == "delete" or connection.open:
            try:
                await self._core.command(action, body, connection.principal.user, user=connection.principal.user)
                return
            except NotFound:
                return  # swept already
            except RequestError as error:
                log.warning("connection_not_stored", connection=connection.id, action=action, error=error.message)
                await asyncio.sleep(AGAIN_S)

    async def _restore(self, partition: int) -> None:
        """A batch at a time, so that others' requests to the partition get their turn. Partitions do not wait."""
        unsure, count = self._unsure[partition], 0
        try:
            while batch := list(islice(unsure, RESTORE_BATCH)):
                for connection in batch:
                    del unsure[connection]
                items = [(connection, self._items[connection]) for connection in batch if connection in self._items]
                await asyncio.gather(
                    *(self._write(one, "put", {"table": CONNECTIONS, "item": item}) for one, item in items)
                )
                count += len(items)
        finally:
            del self._unsure[partition]
        log.info("connections_restored", partition=partition, count=count)

    # ── sweeping ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Sweep until cancelled. The first of the live gateways does it; when it dies, another is the first."""
        registry = self._core.registry
        while True:
            await asyncio.sleep(self._core.settings.lease_ms / 6000)
            if registry.live("gateway")[:1] != [registry.id]:
                continue
            for gateway in registry.dead("gateway"):
                if self._swept.get(gateway.id, 0) < time.monotonic():
                    try:
                        await self._sweep(gateway)
                    except (RequestError, RedisError, OSError) as error:
                        log.warning("sweep_failed", gateway=gateway.id, error=str(error))

    async def _sweep(self, dead: Registration) -> None:
        """By state, again and again: what the dead gateway had on its way may still arrive after a first sweep."""
        keys, functions = self._core.backend.keys, self._core.backend.functions
        # From here on it is dead, whatever it says: a gateway that comes back finds the mark and takes another id.
        if not await functions.service_sweep(keys.services(), keys.swept(), dead.id, SWEPT_KEPT_MS):
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
            found = int(await self._core.command("sweep", {"gateway": gateway}, partition=partition))
            removed += found
            if not found:
                return removed
