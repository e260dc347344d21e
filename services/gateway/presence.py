"""Connections as items of the table `connections`, and the connections of gateways that died."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog
from redis.exceptions import RedisError

from tidewire.app import CONNECTIONS
from tidewire.errors import NotFound, RequestError
from tidewire.registry import FORGET_AFTER_MS, Service

from .connection import Connection
from .core import Core

log = structlog.get_logger(__name__)

AGAIN_S = 0.5
SWEEP_AGAIN_S = 10.0


class Presence:
    """Writes and removes this gateway's connections through the store, and sweeps those of dead gateways."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tasks: set[asyncio.Task[None]] = set()
        self._swept: dict[str, float] = {}  # dead gateway: when to look again

    def connected(self, connection: Connection) -> None:
        item = {
            "user": connection.principal.user,
            "connection": connection.id,
            "gateway": connection.id.rpartition("-")[0],
            "connected_at": connection.connected_at,
            "source_ip": connection.peer.source_ip,
            "user_agent": connection.peer.user_agent[:512],
            "claims": connection.principal.claims,
        }
        self._begin(connection, "put", {"table": CONNECTIONS, "item": item})

    def disconnected(self, connection: Connection) -> None:
        key = {"user": connection.principal.user, "connection": connection.id}
        self._begin(connection, "delete", {"table": CONNECTIONS, "key": key})

    async def settle(self, timeout_s: float) -> None:
        """Wait for what is on its way; what is not stored by then is left to be swept."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _begin(self, connection: Connection, action: str, body: dict[str, Any]) -> None:
        task = asyncio.create_task(self._write(connection, action, body), name="presence")
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

    # ── sweeping ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Sweep until cancelled. One gateway does it; when it dies, another is the first."""
        while True:
            await asyncio.sleep(self._core.settings.lease_ms / 3000)
            registry = self._core.registry
            if registry.live("gateway")[:1] != [registry.id]:
                continue
            for service in list(registry.services.values()):
                if (
                    service.kind == "gateway"
                    and not service.alive
                    and self._swept.get(service.id, 0) < time.monotonic()
                ):
                    try:
                        await self._sweep(service)
                    except (RequestError, RedisError, OSError) as error:
                        log.warning("sweep_failed", gateway=service.id, error=str(error))

    async def _sweep(self, dead: Service) -> None:
        """By state, again and again: what the dead gateway had on its way may still arrive after a first sweep."""
        partitions = range(self._core.backend.keys.partitions)
        removed = sum(await asyncio.gather(*(self._sweep_partition(dead.id, partition) for partition in partitions)))
        if removed:
            log.info("connections_swept", gateway=dead.id, count=removed)
        elif dead.silent_ms > FORGET_AFTER_MS:
            await self._core.registry.forget(dead.id)
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
