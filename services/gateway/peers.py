"""The peer of a connection: a websocket, or a reader of server-sent events, which only receives."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from tidewire.errors import BadRequest

from .frames import Gathered, data_frame

Take = Callable[[str | bytes], Awaitable[None]]
Mark = tuple[str | None, str]
"""The cursor that a frame moves its peer to: (topic, cursor), with None for the user's own feed."""

COMMENT_S = 15.0
"""Seconds of silence after which an event stream sends a comment, because proxies end silent connections."""
RETRY_MS = 1000
"""Milliseconds after which a browser reconnects an event stream."""


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
        self.binary = ws.subprotocol is not None
        self.source_ip = source_ip
        self.user_agent = ws.request.headers.get("User-Agent", "") if ws.request else ""

    def is_open(self) -> bool:
        return self._ws.state is State.OPEN

    def queued_bytes(self) -> int:
        return self._ws.transport.get_write_buffer_size()

    def write(self, data: bytes, *marks: Mark) -> None:
        self._write(data_frame(data, binary=self.binary))

    def write_gathered(self, gathered: Gathered) -> None:
        self._write(gathered.wire(binary=self.binary))

    def _write(self, wire: bytes) -> None:
        """Write whole frames, unless a close frame has been sent or the transport is closing."""
        ws = self._ws
        if ws.state is State.OPEN and not ws.transport.is_closing():
            ws.transport.write(wire)

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


class EventStream:
    """A stream of server-sent events (HTML Living Standard, section 9.2). The id of an event holds all cursors."""

    binary = False

    def __init__(self, source_ip: str, user_agent: str, limit_bytes: int) -> None:
        self.source_ip = source_ip
        self.user_agent = user_agent
        self._cursors: dict[str | None, str] = {}
        self._limit_bytes = limit_bytes
        self._events: deque[bytes] = deque([b"retry: %d\n\n" % RETRY_MS])
        self._queued_bytes = 0
        self._closed = False
        self._moved = asyncio.Event()  # set when an event is queued or taken, and when the stream is closed

    def is_open(self) -> bool:
        return not self._closed

    def queued_bytes(self) -> int:
        return self._queued_bytes

    def write(self, data: bytes, *marks: Mark) -> None:
        self._cursors.update(marks)
        self._queue(b"id: %s\ndata: %s\n\n" % (event_id(self._cursors), data))

    def write_gathered(self, gathered: Gathered) -> None:
        for frame in gathered.frames:
            self.write(frame.json, frame.mark)

    def write_raw(self, data: bytes) -> None:
        lines = data.decode(errors="replace").splitlines() or [""]
        self._queue("".join(f"data: {line}\n" for line in lines).encode() + b"\n")

    async def send(self, data: bytes, *marks: Mark) -> None:
        while not self._closed and self._queued_bytes > self._limit_bytes:
            await self._wait()
        if self._closed:
            raise ConnectionClosed(None, None)
        self.write(data, *marks)

    async def close(self, code: int, reason: str) -> None:
        self.end()

    def end(self) -> None:
        """Send no more than what is queued."""
        self._closed = True
        self._moved.set()

    async def receive(self, take: Take) -> None:
        while not self._closed:  # it sends nothing
            await self._wait()

    async def events(self) -> AsyncIterator[bytes]:
        """The body of the response, until the stream is closed."""
        while True:
            while self._events:
                event = self._events.popleft()
                self._queued_bytes -= len(event)
                self._moved.set()
                yield event
            if self._closed:
                return
            try:
                async with asyncio.timeout(COMMENT_S):
                    await self._wait()
            except TimeoutError:
                self._queue(b":\n\n")

    def _queue(self, event: bytes) -> None:
        self._events.append(event)
        self._queued_bytes += len(event)
        self._moved.set()

    async def _wait(self) -> None:
        # Nothing is awaited between the caller's check and this, so no move is missed.
        self._moved.clear()
        await self._moved.wait()


class _Id(msgspec.Struct):
    cursor: str | None = None
    topics: dict[str, str] = {}


def event_id(cursors: Mapping[str | None, str]) -> bytes:
    """Encode the cursors of a connection as one line of ASCII."""
    topics = {topic: cursor for topic, cursor in cursors.items() if topic is not None}
    return json.dumps({"cursor": cursors.get(None), "topics": topics}, separators=(",", ":")).encode()


def read_event_id(text: str) -> tuple[str | None, dict[str, str]]:
    """Decode the cursor of the feed and those of the topics. Raises BadRequest."""
    if not text:
        return None, {}
    try:
        id_ = msgspec.json.decode(text, type=_Id)
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise BadRequest("Last-Event-ID: the id of an event of this stream is needed, as it came") from None
    return id_.cursor, id_.topics
