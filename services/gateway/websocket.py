"""A websocket (RFC 6455) on a transport of the event loop. This module owns all reading and writing of its frames.

The sans-I/O protocol of the websockets library reads frames, answers pings, and does the closing handshake. Our own
frames are written to the transport beside it. This is safe: each is written whole, and none here is a fragment, so none
gets within another message (section 5.4). `_write` looks at the state of the protocol first, so none follows a close
frame (section 5.5.1).

What a peer sends is parsed in slices, between which other connections get their turn. The gateway reads nothing more
while messages wait to be handled, or while the peer does not take its answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import structlog
from prometheus_client import Counter
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, Protocol, State

from .frames import Gathered, data_frame
from .peers import Mark, Take
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

log = structlog.get_logger(__name__)

HEAD_S = 10.0
"""Maximum seconds from a connection to the end of its request."""
PING_S = 20.0
"""Seconds between two pings. A peer that has sent nothing from one to the next is closed."""
UNREAD_S = 60.0
"""Seconds after which a peer that takes nothing of what is queued for it is closed."""
CLOSE_S = 1.0
"""Seconds that a peer has to answer a close frame."""
PARSE_S = 0.002
"""Seconds of parsing, for all connections that have sent much, after which other work gets its turn."""
PARSE_BYTES = 2048
"""Bytes of a connection that are parsed at once. The rest waits for its next turn."""
MAX_MESSAGES = 16
"""Messages of a peer that wait to be handled. At this number nothing more is read from it."""
MAX_PONGS = 16
"""Pings of a peer that are answered at once. Of more, only the last ones are answered (RFC 6455, section 5.5.3)."""
MAX_QUEUED_BYTES = 1 << 20
"""Queued bytes above which nothing more is read from a peer, if no setting bounds them."""
WRITE_HIGH_BYTES = 65_536
"""Queued bytes above which `send` waits."""

CLOSED = Counter("tidewire_gateway_closed_total", "Websockets that the gateway closed, by reason.", ["reason"])


DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)


class _Frames(Protocol):
    """The library's protocol, as it is after the opening handshake."""

    def __init__(self, max_message_bytes: int | None) -> None:
        super().__init__(SERVER, state=State.OPEN, max_size=max_message_bytes)

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None  # it may come amid the fragments of a message, which then never ends
        super().recv_frame(frame)


class Websocket(asyncio.Protocol):
    """One websocket, from its first byte to its end. It is a `Peer`."""

    def __init__(self, server: Websockets) -> None:
        self._server = server
        self._loop = server.loop
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._head = bytearray()
        self._protocol: _Frames | None = None
        """None until the websocket is accepted."""
        self._serving: asyncio.Task[None] | None = None
        self._input: deque[memoryview] = deque()
        self._waits_for_turn = False
        self._is_reading = True
        self._fragments: list[bytes | bytearray | memoryview] = []
        self._is_text = False
        self._messages: deque[str | bytes] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self._must_drain = False
        self._drained: list[asyncio.Future[None]] = []
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._has_heard = True
        self._written_bytes = self._taken_bytes = 0
        self._taken_at = 0.0
        self.request: UpgradeRequest = None  # type: ignore[assignment]
        self.binary = False
        self.source_ip = ""
        self.user_agent = ""

    # ── what a connection needs ─────────────────────────────────────────────────────────────────────────────────────

    def is_open(self) -> bool:
        return self._protocol is not None and self._protocol.state is State.OPEN

    def queued_bytes(self) -> int:
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes, *marks: Mark) -> None:
        self._write(data_frame(data, binary=self.binary))

    def write_gathered(self, gathered: Gathered) -> None:
        self._write(gathered.buffer(binary=self.binary))

    def write_raw(self, data: bytes) -> None:
        try:
            data.decode()
        except UnicodeDecodeError:
            self._write(data_frame(data, binary=True))
        else:
            self._write(data_frame(data, binary=False))

    async def send(self, data: bytes, *marks: Mark) -> None:
        if not self.is_open():
            raise ConnectionClosed(None, None)
        self.write(data)
        while self._must_drain and self.is_open():
            drained = self._loop.create_future()
            self._drained.append(drained)
            await drained

    async def recv(self) -> str | bytes:
        """Return the next message: text or bytes. Raises ConnectionClosed."""
        while not self._messages:
            if not self.is_open():
                raise ConnectionClosed(None, None)
            self._arrived = self._loop.create_future()
            await self._arrived
        message = self._messages.popleft()
        self._read_or_not()
        return message

    async def receive(self, take: Take) -> None:
        while True:
            try:
                message = await self.recv()
            except ConnectionClosed:
                return
            await take(message)

    async def close(self, code: int, reason: str) -> None:
        """Begin to close, if it has not begun, and wait for the end. What the peer does not take in time is lost."""
        if self._protocol is None:
            self._transport.abort()
        elif self._protocol.state is State.OPEN:
            self._protocol.send_close(code, reason)
            self._flush()
        await asyncio.wait([self._lost])

    def limit_messages(self, max_bytes: int | None) -> None:
        """Bound the size of the messages that follow. A larger one ends the connection with 1009."""
        assert self._protocol
        self._protocol.max_message_size = max_bytes

    # ── the transport's events ──────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        if not self._server.add(self):
            transport.abort()
            return
        self._timer = self._loop.call_later(HEAD_S, self._late)

    def data_received(self, data: bytes) -> None:
        self._has_heard = True
        self._input.append(memoryview(data))
        if not self._waits_for_turn:
            self.parse()

    def eof_received(self) -> None:
        """The peer has sent its last byte. The transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.discard(self)
        if self._timer:
            self._timer.cancel()
        self._input.clear()
        if self._protocol is not None:
            self._protocol.receive_eof()
        elif self._serving:
            self._serving.cancel()  # nobody waits for the decision on its handshake
        self._lost.set_result(None)
        self._wake()

    def pause_writing(self) -> None:
        self._must_drain = True

    def resume_writing(self) -> None:
        self._must_drain = False
        self._wake_writers()
        self._read_or_not()

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def parse(self) -> None:
        """Parse some of what has arrived."""
        self._waits_for_turn = False
        if self._input and not self._transport.is_closing():
            if self._protocol is not None:
                self._parse_frames(self._protocol)
            elif not self._serving:
                self._parse_head(self._input.popleft())
        self._read_or_not()

    def _parse_frames(self, protocol: _Frames) -> None:
        data = self._input.popleft()
        if len(data) > PARSE_BYTES:
            self._input.appendleft(data[PARSE_BYTES:])
            data = data[:PARSE_BYTES]
        was_open = protocol.state is State.OPEN
        protocol.receive_data(bytes(data))
        for event in protocol.events_received():
            assert isinstance(event, Frame)
            # After our close frame, requests are not begun: nobody could be told their result.
            if was_open and event.opcode in DATA:
                self._take_data(protocol, event)
        if protocol.writes:
            self._flush()
        if protocol.state is not State.OPEN:
            self._wake()

    def _parse_head(self, data: memoryview) -> None:
        """Add to the head of the request. When it is whole, decide on it."""
        searched = max(len(self._head) - len(END) + 1, 0)
        self._head += data
        end = self._head.find(END, searched)
        if end < 0:
            if len(self._head) > MAX_HEAD_BYTES:
                self._refuse(headers_too_large())
            return
        end += len(END)
        if end < len(self._head):
            self._input.appendleft(memoryview(bytes(self._head[end:])))
        try:
            self.request = parse_upgrade(bytes(self._head[:end]))
        except Refusal as refusal:
            self._refuse(refusal)
            return
        finally:
            self._head = bytearray()
        agents = ", ".join(self.request.headers.get_all("User-Agent"))
        self.user_agent = agents.encode("latin-1").decode(errors="replace")
        assert self._timer
        self._timer.cancel()
        self._serving = self._loop.create_task(self._serve(), name="websocket")

    def _take_data(self, protocol: _Frames, frame: Frame) -> None:
        """Add a frame to its message."""
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        self._fragments.append(frame.data)
        if not frame.fin:
            return
        data = self._fragments[0] if len(self._fragments) == 1 else b"".join(self._fragments)
        self._fragments = []
        try:
            self._messages.append(str(data, "utf-8") if self._is_text else bytes(data))
        except UnicodeDecodeError as error:
            protocol.fail(1007, f"{error.reason} at position {error.start}")
            return
        self._wake_reader()

    def _may_take_more(self) -> bool:
        return len(self._messages) < MAX_MESSAGES and self.queued_bytes() <= self._server.max_queued_bytes

    def _read_or_not(self) -> None:
        """Go on with what has arrived, or pause or resume reading."""
        if self._transport.is_closing():
            return
        goes_on = self._may_take_more() if self._protocol else not self._serving
        if self._input and goes_on and not self._waits_for_turn:
            self._waits_for_turn = True
            self._server.parse_later(self)
        # A peer that says nothing while its handshake is decided is read from, to notice when it leaves.
        reads = not self._input and (goes_on or self._protocol is None)
        if reads and not self._is_reading:
            self._has_heard = True  # it could not be heard meanwhile
            self._transport.resume_reading()
        elif not reads and self._is_reading:
            self._transport.pause_reading()
        self._is_reading = reads

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, frames: bytes) -> None:
        """Write whole frames, unless a close frame has been sent or the transport is closing."""
        protocol = self._protocol
        if protocol is not None and protocol.state is State.OPEN and not self._transport.is_closing():
            self._written_bytes += len(frames)
            self._transport.write(frames)

    def _flush(self) -> None:
        """Write what the protocol has to say: pongs, a close frame, and the end of the stream."""
        assert self._protocol
        said = self._protocol.data_to_send()
        if len(said) > MAX_PONGS:
            pongs = [frame for frame in said if frame[:1] == b"\x8a"]
            said = pongs[-MAX_PONGS:] + [frame for frame in said if frame[:1] != b"\x8a"]
        if self._transport.is_closing():
            return
        data = b"".join(said)
        self._written_bytes += len(data)
        self._transport.write(data)
        if self._protocol.eof_sent:
            with contextlib.suppress(NotImplementedError, OSError):  # TLS has no half-closed connections
                if self._transport.can_write_eof():
                    self._transport.write_eof()
                else:
                    self._transport.close()
        if self._protocol.state is not State.OPEN:
            self._expect_end()

    def _expect_end(self) -> None:
        """Give the peer a while to end the connection."""
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(CLOSE_S, self._transport.abort)

    def _refuse(self, refusal: Refusal) -> None:
        self._server.refused()
        self._transport.write(refusal.response())
        self._transport.close()
        self._expect_end()

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────────────

    def accept(self, max_message_bytes: int | None) -> None:
        """Open the websocket. Raises ConnectionClosed if the peer has gone meanwhile."""
        if self._transport.is_closing():
            raise ConnectionClosed(None, None)
        self.binary = wants_msgpack(self.request)
        self._transport.write(accepting_response(self.request, binary=self.binary))
        self._protocol = _Frames(max_message_bytes)
        self._taken_at = self._loop.time()
        self._timer = self._loop.call_later(PING_S * random.uniform(0.5, 1), self._beat)
        self._read_or_not()

    async def _serve(self) -> None:
        """Have the handshake decided, and the websocket served to its end."""
        try:
            await self._server.serve(self)
        except Refusal as refusal:
            if not self._transport.is_closing():
                self._refuse(refusal)
        except ConnectionClosed:
            pass
        except Exception:
            log.exception("websocket_failed")
            await self.close(1011, "internal error")
        else:
            await self.close(1000, "")

    def _beat(self) -> None:
        """Look whether the peer lives and reads, and ping it."""
        protocol, now = self._protocol, self._loop.time()
        if protocol is None or protocol.state is not State.OPEN or self._transport.is_closing():
            return
        queued_bytes = self.queued_bytes()
        taken_bytes = self._written_bytes - queued_bytes
        if not queued_bytes or taken_bytes != self._taken_bytes:
            self._taken_bytes, self._taken_at = taken_bytes, now
        if now - self._taken_at > UNREAD_S:
            CLOSED.labels("unread").inc()
            self._transport.abort()
        elif not self._has_heard and self._is_reading:
            CLOSED.labels("silent").inc()
            protocol.fail(1011, "no answer to a ping")
            self._flush()
            self._wake()
        else:
            self._has_heard = False
            protocol.send_ping(b"")
            self._flush()
            self._timer = self._loop.call_later(PING_S, self._beat)

    def _late(self) -> None:
        CLOSED.labels("slow_handshake").inc()
        self._transport.abort()

    def _wake(self) -> None:
        self._wake_reader()
        self._wake_writers()

    def _wake_reader(self) -> None:
        if self._arrived and not self._arrived.done():
            self._arrived.set_result(None)

    def _wake_writers(self) -> None:
        drained, self._drained = self._drained, []
        for one in drained:
            if not one.done():
                one.set_result(None)

    @property
    def address(self) -> str:
        """The address of the socket's other end; empty if it has none."""
        peer: Any = self._transport.get_extra_info("peername")
        return str(peer[0]) if isinstance(peer, tuple) else ""

    @property
    def serving(self) -> asyncio.Task[None] | None:
        """The task that serves it. None before its request has arrived."""
        return self._serving


Serve = Callable[[Websocket], Awaitable[None]]
"""Decides on a handshake, accepts it, and serves the websocket to its end. Raises Refusal."""


class Websockets:
    """The websockets of a listener."""

    def __init__(
        self,
        serve: Serve,
        *,
        refused: Callable[[], None],
        max_connections: int,
        max_queued_bytes: int = 0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.serve = serve
        self.refused = refused
        """Called at each refused handshake."""
        self.max_queued_bytes = max(max_queued_bytes or MAX_QUEUED_BYTES, WRITE_HIGH_BYTES)
        self._max_connections = max_connections
        self._open: set[Websocket] = set()
        self._waiting: deque[Websocket] = deque()
        """Those with something to parse."""
        self._parses_soon = False
        self._is_full = False

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Websocket]:
        return iter(list(self._open))

    def add(self, websocket: Websocket) -> bool:
        """Take a connection. False if there are too many."""
        if len(self._open) >= self._max_connections:
            CLOSED.labels("full").inc()
            if not self._is_full:
                self._is_full = True
                log.error("too_many_sockets", limit=self._max_connections, advice="raise the limit of open files")
            return False
        self._open.add(websocket)
        return True

    def discard(self, websocket: Websocket) -> None:
        self._open.discard(websocket)
        if self._is_full and len(self._open) < 0.9 * self._max_connections:
            self._is_full = False

    def parse_later(self, websocket: Websocket) -> None:
        """Let a connection parse when it is its turn."""
        self._waiting.append(websocket)
        if not self._parses_soon:
            self._parses_soon = True
            self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        until = time.perf_counter() + PARSE_S
        while self._waiting and time.perf_counter() < until:
            self._waiting.popleft().parse()  # with more to parse, it takes its place at the end
        if self._waiting:
            self.loop.call_soon(self._parse)
        else:
            self._parses_soon = False

    async def end(self) -> None:
        """Close all with 1001, and wait until they are served no longer."""
        open_ = list(self._open)
        tasks = [task for websocket in open_ if (task := websocket.serving)]
        await asyncio.gather(*(websocket.close(1001, "") for websocket in open_))
        if tasks:
            await asyncio.wait(tasks)

    @contextlib.asynccontextmanager
    async def listening(self, listener: socket.socket) -> AsyncIterator[None]:
        """Accept websockets on a bound socket while the block runs."""
        accepting = await self.loop.create_server(lambda: Websocket(self), sock=listener, backlog=1024)
        try:
            yield
        finally:
            accepting.close()
            await self.end()
            await accepting.wait_closed()
