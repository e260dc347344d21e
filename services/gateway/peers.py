"""The peer of a connection: a websocket here, or a reader of server-sent events (`event_stream`)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from .frames import Gathered, data_frame

Take = Callable[[str | bytes], Awaitable[None]]
Mark = tuple[str | None, str]
"""The cursor that a frame moves its peer to: (topic, cursor), with None for the user's own feed."""


class Peer(Protocol):
    """What a connection needs of its peer."""

    binary: bool
    source_ip: str
    user_agent: str

    def is_open(self) -> bool:
        """Whether frames can still be sent to the peer."""

    def queued_bytes(self) -> int:
        """Bytes that were written and that the socket has not taken."""

    def write(self, data: bytes, *marks: Mark) -> None:
        """Queue a frame without waiting."""

    def write_gathered(self, gathered: Gathered) -> None:
        """Queue all of these frames without waiting."""

    def write_raw(self, data: bytes) -> None:
        """Queue data of an administrator as a frame of its own, without waiting: text if it is UTF-8."""

    async def send(self, data: bytes, *marks: Mark) -> None:
        """Queue a frame, waiting while the peer is slow. Raises ConnectionClosed."""

    async def close(self, code: int, reason: str) -> None:
        """Close with a websocket close code."""

    async def receive(self, take: Take) -> None:
        """Pass each frame that the peer sends to `take`, until the connection is closed."""


class Websocket:
    """A websocket (RFC 6455), served by the websockets library."""

    def __init__(self, ws: ServerConnection, source_ip: str) -> None:
        self._ws = ws
        self._protocol = ws.protocol
        self._transport = ws.transport
        self.binary = ws.subprotocol is not None
        self.source_ip = source_ip
        self.user_agent = ws.request.headers.get("User-Agent", "") if ws.request else ""

    def is_open(self) -> bool:
        return self._ws.state is State.OPEN

    def queued_bytes(self) -> int:
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes, *marks: Mark) -> None:
        self._write(data_frame(data, binary=self.binary))

    def write_gathered(self, gathered: Gathered) -> None:
        self._write(gathered.buffer(binary=self.binary))

    def _write(self, frames: bytes) -> None:
        """Write whole frames, unless a close frame has been sent or the transport is closing."""
        if self._protocol.state is State.OPEN and not self._transport.is_closing():
            self._transport.write(frames)

    def write_raw(self, data: bytes) -> None:
        try:
            data.decode()
        except UnicodeDecodeError:
            self._write(data_frame(data, binary=True))
        else:
            self._write(data_frame(data, binary=False))

    async def send(self, data: bytes, *marks: Mark) -> None:
        await self._ws.send(data, text=not self.binary)

    async def close(self, code: int, reason: str) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self._ws.close(code, reason)

    async def receive(self, take: Take) -> None:
        async for message in self._ws:
            await take(message)
