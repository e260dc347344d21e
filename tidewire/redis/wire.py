"""One connection for all short commands of a process. Commands of one turn of the event loop leave in one write.

redis-py takes a connection from a pool for each command, and waits there for its answer. That was the largest part of a
write's way through the store. Here no caller waits for a connection. The server answers in the order of the commands,
which tells whose answer it is. redis-py still handles address, TLS, login and protocol.
"""

from __future__ import annotations

import asyncio
import builtins
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import hiredis
from prometheus_client import Counter
from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, ConnectionError, MasterDownError, ReadOnlyError, TimeoutError

LOST = Counter("tidewire_redis_connections_lost_total", "Connections to Redis that ended, or were given up.")

MAX_TRIES = 6
"""Maximum attempts of one call, with pauses of one to two seconds in all. Every command on a wire may be done twice."""
MAX_SILENCE_S = 10
"""Maximum seconds for which a server may leave a command unanswered before its connection is dropped."""
MAX_OPENING_S = 3.0
"""Maximum seconds to make a connection, from its first packet to the end of its login."""
AT_ONCE_BYTES = 1024
"""Size above which a call is sent at once, in bytes, instead of with the others of the turn: the server can begin."""
_NOTHING = object()


class Wire:
    """One connection to a server. Commands leave in the order of the calls.

    It connects at the first call, and again after a loss. Raises redis-py's errors.
    """

    def __init__(self, connection: Callable[[], AbstractConnection]) -> None:
        self._connection = connection
        self._line: _Line | None = None
        self._opening: asyncio.Task[_Line] | None = None
        self._others: weakref.WeakSet[Wire] = weakref.WeakSet()

    async def calls(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Return the answers of all commands. Raises the first error when all are done."""
        return without_errors(await self.answers(commands))

    async def answers(self, commands: Iterable[tuple[Any, ...]], key: bytes | None = None) -> list[Any]:
        """Return the answers of all commands, with the server's errors among them. Retries while the server is away.

        `key` matters only in `ClusterWire.answers`.
        """
        packed = [hiredis.pack_command(command) for command in commands]
        for number in range(MAX_TRIES):
            try:
                return await self.once(packed)
            except AuthenticationError:
                raise
            except (ConnectionError, TimeoutError, OSError):
                if number == MAX_TRIES - 1:
                    raise
                await pause(number)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def once(self, packed: list[bytes]) -> list[Any]:
        """Return the answers of packed commands, with errors among them.

        Raises ConnectionError if the answers may be lost.
        """
        line = self._line if self._line and not self._line.lost else await self._connect()
        answers = await line.ask(packed)
        for answer in answers:
            if isinstance(answer, ReadOnlyError | MasterDownError):
                # The server is no longer the master. The next connection goes to the new one.
                line.lose(ConnectionError(f"the server says: {answer}"))
                raise ConnectionError(str(answer))
            if isinstance(answer, ConnectionError):  # the server is loading its data
                raise answer
        return answers

    async def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        return (await self.calls((("FCALL", function, numkeys, *keys_and_args),)))[0]

    async def function_load(self, code: str, replace: bool = False) -> Any:
        return (await self.calls((("FUNCTION", "LOAD", *(("REPLACE",) if replace else ()), code),)))[0]

    def another(self) -> Wire:
        """Return another wire to the same server, whose commands do not wait for those of this one."""
        made = Wire(self._connection)
        self._others.add(made)
        return made

    def lose(self, why: str, unless_at: tuple[str, int] | None = None) -> None:
        """Break this connection and those of the wires that `another` has made. Their calls are repeated on new
        connections.

        A connection to the address `unless_at` stays.
        """
        if self._opening and unless_at is None:
            self._opening.cancel()  # a server that hangs accepts a connection, but never answers the login
        if self._line and (unless_at is None or self._line.address != unless_at):
            self._line.lose(ConnectionError(why))
        for other in self._others:
            other.lose(why, unless_at)

    async def aclose(self) -> None:
        self.lose("the connection was closed")

    async def _connect(self) -> _Line:
        """Return a new connection. All callers that wait for one share it."""
        if self._opening is None:
            self._opening = asyncio.create_task(_Line.open(self._connection()), name="wire_opening")
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():
                raise ConnectionError("the connection was abandoned while it was being opened") from None
            raise

    def _opened(self, opening: asyncio.Task[_Line]) -> None:
        self._opening = None
        if not opening.cancelled() and not opening.exception():
            self._line = opening.result()


def without_errors(answers: list[Any]) -> list[Any]:
    """Return the answers, or raise the first error among them."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


async def pause(number: int) -> None:
    """Wait before the next attempt: twice as long each time, at most a second, with jitter."""
    await asyncio.sleep(random.uniform(0.5, 1) * min(1.0, 0.05 * 2**number))


class _Call:
    """Commands that wait for their answers."""

    __slots__ = ("answered", "answers", "count")

    def __init__(self, answered: asyncio.Future[list[Any]], count: int) -> None:
        self.answered = answered
        self.count = count
        self.answers: list[Any] = []


class _Line(asyncio.Protocol):
    """One connection, from its login to its end."""

    def __init__(self, writer: asyncio.StreamWriter, address: tuple[str, int]) -> None:
        self.lost = False
        self.address = address
        self._writer = writer  # its finalizer would close the transport
        self._transport = writer.transport
        self._loop = asyncio.get_running_loop()
        self._parser: Any = hiredis.Reader(replyError=BaseParser.parse_error, notEnoughData=_NOTHING)
        self._outgoing: list[bytes] = []
        self._waiting: deque[_Call] = deque()
        self._oldest: _Call | None = None
        self._silent_s = 0
        self._timer = self._loop.call_later(1, self._look)

    @classmethod
    async def open(cls, connection: AbstractConnection) -> _Line:
        raw: Any = connection  # redis-py has no public way to take over an open connection
        try:
            async with asyncio.timeout(MAX_OPENING_S):
                await raw.connect()
        except BaseException as error:
            if raw._writer is not None:
                raw._writer.transport.abort()
            if isinstance(error, builtins.TimeoutError):
                raise TimeoutError(f"no connection to Redis within {MAX_OPENING_S:g} s") from None
            raise
        line = cls(raw._writer, (getattr(raw, "host", ""), int(getattr(raw, "port", 0))))
        raw._reader = raw._writer = None
        line._writer.transport.set_protocol(line)
        return line

    def ask(self, packed: list[bytes]) -> asyncio.Future[list[Any]]:
        if not self._outgoing:
            self._loop.call_soon(self._write)
        self._outgoing += packed
        if sum(map(len, packed)) > AT_ONCE_BYTES:
            self._write()
        call = _Call(self._loop.create_future(), len(packed))
        self._waiting.append(call)
        return call.answered

    def _write(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        # uvloop raises RuntimeError for a transport that closes. Its `connection_lost`, which follows, fails the calls.
        if outgoing and not self._transport.is_closing():
            self._transport.write(b"".join(outgoing))

    def data_received(self, data: bytes) -> None:
        parser, waiting = self._parser, self._waiting
        try:
            parser.feed(data)
            while (answer := parser.gets()) is not _NOTHING:
                if isinstance(answer, hiredis.PushNotification):
                    continue
                call = waiting[0]
                call.answers.append(answer)
                if len(call.answers) == call.count:
                    waiting.popleft()
                    if not call.answered.done():
                        call.answered.set_result(call.answers)
        except hiredis.ProtocolError as error:
            self.lose(ConnectionError(f"the server's answer is not RESP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(ConnectionError(f"the connection was lost: {exc}" if exc else "the server closed the connection"))

    def _look(self) -> None:
        """Drop the connection if one command stays unanswered. Runs every second.

        Calls are counted, not time: a process that was itself stopped finds the answers in its next turn.
        """
        oldest = self._waiting[0] if self._waiting else None
        self._silent_s = self._silent_s + 1 if oldest is not None and oldest is self._oldest else 0
        self._oldest = oldest
        if self._silent_s >= MAX_SILENCE_S:
            self.lose(TimeoutError(f"the server has not answered for {MAX_SILENCE_S:g} s"))
        else:
            self._timer = self._loop.call_later(1, self._look)

    def lose(self, error: Exception) -> None:
        """Fail all waiting calls. Nothing more is sent."""
        if self.lost:
            return
        self.lost = True
        LOST.inc()
        self._timer.cancel()
        self._transport.abort()
        for call in self._waiting:
            if not call.answered.done():
                call.answered.set_exception(error)
