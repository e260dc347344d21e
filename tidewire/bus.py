"""Request and reply over streams: what the gateway asks the store and the authorizer, and their answers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping

import structlog
from redis.exceptions import RedisError

from tidewire.backend import Backend
from tidewire.errors import Overloaded, RequestError, Timeout, from_wire
from tidewire.records import JSON, Reply, pack, unpack

log = structlog.get_logger(__name__)

REPLIES_KEPT = 10_000
REPLIES_TTL_MS = 60_000


class Bus:
    """The asking side. What is for one stream goes out in the order it was made; what gathers meanwhile, together."""

    def __init__(
        self,
        backend: Backend,
        name: Callable[[], str],
        *,
        timeout_s: float,
        most_waiting: int = 10_000,
        most_queued: int = 10_000,
    ) -> None:
        self._backend = backend
        self._name = name
        self._timeout_s = timeout_s
        self._most_waiting = most_waiting
        self._most_queued = most_queued
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[float, asyncio.Future[JSON]]] = {}  # until when; the oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._outgoing: dict[bytes, list[tuple[bytes, int]]] = {}
        self._passing: set[bytes] = set()
        self._ready = asyncio.Event()

    def request(self, stream: bytes, record: Callable[[int], tuple[object, ...]]) -> asyncio.Future[JSON]:
        """Send the record made for a request number; the future has its result.

        The future raises the RequestError of the answer, Overloaded when the stream has no room, or Timeout: then it is
        unknown whether it was done.
        Raises Overloaded at once, with nothing sent, when too many wait already.
        """
        if len(self._waiting) >= self._most_waiting:
            raise Overloaded("too many requests are waiting for an answer: try again shortly")
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[JSON] = loop.create_future()
        self._waiting[number] = (loop.time() + self._timeout_s, future)
        # One timer for all: they have the same time, so that the one asked first is the first to run out of it.
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._expire)
        self._outgoing.setdefault(stream, []).append((pack(record(number)), number))
        self._ready.set()
        return future

    async def send(self) -> None:
        """Pass requests on, until cancelled."""
        async with asyncio.TaskGroup() as passing:
            while True:
                await self._ready.wait()
                self._ready.clear()
                for stream in self._outgoing.keys() - self._passing:
                    self._passing.add(stream)
                    passing.create_task(self._pass_on(stream))

    async def _pass_on(self, stream: bytes) -> None:
        # One call at a time to a stream: two could overtake each other, and numbers there must go up.
        while records := self._outgoing.pop(stream, None):
            await self._enqueue(stream, records)
        self._passing.discard(stream)

    async def _enqueue(self, stream: bytes, records: list[tuple[bytes, int]]) -> None:
        try:
            taken = await self._backend.functions.enqueue(stream, self._most_queued, [record for record, _ in records])
        except (RedisError, OSError) as error:
            log.warning("requests_not_sent", count=len(records), error=str(error))
            for _, number in records:
                self._fail(number, Timeout("the request could not be passed on: it may or may not be done"))
            return
        for _, number in records[taken:]:
            self._fail(number, Overloaded("too many requests wait for this partition: try again shortly"))

    async def receive(self) -> None:
        """Take answers, until cancelled."""
        last: dict[str, bytes | str] = {}
        while True:
            name = self._name()  # a gateway that was counted dead goes on under another one
            try:
                found = await self._backend.read({self._backend.keys.replies(name): last.get(name, "0-0")})
            except (RedisError, OSError) as error:
                log.warning("replies_not_read", error=str(error))
                await asyncio.sleep(0.2)
                continue
            for _, entries in found:
                for id_, fields in entries:
                    last = {name: id_}
                    for raw in unpack(fields[b"r"]):
                        self._settle(Reply(*raw))

    def _settle(self, reply: Reply) -> None:
        _, future = self._waiting.pop(reply.number, (0, None))
        if future is None or future.done():
            return
        if reply.error is None:
            future.set_result(reply.result)
        else:
            future.set_exception(from_wire(reply.error))

    def _fail(self, number: int, error: RequestError) -> None:
        _, future = self._waiting.pop(number, (0, None))
        if future and not future.done():
            future.set_exception(error)

    def _expire(self) -> None:
        """Fail those whose time is over, and look again when the next one's is."""
        loop = asyncio.get_running_loop()
        now, self._timer = loop.time(), None
        for number, (until, _) in list(self._waiting.items()):
            if until > now:
                self._timer = loop.call_at(until, self._expire)
                break
            self._fail(number, Timeout("no answer in time: it may or may not be done"))


class Answers:
    """The answering side, for a whole process. What gathers while one round is under way goes with the next.

    An answer that is lost is a time-out for who asked, and the request is repeatable.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._outgoing: dict[str, list[Reply]] = {}
        self._sending: asyncio.Task[None] | None = None

    def send(self, replies: Mapping[str, Iterable[Reply]]) -> None:
        """Pass replies on soon, by the name of who asked."""
        for name, answers in replies.items():
            self._outgoing.setdefault(name, []).extend(answers)
        if self._outgoing and (self._sending is None or self._sending.done()):
            self._sending = asyncio.create_task(self._send())

    async def sent(self) -> None:
        """Until all of them are on their way, or lost."""
        if self._sending:
            await self._sending

    async def _send(self) -> None:
        while self._outgoing:
            outgoing, self._outgoing = self._outgoing, {}
            try:
                await asyncio.gather(*(self._send_to(name, answers) for name, answers in outgoing.items()))
            except (RedisError, OSError) as error:
                log.warning("replies_not_sent", error=str(error))

    async def _send_to(self, name: str, answers: list[Reply]) -> None:
        stream = self._backend.keys.replies(name)
        await self._backend.calls(
            [
                ("XADD", stream, "MAXLEN", "~", REPLIES_KEPT, "*", "r", pack(answers)),
                ("PEXPIRE", stream, REPLIES_TTL_MS),
            ]
        )
