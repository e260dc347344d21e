"""An open websocket (RFC 6455) on a transport of the event loop. This module owns all reading and writing of frames.

The sans-I/O protocol of the websockets library reads frames, answers pings, and does the closing handshake. Our own
frames are written to the transport beside it. This is safe: each is written whole, and none here is a fragment, so none
gets within another message (section 5.4). `_write` looks at the state of the protocol first, so none follows a close
frame (section 5.5.1).

What a peer sends is parsed in slices, between which other connections get their turn. The gateway reads nothing more
while messages wait to be handled, or while the peer does not take its answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import Counter
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, Protocol, State

from .frames import Gathered, data_frame
from .peers import Mark, Take

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
MAX_MESSAGES_BYTES = 1 << 20
"""Messages of a peer that wait to be handled, and their bytes. At one of them nothing more is read from it."""
MAX_PONGS = 16
"""Pings of a peer that are answered at once. Of more, only the last ones are answered (RFC 6455, section 5.5.3)."""
MAX_QUEUED_BYTES = 1 << 20
"""Queued bytes above which nothing more is read from a peer, if no setting bounds them."""
WRITE_HIGH_BYTES = 65_536
"""Queued bytes above which `send` waits."""

CLOSED = Counter("tidewire_gateway_closed_total", "Websockets that the gateway ended, by reason.", ["reason"])

_DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
_PONG = b"\x8a"
"""The first byte of a pong: FIN and the opcode (RFC 6455, section 5.2)."""


class Turns:
    """Gives connections that have sent much their turns to parse it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Callable[[], None]] = deque()
        self._begins_soon = False

    def add(self, parse: Callable[[], None]) -> None:
        self._waiting.append(parse)
        if not self._begins_soon:
            self._begins_soon = True
            self._loop.call_soon(self._parse)

    def _parse(self) -> None:
        until = time.perf_counter() + PARSE_S
        while self._waiting and time.perf_counter() < until:
            self._waiting.popleft()()  # one with more to parse takes its place at the end
        if self._waiting:
            self._loop.call_soon(self._parse)
        else:
            self._begins_soon = False


class _Frames(Protocol):
    """The library's protocol, as it is after the opening handshake."""

    def __init__(self, max_message_bytes: int | None) -> None:
        super().__init__(SERVER, state=State.OPEN, max_size=max_message_bytes)

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None  # it may come amid the fragments of a message, which then never ends
        super().recv_frame(frame)


class Websocket(asyncio.Protocol):
    """One open websocket. It is a `Peer`.

    Args:
        transport: its connection, on which the opening handshake is done. `begin` must follow.
        turns: the turns of the process's websockets.
        binary: whether its frames are MessagePack.
        max_message_bytes: maximum bytes of a message. A larger one ends the connection with 1009.
        max_queued_bytes: queued bytes above which nothing more is read from the peer; 0 for a default.
        on_lost: is called when the connection has ended.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        turns: Turns,
        *,
        binary: bool,
        source_ip: str,
        user_agent: str,
        max_message_bytes: int | None,
        max_queued_bytes: int,
        on_lost: Callable[[Websocket], None],
    ) -> None:
        self.binary = binary
        self.source_ip = source_ip
        self.user_agent = user_agent
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._turns = turns
        self._max_queued_bytes = max(max_queued_bytes or MAX_QUEUED_BYTES, WRITE_HIGH_BYTES)
        self._on_lost = on_lost
        self._protocol = _Frames(max_message_bytes)
        self._input: deque[memoryview] = deque()
        self._waits_for_turn = False
        self._is_reading = True
        self._partial = bytearray()
        """The fragments of a message so far. They are joined at once: a peer may send any number of tiny ones."""
        self._is_text = False
        self._messages: deque[tuple[str | bytes, int]] = deque()
        """Messages that wait to be handled, each with its size in bytes."""
        self._messages_bytes = 0
        self._arrived: asyncio.Future[None] | None = None
        self._must_drain = False
        self._drained: list[asyncio.Future[None]] = []
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._has_heard = True
        self._written_bytes = self._taken_bytes = 0
        self._taken_at = self._loop.time()
        self._timer = self._loop.call_later(PING_S * random.uniform(0.5, 1), self._beat)

    def begin(self, data: bytes, *, is_reading: bool) -> None:
        """Take over the transport, and parse what has arrived already. `is_reading` says whether it reads."""
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        self._transport.set_protocol(self)
        self._is_reading = is_reading
        if data:
            self.data_received(data)
        self._read_or_not()

    # ── what a connection needs ─────────────────────────────────────────────────────────────────────────────────────

    def is_open(self) -> bool:
        return self._protocol.state is State.OPEN

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
        message, size_bytes = self._messages.popleft()
        self._messages_bytes -= size_bytes
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
        if self.is_open():
            self._protocol.send_close(code, reason)
            self._flush()
        await asyncio.wait([self._lost])

    def limit_messages(self, max_bytes: int | None) -> None:
        """Bound the size of the messages that follow."""
        self._protocol.max_message_size = max_bytes

    # ── the transport's events ──────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        self._has_heard = True
        self._input.append(memoryview(data))
        if not self._waits_for_turn:
            self._parse()

    def eof_received(self) -> None:
        """The peer has sent its last byte. The transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(self)
        self._timer.cancel()
        self._input.clear()
        self._protocol.receive_eof()
        self._lost.set_result(None)
        self._wake()

    def pause_writing(self) -> None:
        self._must_drain = True

    def resume_writing(self) -> None:
        self._must_drain = False
        self._wake_writers()
        self._read_or_not()

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _parse(self) -> None:
        """Parse some of what has arrived."""
        self._waits_for_turn = False
        if self._input and not self._transport.is_closing():
            data = self._input.popleft()
            if len(data) > PARSE_BYTES:
                self._input.appendleft(data[PARSE_BYTES:])
                data = data[:PARSE_BYTES]
            self._take(bytes(data))
        self._read_or_not()

    def _take(self, data: bytes) -> None:
        """Parse some bytes, keep the messages that are complete, and answer what the protocol answers."""
        was_open = self.is_open()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            assert isinstance(event, Frame)
            # After our close frame, requests are not begun: nobody could be told their result.
            if was_open and event.opcode in _DATA:
                self._take_data(event)
        if self._protocol.writes:
            self._flush()
        if not self.is_open():
            self._wake()

    def _take_data(self, frame: Frame) -> None:
        """Add a frame to its message."""
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        if self._partial or not frame.fin:
            self._partial += frame.data
            if not frame.fin:
                return
        data, self._partial = self._partial or frame.data, bytearray()
        try:
            self._messages.append((str(data, "utf-8") if self._is_text else bytes(data), len(data)))
        except UnicodeDecodeError as error:
            self._protocol.fail(1007, f"{error.reason} at position {error.start}")
            return
        self._messages_bytes += len(data)
        self._wake_reader()

    def _read_or_not(self) -> None:
        """Go on with what has arrived, or pause or resume reading."""
        if self._transport.is_closing():
            return
        takes_more = len(self._messages) < MAX_MESSAGES and self._messages_bytes < MAX_MESSAGES_BYTES
        goes_on = takes_more and self.queued_bytes() <= self._max_queued_bytes
        if self._input and goes_on and not self._waits_for_turn:
            self._waits_for_turn = True
            self._turns.add(self._parse)
        reads = goes_on and not self._input
        if reads and not self._is_reading:
            self._has_heard = True  # it could not be heard meanwhile
            self._transport.resume_reading()
        elif not reads and self._is_reading:
            self._transport.pause_reading()
        self._is_reading = reads

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, frames: bytes) -> None:
        """Write whole frames, unless a close frame has been sent or the transport is closing."""
        if self._protocol.state is State.OPEN and not self._transport.is_closing():
            self._written_bytes += len(frames)
            self._transport.write(frames)

    def _flush(self) -> None:
        """Write what the protocol has to say: pongs, a close frame, and the end of the stream."""
        said = self._protocol.data_to_send()
        if self._transport.is_closing():
            return
        if len(said) > MAX_PONGS:
            pongs = [frame for frame in said if frame[:1] == _PONG]
            said = pongs[-MAX_PONGS:] + [frame for frame in said if frame[:1] != _PONG]
        data = b"".join(said)
        self._written_bytes += len(data)
        self._transport.write(data)
        if self._protocol.eof_sent:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:  # TLS has no half-closed connections
                self._transport.close()
        if not self.is_open():
            self._timer.cancel()
            self._timer = self._loop.call_later(CLOSE_S, self._transport.abort)

    # ── whether the peer lives ──────────────────────────────────────────────────────────────────────────────────────

    def _beat(self) -> None:
        """Look whether the peer lives and reads, and ping it."""
        if not self.is_open() or self._transport.is_closing():
            return
        now, queued_bytes = self._loop.time(), self.queued_bytes()
        taken_bytes = self._written_bytes - queued_bytes
        if not queued_bytes or taken_bytes != self._taken_bytes:
            self._taken_bytes, self._taken_at = taken_bytes, now
        if now - self._taken_at > UNREAD_S:
            CLOSED.labels("unread").inc()
            self._transport.abort()
        elif not self._has_heard and self._is_reading:
            CLOSED.labels("silent").inc()
            self._protocol.fail(1011, "no answer to a ping")
            self._flush()
            self._wake()
        else:
            self._has_heard = False
            self._protocol.send_ping(b"")
            self._flush()
            self._timer = self._loop.call_later(PING_S, self._beat)

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
