"""The gateway process: it accepts websockets and HTTP, and drains them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import structlog
from prometheus_client import Gauge
from redis.exceptions import RedisError

from tidewire.app import App
from tidewire.errors import RateLimited
from tidewire.model.records import JSON
from tidewire.process.http import max_connections, serve_http
from tidewire.process.lifecycle import Service
from tidewire.process.tls import certificate

from . import rechecks
from .connection import Connection
from .core import Core
from .http import http_app
from .opening import Websockets
from .orders import OrderAction, no_connection
from .presence import Presence
from .reception import HANDSHAKES, Reception
from .websocket import CLOSE_S

log = structlog.get_logger(__name__)

CONNECTED = Gauge("tidewire_gateway_connections", "Open websockets and streams of events.")
LEAVING_PER_S = 500.0
"""Connections that a drain asks to leave each second, if they are not so many that it needs more."""
LEAVING_PART = 0.7
"""Part of the drain in which all connections are asked to leave."""
LEAVING_BATCH = 25
"""Connections that are asked to leave at once."""
RECONNECT_WITHIN_MS = 1000
"""Maximum ms that a peer is asked to wait before it reconnects."""
ANSWERING_S = 5.0
"""Maximum seconds that a connection stays open for the answers to its requests. At most a fourth of the drain."""
WEBSOCKETS_SHARE = 2
"""Websockets take at most this part of the process's file descriptors."""


class Gateway:
    """The connections of one gateway: it admits them, carries out orders about them, and closes them."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.settings = core.settings
        self.presence = Presence(core)
        self.connections: dict[str, Connection] = {}
        self.reception = Reception(core, self.serve)
        self.certificate = certificate(self.settings.tls_cert, self.settings.tls_key)
        self._websockets: Websockets | None = None
        self._closing: set[asyncio.Task[None]] = set()
        core.gatekeeper.on_revoked = self._on_revoked
        core.orders.obey = self._obey
        core.registry.on_swept, core.registry.on_doubt = self._on_swept, self._on_registry_back

    # ── connections ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def serve(self, connection: Connection, cursor: str | None, topics: dict[str, str]) -> None:
        """Serve one authorized connection to its end."""
        HANDSHAKES.labels("accepted").inc()
        self.connections[connection.id] = connection
        CONNECTED.inc()
        age_s = self.settings.max_connection_s * random.uniform(0.9, 1.1)
        ageing = asyncio.get_running_loop().call_later(age_s, self._end_of_age, connection) if age_s else None
        connection.subscriptions.on_reset = lambda: self.presence.restore([connection])
        self.presence.connected(connection)
        try:
            await connection.run(cursor, topics)
        finally:
            connection.open = False
            if ageing:
                ageing.cancel()
            self.connections.pop(connection.id, None)
            CONNECTED.dec()
            self.presence.disconnected(connection)

    # ── orders ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _obey(self, action: OrderAction, fields: dict[str, Any]) -> JSON:
        """Carry out an order. Raises RequestError."""
        if action == OrderAction.DISCONNECT:
            return self._disconnect(set(fields["connections"]), set(fields["users"]))
        connection = self.connections.get(fields["connection"])
        if connection is None or not (connection.open and connection.welcomed):
            raise no_connection(fields["connection"])
        if action == OrderAction.DESCRIBE:
            return connection.description()
        if connection.full():
            raise RateLimited("the peer of this connection reads too slowly: try again", retry_after_ms=1000)
        if action == OrderAction.POST:
            connection.peer.write_raw(fields["data"])
        else:
            connection.write(connection.encode(fields["frame"]))
        return {}

    def _disconnect(self, ids: set[str], users: set[str]) -> int:
        """Close connections by id and by user, and return how many were open."""
        found = [
            connection
            for connection in self.connections.values()
            if connection.open and (connection.id in ids or connection.principal.user in users)
        ]
        for connection in found:
            self._close_soon(connection, 4403, "disconnected by an administrator")
        return len(found)

    # ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_revoked(self, credential: str) -> None:
        for connection in list(self.connections.values()):
            if connection.principal.credential == credential:
                self._close_soon(connection, 4401, "the auth_key has been revoked")

    def _close_soon(self, connection: Connection, code: int, reason: str) -> None:
        self._spawn(connection.close(code, reason))

    def _spawn(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _on_swept(self) -> None:
        """Close all connections: another gateway considered this one dead, and deleted their items."""
        registry = self.core.registry
        log.warning("gateway_swept", gateway=registry.id, connections=len(self.connections))
        registry.become_new()
        for connection in list(self.connections.values()):
            self._close_soon(connection, 1012, "this gateway was paused")

    def _on_registry_back(self) -> None:
        """Restore the items of all connections: Redis stalled or failed over, and may have lost them."""
        log.warning("registry_was_away", gateway=self.core.registry.id, connections=len(self.connections))
        self.presence.restore(self.connections.values())

    async def drain(self) -> None:
        """Accept no more websockets, and ask all peers to reconnect elsewhere, a few at a time."""
        if self._websockets:
            self._websockets.stop_accepting()
        drain_s = self.settings.drain_seconds
        asked: set[Connection] = set()
        while rest := [connection for connection in self.connections.values() if connection not in asked]:
            asked.update(rest)
            random.shuffle(rest)
            pause_s = LEAVING_BATCH * min(1 / LEAVING_PER_S, LEAVING_PART * drain_s / len(rest))
            for start in range(0, len(rest), LEAVING_BATCH):
                for connection in rest[start : start + LEAVING_BATCH]:
                    self._spawn(self._leave(connection, "this server is shutting down"))
                await asyncio.sleep(pause_s)
        if self._closing:
            await asyncio.wait(self._closing, timeout=min(ANSWERING_S + CLOSE_S, drain_s))
        await asyncio.sleep(0)  # lets the handlers see that their connections are closed
        await self.presence.settle(min(2.0, drain_s))
        with contextlib.suppress(RedisError, OSError):
            if not self.connections:
                await self.core.registry.leave()

    async def _leave(self, connection: Connection, why: str) -> None:
        """Ask a peer to reconnect elsewhere, and close its connection once its requests are answered."""
        if not connection.full():
            connection.write(
                connection.encode({"type": "reconnect", "after_ms": random.randint(0, RECONNECT_WITHIN_MS)})
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(ANSWERING_S, self.settings.drain_seconds / 4)):
                await connection.answered.wait()
        await connection.close(1012, why)

    def _end_of_age(self, connection: Connection) -> None:
        self._spawn(self._leave(connection, "this connection has reached its maximum age"))

    @contextlib.asynccontextmanager
    async def listening(self, ws_listener: socket.socket, http_listener: socket.socket) -> AsyncIterator[None]:
        """Accept connections until the block is left."""
        await self.core.gatekeeper.start()
        websockets = Websockets(
            self.reception.open,
            refused=self.reception.refused,
            max_connections=max_connections(WEBSOCKETS_SHARE),
            max_queued_bytes=self.settings.limit_queued_bytes,
        )
        self._websockets = websockets
        tls = self.certificate.context if self.certificate else None
        try:
            async with (
                websockets.listening(ws_listener, tls),
                serve_http(http_app(self.core, self.serve, self.reception), http_listener, tls),
            ):
                yield
        finally:
            await self.core.connection_quota.close()


def build(service: Service, app: App) -> Gateway:
    """Wire the gateway into a service process."""
    core = Core(service, app)
    gateway = Gateway(core)
    service.run(core.bus.send)
    service.run(core.bus.receive)
    service.run(core.gatekeeper.run)
    service.run(core.orders.receive)
    service.run(core.feeds.receive)
    service.run(core.feeds.check)
    service.run(core.request_quota.run)
    if rechecks.is_needed(app):
        service.run(rechecks.Rechecks(core.backend, core.feeds).run)
    service.run(gateway.presence.run)
    if gateway.certificate:
        service.run(gateway.certificate.run)
    service.at_drain(gateway.drain)
    service.tell(
        lambda: {
            "connections": len(gateway.connections),
            "ws_port": service.settings.ws_port,
            "http_port": service.settings.http_port,
        }
    )
    return gateway
