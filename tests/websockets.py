"""Raw frames of websockets (RFC 6455), for tests of what no client library would send."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

from tidewire.services.gateway.opening import Handler, OpeningHandshake, Websockets

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
WAIT_S = 15.0
MAX_BYTES = 1 << 20

HANDSHAKE = (
    b"GET /v1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The answer to the key above (RFC 6455, section 1.3)."""


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """A frame of a client."""
    size = len(payload)
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = masked << 7
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([bit | 127]) + size.to_bytes(8, "big")
    if not masked:
        return head + payload
    mask = os.urandom(4)
    repeated = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")


def close(code: int | None = None, reason: bytes = b"") -> bytes:
    return frame(CLOSE, (b"" if code is None else code.to_bytes(2, "big")) + reason)


class Received(NamedTuple):
    """A frame of the server."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int | None:
        assert self.opcode == CLOSE
        return int.from_bytes(self.payload[:2], "big") if self.payload else None


class RawClient:
    """A socket after the opening handshake."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *frames: bytes, chop: int | None = None) -> None:
        """Send frames; with `chop`, in pieces of so many bytes."""
        data = b"".join(frames)
        for at in range(0, len(data), chop or max(len(data), 1)):
            self.writer.write(data[at : at + (chop or len(data))])

    async def next(self) -> Received:
        """Return the next frame, which must be whole, and neither masked nor reserved."""
        async with asyncio.timeout(WAIT_S):
            first, size = await self.reader.readexactly(2)
            assert first & 0xF0 == 0x80, "FIN, and no reserved bit"
            assert size < 128, "a server does not mask"
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2), "big")
            elif size == 127:
                size = int.from_bytes(await self.reader.readexactly(8), "big")
            return Received(first & 0x0F, await self.reader.readexactly(size))

    async def all(self) -> list[Received]:
        """Return all frames until the server ends the connection."""
        found = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                found.append(await self.next())
        return found


async def echo(opening: OpeningHandshake) -> None:
    """Send each message back, as text or binary."""
    websocket = opening.accept("127.0.0.1", MAX_BYTES)
    while True:
        message = await websocket.recv()
        websocket.binary = isinstance(message, bytes)
        await websocket.send(message if isinstance(message, bytes) else message.encode())


class Listening:
    """A server of websockets on a port of this machine."""

    def __init__(self, websockets: Websockets, port: int) -> None:
        self.websockets, self.port = websockets, port

    async def raw(self) -> RawClient:
        """Return a socket before its handshake."""
        return RawClient(*await asyncio.open_connection("127.0.0.1", self.port))

    async def client(self) -> RawClient:
        """Return a socket after its handshake."""
        client = await self.raw()
        client.writer.write(HANDSHAKE)
        async with asyncio.timeout(WAIT_S):
            answer = await client.reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        assert ACCEPT in answer
        return client

    async def exchange(self, frames: Iterable[bytes], *, chop: int | None = None) -> list[Received]:
        """Send frames, and return what comes back until the server ends the connection."""
        client = await self.client()
        client.send(*frames, chop=chop)
        try:
            return await client.all()
        finally:
            client.writer.close()


@contextlib.asynccontextmanager
async def listening(serve: Handler = echo, *, max_connections: int = 1000) -> AsyncIterator[Listening]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    websockets = Websockets(serve, refused=lambda: None, max_connections=max_connections)
    async with websockets.listening(listener):
        yield Listening(websockets, listener.getsockname()[1])
