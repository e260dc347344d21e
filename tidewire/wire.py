"""One connection for all short commands of a process: what one turn of the event loop asks goes out in one write.

redis-py takes a connection out of a pool for each command, waits for its answer there, and does most of that in Python:
of a write's way through the store that was the largest part. Here nobody waits for a connection. Answers come in the
order of the commands, and whoever asked gets them. Address, TLS, login and protocol remain redis-py's.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import hiredis
from prometheus_client import Counter
from redis._parsers.base import BaseParser
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError, MasterDownError, ReadOnlyError, TimeoutError

LOST = Counter("tidewire_redis_connections_lost_total", "Connections to Redis that ended, or were given up.")

TRIES = 6
"""Within about two seconds. Every command that goes this way may be done twice."""
TIMEOUT_S = 10.0
"""A server that is silent for so long is counted as lost."""
AT_ONCE_BYTES = 1024
"""What is larger does not wait for what else this turn of the event loop asks: the server has something to do."""
_NOTHING = object()


class Wire:
    """Commands go out in the order in which they were asked for. Connects when it is first needed, and again.

    Raises redis-py's errors.
    """

    def __init__(self, connection: Callable[[], AbstractConnection]) -> None:
        self._connection = connection
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()
        self._others: weakref.WeakSet[Wire] = weakref.WeakSet()

    async def calls(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        """The answers of all commands. An error is raised when all are done."""
        packed = [hiredis.pack_command(command) for command in commands]
        for number in range(TRIES):
            try:
                line = self._line if self._line and not self._line.lost else await self._connect()
                answers = await line.ask(packed)
                for answer in answers:
                    if isinstance(answer, ReadOnlyError | MasterDownError):
                        # No longer the master: whoever makes connections finds the one who is.
                        line.lose(ConnectionError(f"the server says: {answer}"))
                        raise ConnectionError(str(answer))
                    if isinstance(answer, Exception):
                        raise answer
                return answers
            except (ConnectionError, TimeoutError, OSError):
                if number == TRIES - 1:
                    raise
                await asyncio.sleep(random.uniform(0.5, 1) * min(1.0, 0.05 * 2**number))
        raise AssertionError("the last try ends it")

    async def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        return (await self.calls((("FCALL", function, numkeys, *keys_and_args),)))[0]

    async def function_load(self, code: str, replace: bool = False) -> Any:
        return (await self.calls((("FUNCTION", "LOAD", *(("REPLACE",) if replace else ()), code),)))[0]

    def another(self) -> Wire:
        """One to the same server, whose commands do not wait for those that go this way."""
        made = Wire(self._connection)
        self._others.add(made)
        return made

    def lose(self, why: str) -> None:
        """Whoever waits for an answer, here or at another of these, asks again on a new connection."""
        if self._line:
            self._line.lose(ConnectionError(why))
        for other in self._others:
            other.lose(why)

    async def aclose(self) -> None:
        if self._line:
            self._line.lose(ConnectionError("the connection was closed"))

    async def _connect(self) -> _Line:
        async with self._connecting:
            if self._line is None or self._line.lost:
                self._line = await _Line.open(self._connection())
            return self._line


class _Asked:
    """Commands that wait for their answers."""

    __slots__ = ("answered", "answers", "count")

    def __init__(self, answered: asyncio.Future[list[Any]], count: int) -> None:
        self.answered = answered
        self.count = count
        self.answers: list[Any] = []


class _Line(asyncio.Protocol):
    """One connection, from its login to its end."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.lost = False
        self._writer = writer  # closes its transport when it is forgotten
        self._transport = writer.transport
        self._loop = asyncio.get_running_loop()
        self._parser: Any = hiredis.Reader(replyError=BaseParser.parse_error, notEnoughData=_NOTHING)
        self._outgoing: list[bytes] = []
        self._waiting: deque[_Asked] = deque()
        self._oldest: _Asked | None = None
        self._timer = self._loop.call_later(TIMEOUT_S, self._look)

    @classmethod
    async def open(cls, connection: AbstractConnection) -> _Line:
        raw: Any = connection  # nothing public hands an open connection over
        await raw.connect()
        line = cls(raw._writer)
        raw._reader = raw._writer = None
        line._writer.transport.set_protocol(line)
        return line

    def ask(self, packed: list[bytes]) -> asyncio.Future[list[Any]]:
        if not self._outgoing:
            self._loop.call_soon(self._write)
        self._outgoing += packed
        if sum(map(len, packed)) > AT_ONCE_BYTES:
            self._write()
        asked = _Asked(self._loop.create_future(), len(packed))
        self._waiting.append(asked)
        return asked.answered

    def _write(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and not self.lost:
            self._transport.write(b"".join(outgoing))

    def data_received(self, data: bytes) -> None:
        parser, waiting = self._parser, self._waiting
        try:
            parser.feed(data)
            while (answer := parser.gets()) is not _NOTHING:
                if isinstance(answer, hiredis.PushNotification):
                    continue
                asked = waiting[0]
                asked.answers.append(answer)
                if len(asked.answers) == asked.count:
                    waiting.popleft()
                    if not asked.answered.done():
                        asked.answered.set_result(asked.answers)
        except hiredis.ProtocolError as error:
            self.lose(ConnectionError(f"what the server says is no RESP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(ConnectionError(f"the connection was lost: {exc}" if exc else "the server closed the connection"))

    def _look(self) -> None:
        """Give up a server that has not answered what was asked before the last look."""
        oldest = self._waiting[0] if self._waiting else None
        if oldest is not None and oldest is self._oldest:
            self.lose(TimeoutError(f"the server has not answered for {TIMEOUT_S:g} s"))
        else:
            self._oldest, self._timer = oldest, self._loop.call_later(TIMEOUT_S, self._look)

    def lose(self, error: Exception) -> None:
        """Whoever waits is told; nothing else goes this way."""
        if self.lost:
            return
        self.lost = True
        LOST.inc()
        self._timer.cancel()
        self._transport.abort()
        for asked in self._waiting:
            if not asked.answered.done():
                asked.answered.set_exception(error)
