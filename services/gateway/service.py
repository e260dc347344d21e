"""The gateway process: it accepts websockets and HTTP, and drains them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError
from websockets import http11
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from tidewire.app import App
from tidewire.errors import BadRequest, RateLimited, RequestError, Unauthenticated, UnsupportedAction
from tidewire.model.protocol import (
    SUBPROTOCOL,
    Auth,
    decode_frame,
    encode_json,
    parse_request,
    request_id,
)
from tidewire.model.records import JSON, Principal
from tidewire.process.http import serve_http
from tidewire.process.lifecycle import Service

from . import handshake, rechecks
from .connection import Connection
from .core import Core
from .deadline import Deadline
from .http import http_app
from .orders import OrderAction, no_connection
from .origins import Origins
from .peers import Websocket
from .presence import Presence
from .proxies import TrustedProxies

log = structlog.get_logger(__name__)

CONNECTED = Gauge("tidewire_gateway_connections", "Open websockets and streams of events.")
HANDSHAKES = Counter(
    "tidewire_gateway_handshakes_total", "Handshakes by the outcome of their authorization.", ["outcome"]
)
CLOSE_BATCH = 200
"""Connections that a drain closes before other tasks get their turn."""
VERSION = "13"
"""The version of the websocket protocol (RFC 6455, section 4.1)."""
MAX_FIRST_FRAME_BYTES = 4096
"""Maximum size of a frame before the peer has presented a credential."""
MAX_PONGS_BYTES = 1 << 20
"""Bytes that may wait for a peer before the gateway reads no more from it, pings included."""
PEER_HANDSHAKE_S = 5.0
"""Seconds that a peer has for its part of a handshake, on top of the gateway's time for the welcome."""


class Gateway:
    """The connections of one gateway: it admits them, carries out orders about them, and closes them."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.settings = core.settings
        self.presence = Presence(core)
        self.connections: dict[str, Connection] = {}
        self.origins = Origins(self.settings.origins)
        self.proxies = TrustedProxies(self.settings.trusted_proxies)
        self._closing: set[asyncio.Task[None]] = set()
        core.gatekeeper.on_revoked = self._on_revoked
        core.orders.obey = self._obey
        core.registry.on_swept, core.registry.on_doubt = self._on_swept, self._on_registry_back

    # ── websockets ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def process_request(self, ws: ServerConnection, request: Request) -> Response | None:
        """Decide on a handshake before the library accepts it. None accepts it."""
        size_bytes = sum(len(name) + len(value) for name, value in request.headers.raw_items())
        if size_bytes > handshake.MAX_HEADER_BYTES:
            return self._refuse(ws, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, handshake.HEADERS_TOO_LARGE)
        if request.headers.get_all("Sec-WebSocket-Version") not in ([], [VERSION]):
            return _other_version()
        try:
            wanted = handshake.read(request.path, request.headers, self.origins, self.settings.path_prefix)
        except RequestError as error:
            return self._refuse(ws, HTTPStatus(error.status), error.message)
        if self.core.service.stopping.is_set():
            return self._refuse(ws, HTTPStatus.SERVICE_UNAVAILABLE, "this server is shutting down: connect again")
        ws.opening = opening = _Opening(wanted, self.deadline())  # type: ignore[attr-defined]
        if wanted.auth_key is None and self.settings.first_frame_auth_s > 0:
            ws.protocol.max_message_size = MAX_FIRST_FRAME_BYTES
            return None  # the credential comes in the first frame
        return await self._admit(ws, opening)

    async def _admit(self, ws: ServerConnection, opening: _Opening) -> Response | None:
        """Authorize a handshake. A page never sees a status, so it gets a close code after the handshake instead."""
        try:
            if opening.handshake.auth_key is None:
                raise Unauthenticated("a credential is needed in the handshake")
            authorized = self.core.gatekeeper.authorize(opening.handshake.auth_key)
            opening.principal = await opening.deadline.bound(authorized)
        except Unauthenticated as error:
            if not opening.handshake.browser:
                return self._refuse(ws, HTTPStatus.UNAUTHORIZED, error.message)
            opening.refused = (4401, handshake.close_reason(error.message))
        except RequestError as error:
            return self._refuse(ws, HTTPStatus.SERVICE_UNAVAILABLE, error.message)
        return None

    async def handle(self, ws: ServerConnection) -> None:
        """Serve one accepted websocket to its end."""
        opening: _Opening = ws.opening  # type: ignore[attr-defined]
        if opening.refused:
            HANDSHAKES.labels("refused").inc()
            await ws.close(*opening.refused)
            return
        cursor, topics = opening.handshake.cursor, opening.handshake.topics
        principal, deadline = opening.principal, opening.deadline
        if principal is None:
            first = await self._first_frame(ws)
            if first is None:
                HANDSHAKES.labels("refused").inc()
                return
            principal, cursor, topics, deadline = first
        await self.serve(Connection(self.core, Websocket(ws, self._source(ws)), principal, deadline), cursor, topics)

    def deadline(self) -> Deadline:
        """Begin the deadline of a handshake."""
        return Deadline(self.settings.welcome_timeout_s)

    async def serve(self, connection: Connection, cursor: str | None, topics: dict[str, str]) -> None:
        """Serve one authorized connection to its end."""
        HANDSHAKES.labels("accepted").inc()
        self.connections[connection.id] = connection
        CONNECTED.inc()
        connection.subscriptions.on_reset = lambda: self.presence.restore([connection])
        self.presence.connected(connection)
        try:
            await connection.run(cursor, topics)
        finally:
            connection.open = False
            self.connections.pop(connection.id, None)
            CONNECTED.dec()
            self.presence.disconnected(connection)

    async def _first_frame(self, ws: ServerConnection) -> tuple[Principal, str | None, dict[str, str], Deadline] | None:
        """Authorize by the first frame.

        Returns principal, cursor, topics and deadline; None if the socket was closed.
        """
        frame: dict[str, Any] = {}
        try:
            async with asyncio.timeout(self.settings.first_frame_auth_s):
                message = await ws.recv()
            frame = decode_frame(message, binary=ws.subprotocol is not None)
            request = parse_request(frame)
            if not isinstance(request, Auth):
                raise Unauthenticated("the first frame must be auth, with an auth_key")
            deadline = self.deadline()  # from here on, the peer waits for the gateway
            principal = await deadline.bound(self.core.gatekeeper.authorize(request.auth_key))
            ws.protocol.max_message_size = self.settings.limit_frame_bytes or None
            return principal, request.cursor, request.topics, deadline
        except TimeoutError:
            await ws.close(4408, "no credential in time")
        except (BadRequest, UnsupportedAction, Unauthenticated) as error:
            await ws.close(4401, handshake.close_reason(error.message))
        except RequestError as error:
            log.warning("not_authorized", error=error.message, id=request_id(frame))
            await ws.close(1013, "try again later")
        except ConnectionClosed:
            pass
        return None

    def _refuse(self, ws: ServerConnection, status: HTTPStatus, message: str) -> Response:
        HANDSHAKES.labels("refused").inc()
        body = encode_json({"type": "error", "id": None, "code": _CODES.get(status, "bad_request"), "message": message})
        headers = Headers({"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"})
        return Response(status.value, status.phrase, headers, body)

    def _source(self, ws: ServerConnection) -> str:
        forwarded = ws.request.headers.get_all("X-Forwarded-For") if ws.request else []
        return self.proxies.source(ws.remote_address[0] if ws.remote_address else "", forwarded)

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
        task = asyncio.create_task(connection.close(code, reason))
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
        """Ask all peers to reconnect elsewhere, in batches, and delete the items of their connections."""
        everyone_here = list(self.connections.values())
        rounds = max(1, len(everyone_here) // CLOSE_BATCH)
        pause_s = min(0.05, self.settings.drain_seconds / 2 / rounds)
        for start in range(0, len(everyone_here), CLOSE_BATCH):
            for connection in everyone_here[start : start + CLOSE_BATCH]:
                if not connection.full():
                    frame = {"type": "reconnect", "after_ms": random.randint(0, 1000)}
                    connection.write(connection.encode(frame))
                self._close_soon(connection, 1012, "this server is shutting down")
            await asyncio.sleep(pause_s)
        if self._closing:
            await asyncio.wait(self._closing, timeout=min(2.0, self.settings.drain_seconds))
        await asyncio.sleep(0)  # lets the handlers see that their connections are closed
        await self.presence.settle(min(2.0, self.settings.drain_seconds))
        with contextlib.suppress(RedisError, OSError):
            if not self.connections:
                await self.core.registry.leave()

    @contextlib.asynccontextmanager
    async def listening(self, ws_listener: socket.socket, http_listener: socket.socket) -> AsyncIterator[Server]:
        """Accept connections until the block is left."""
        await self.core.gatekeeper.start()
        async with (
            serve(
                self.handle,
                sock=ws_listener,
                process_request=self.process_request,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                # An unknown subprotocol is accepted without one: the frames are then JSON.
                select_subprotocol=_select_subprotocol,
                compression=None,
                max_size=self.settings.limit_frame_bytes or None,
                open_timeout=self.settings.welcome_timeout_s
                + PEER_HANDSHAKE_S,  # our own deadline comes first, and answers
                close_timeout=1,
                server_header=None,
                create_connection=_Connection,
            ) as server,
            serve_http(http_app(self.core, self.serve, self.origins, self.proxies), http_listener),
        ):
            yield server


class _Connection(ServerConnection):
    """Reads nothing more from a peer that takes no answers: the library answers every ping, whatever has queued up."""

    _is_held = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MAX_PONGS_BYTES and not self._is_held:
            self._is_held = True
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._is_held:
            self._is_held = False
            self.transport.resume_reading()


class _Opening:
    """A handshake's state, from its request to the handler of the accepted socket."""

    def __init__(self, request: handshake.Handshake, deadline: Deadline) -> None:
        self.handshake = request
        self.deadline = deadline
        self.principal: Principal | None = None
        self.refused: tuple[int, str] | None = None


_CODES = {
    HTTPStatus.UNAUTHORIZED: "unauthenticated",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "too_large",
}

# The library takes at most 8 KiB per line. It reads this limit from its environment, or from here.
http11.MAX_LINE_LENGTH = handshake.MAX_HEADER_BYTES


def _other_version() -> Response:
    """Refuse a handshake of another version, and name ours (RFC 6455, section 4.4)."""
    body = b"websockets of version 13 are served here\n"
    headers = Headers({"Sec-WebSocket-Version": VERSION, "Content-Length": str(len(body)), "Connection": "close"})
    status = HTTPStatus.UPGRADE_REQUIRED
    return Response(status.value, status.phrase, headers, body)


def _select_subprotocol(_: ServerConnection, offered: Any) -> Subprotocol | None:
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None


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
    if rechecks.is_needed(app):
        service.run(rechecks.Rechecks(core.backend, core.feeds).run)
    service.run(gateway.presence.run)
    service.at_drain(gateway.drain)
    service.tell(
        lambda: {
            "connections": len(gateway.connections),
            "ws_port": service.settings.ws_port,
            "http_port": service.settings.http_port,
        }
    )
    return gateway
