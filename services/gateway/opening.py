"""The websocket port: it accepts connections, and takes each through its opening handshake."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import cast

import structlog
from websockets.exceptions import ConnectionClosed

from .upgrade import (
    END,
    MAX_HEAD_BYTES,
    Refusal,
    UpgradeRequest,
    accepting_response,
    headers_too_large,
    parse_upgrade,
    wants_msgpack,
)
from .websocket import CLOSE_S, CLOSED, Turns, Websocket

log = structlog.get_logger(__name__)

HEAD_S = 10.0
"""Maximum seconds from a connection to the end of its request."""
BACKLOG = 1024
"""Connections that the kernel accepts before the gateway does."""


class OpeningHandshake(asyncio.Protocol):
    """A connection from its first byte until it is accepted as a websocket, or refused."""

    request: UpgradeRequest
    _transport: asyncio.Transport

    def __init__(self, websockets: Websockets) -> None:
        self._websockets = websockets
        self._loop = websockets.loop
        self._received = bytearray()
        self._is_reading = True
        self._timer: asyncio.TimerHandle | None = None
        self._websocket: Websocket | None = None
        self.serving: asyncio.Task[None] | None = None
        """The task that serves the connection. None before its request has arrived."""

    @property
    def address(self) -> str:
        """The address of the socket's other end; empty if it has none."""
        peer = self._transport.get_extra_info("peername")
        return str(peer[0]) if isinstance(peer, tuple) else ""

    def accept(self, source_ip: str, max_message_bytes: int | None) -> Websocket:
        """Open the websocket. Raises ConnectionClosed if the peer has gone meanwhile."""
        if self._transport.is_closing():
            raise ConnectionClosed(None, None)
        binary = wants_msgpack(self.request)
        agents = ", ".join(self.request.headers.get_all("User-Agent"))
        self._websocket = Websocket(
            self._transport,
            self._websockets.turns,
            binary=binary,
            source_ip=source_ip,
            user_agent=agents.encode("latin-1").decode(errors="replace"),
            max_message_bytes=max_message_bytes,
            max_queued_bytes=self._websockets.max_queued_bytes,
            on_lost=lambda _: self._websockets.discard(self),
        )
        self._transport.write(accepting_response(self.request, binary=binary))
        self._websocket.begin(bytes(self._received), is_reading=self._is_reading)
        self._received = bytearray()
        return self._websocket

    async def close(self, code: int, reason: str) -> None:
        """Close the websocket, or end a connection that has not become one."""
        if self._websocket:
            await self._websocket.close(code, reason)
        else:
            self._transport.abort()

    # ── the transport's events ──────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # that of uvloop is one by its methods alone
        if self._websockets.add(self):
            self._timer = self._loop.call_later(HEAD_S, self._late)
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        searched = max(len(self._received) - len(END) + 1, 0)
        self._received += data
        if self.serving:
            # Frames wait for the decision on the handshake. Until some come, the peer is read from, to notice its end.
            self._pause()
        elif (end := self._received.find(END, searched)) >= 0:
            self._begin(end + len(END))
        elif len(self._received) > MAX_HEAD_BYTES:
            self._refuse(headers_too_large())

    def connection_lost(self, exc: Exception | None) -> None:
        self._websockets.discard(self)
        if self._timer:
            self._timer.cancel()
        if self.serving:
            self.serving.cancel()  # nobody waits for the decision

    # ── the handshake ───────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, end: int) -> None:
        """Have a whole request decided."""
        try:
            self.request = parse_upgrade(bytes(self._received[:end]))
        except Refusal as refusal:
            self._refuse(refusal)
            return
        del self._received[:end]
        if self._received:
            self._pause()
        assert self._timer
        self._timer.cancel()
        self.serving = self._loop.create_task(self._serve(), name="websocket")

    async def _serve(self) -> None:
        """Have the handshake decided, and the websocket served to its end."""
        try:
            await self._websockets.serve(self)
        except Refusal as refusal:
            self._refuse(refusal)
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("websocket_failed")
            await self.close(1011, "internal error")
        else:
            await self.close(1000, "")

    def _refuse(self, refusal: Refusal) -> None:
        self._websockets.refused()
        if self._transport.is_closing():
            return
        self._transport.write(refusal.response())
        self._transport.close()
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(CLOSE_S, self._transport.abort)

    def _pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()

    def _late(self) -> None:
        CLOSED.labels("slow_handshake").inc()
        self._transport.abort()


Handler = Callable[[OpeningHandshake], Awaitable[None]]
"""Decides on a handshake, accepts it, and serves the websocket to its end. Raises Refusal."""


class Websockets:
    """All connections of the websocket port.

    Args:
        serve: serves each connection whose request is sound.
        refused: is called at each handshake that is refused.
        max_connections: maximum connections. Further ones are ended at once.
        max_queued_bytes: as for `Websocket`.
    """

    def __init__(
        self, serve: Handler, *, refused: Callable[[], None], max_connections: int, max_queued_bytes: int = 0
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.turns = Turns()
        self.serve = serve
        self.refused = refused
        self.max_queued_bytes = max_queued_bytes
        self._max_connections = max_connections
        self._accepting: asyncio.Server | None = None
        self._open: set[OpeningHandshake] = set()
        self._is_full = False

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpeningHandshake]:
        return iter(list(self._open))

    def add(self, opening: OpeningHandshake) -> bool:
        """Take a connection. False if there are too many."""
        if len(self._open) >= self._max_connections:
            CLOSED.labels("full").inc()
            if not self._is_full:
                self._is_full = True
                log.error("too_many_sockets", limit=self._max_connections, advice="raise the limit of open files")
            return False
        self._open.add(opening)
        return True

    def discard(self, opening: OpeningHandshake) -> None:
        """Forget a connection that has ended."""
        self._open.discard(opening)
        if len(self._open) < 0.9 * self._max_connections:
            self._is_full = False

    def stop_accepting(self) -> None:
        """Accept no further connections. Other gateways on the same port get them."""
        if self._accepting:
            self._accepting.close()

    @contextlib.asynccontextmanager
    async def listening(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        """Accept connections on a bound socket while the block runs. At its end, close all with 1001."""
        self._accepting = accepting = await self.loop.create_server(
            lambda: OpeningHandshake(self), sock=listener, backlog=BACKLOG, ssl=tls
        )
        try:
            yield
        finally:
            accepting.close()
            served = [opening.serving for opening in self if opening.serving]
            await asyncio.gather(*(opening.close(1001, "") for opening in self))
            await asyncio.gather(*served, return_exceptions=True)
            await accepting.wait_closed()
