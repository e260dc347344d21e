"""Request and reply over streams: the gateway's requests to stores and authorizers, and their answers."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

import structlog
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from tidewire.errors import Overloaded, RequestError, Timeout, from_wire
from tidewire.model.records import JSON, Reply, pack, stream_id, unpack
from tidewire.redis.backend import Backend
from tidewire.redis.functions import NumberedCall, StreamBounds

log = structlog.get_logger(__name__)

REPLIES = StreamBounds(10_000, 64 << 20)
"""Maximum entries and bytes of a reply stream whose gateway does not read. The oldest answers are dropped."""
REPLIES_TTL_MS = 60_000
SEND_BATCH = 1000
"""Maximum records of one `enqueue`."""
SEND_BATCH_BYTES = 1 << 20
"""Maximum bytes of the records of one `enqueue`. A single record may be larger."""
READ_BATCH = 256
"""Maximum entries of one read of an inbox."""
TRIM_S = 0.1
"""Seconds between two trims of an inbox, unless `TRIM_BYTES` were read."""
TRIM_BYTES = 1 << 20
MOVED_S = 3.0
"""Seconds for which requests wait after a master was replaced, because it may have lost them or their answers."""
_REFUSED = re.compile(r"\b(MISCONF|NOREPLICAS)\b")
"""Errors of a server that refuses writes, and has not done this one. redis-py has a class only for OOM."""


class Inbox:
    """A stream that only this process reads. It trims what it has read."""

    def __init__(self, backend: Backend, stream: Callable[[], bytes]) -> None:
        self._backend = backend
        self._stream = stream
        self._reading = b""
        self._last = (0, 0)
        self._untrimmed_bytes = 0
        self._trimmed_at = 0.0

    async def read(self) -> list[bytes]:
        """Return the next records, or [] after a second.

        Raises redis-py's errors; a later call returns what was missed.
        """
        stream = self._stream()  # a gateway that continues under another id has another stream
        if stream != self._reading:
            self._reading, self._last, self._untrimmed_bytes = stream, (0, 0), 0
        found = await self._backend.read({stream: f"{self._last[0]}-{self._last[1]}"}, READ_BATCH)
        entries = [entry for _, some in found for entry in some]
        records = [fields[b"r"] for _, fields in entries]
        if entries:
            self._last = stream_id(entries[-1][0])
            self._untrimmed_bytes += sum(map(len, records))
        await self._trim()
        return records

    async def _trim(self) -> None:
        due = self._untrimmed_bytes > TRIM_BYTES or time.monotonic() > self._trimmed_at + TRIM_S
        if not self._untrimmed_bytes or not due:
            return
        before = f"{self._last[0]}-{self._last[1] + 1}"
        try:
            await self._backend.calls([("XTRIM", self._reading, "MINID", before)])
        except (RedisError, OSError) as error:
            log.warning("inbox_not_trimmed", error=str(error))
        else:
            self._untrimmed_bytes, self._trimmed_at = 0, time.monotonic()


def _full(bounds: StreamBounds) -> str:
    return (
        f"{bounds.entries} commands (TIDEWIRE_COMMANDS_MAX) or {bounds.bytes} bytes of them (TIDEWIRE_COMMANDS_BYTES) "
        "wait for this partition, and nothing was done: try again shortly. `tidewire status` tells if a store works"
    )


class Bus:
    """The requesting side.

    Requests to one stream leave in their order, and those that gather meanwhile leave together.
    """

    def __init__(
        self,
        backend: Backend,
        name: Callable[[], str],
        *,
        timeout_s: float,
        max_waiting: int = 10_000,
        max_queued: int = 10_000,
        max_queued_bytes: int = 64 << 20,
    ) -> None:
        self._backend = backend
        self._timeout_s = timeout_s
        self._most_waiting = max_waiting
        self._bounds = StreamBounds(max_queued, max_queued_bytes)
        self._inbox = Inbox(backend, lambda: backend.keys.replies(name()))
        self._sender = secrets.token_hex(8)
        self._calls = itertools.count(1)
        self._numbers = itertools.count(1)
        # by request number: deadline and result; the oldest first
        self._waiting: dict[int, tuple[float, asyncio.Future[JSON], Callable[[float], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._outgoing: dict[bytes, list[tuple[bytes, int]]] = {}
        self._passing: set[bytes] = set()
        self._ready = asyncio.Event()

    def request(
        self,
        stream: bytes,
        record: Callable[[int], tuple[object, ...]],
        cost: Callable[[float], None] = lambda _: None,
    ) -> asyncio.Future[JSON]:
        """Send the record that `record` makes for a request number, and return its result as a future.

        `cost` is called with what the request has cost, in ms of work, when it is answered.

        The future raises the RequestError of the answer, or Overloaded if the stream has no room. It raises Timeout if
        no answer came; the request may be done then.

        Raises:
            Overloaded: too many requests wait already. Nothing was sent.
        """
        if len(self._waiting) >= self._most_waiting:
            raise Overloaded(
                f"{self._most_waiting} requests of this process wait for an answer, and nothing was done: try again"
            )
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[JSON] = loop.create_future()
        self._waiting[number] = (loop.time() + self._timeout_s, future, cost)
        # One timer for all requests: they have the same time-out, so the oldest one is always the first to expire.
        if self._timer is None:
            self._timer = loop.call_later(self._timeout_s, self._expire)
        self._outgoing.setdefault(stream, []).append((pack(record(number)), number))
        self._ready.set()
        return future

    async def send(self) -> None:
        """Send requests, until cancelled."""
        async with asyncio.TaskGroup() as passing:
            while True:
                await self._ready.wait()
                self._ready.clear()
                for stream in self._outgoing.keys() - self._passing:
                    self._passing.add(stream)
                    passing.create_task(self._pass_on(stream))

    async def _pass_on(self, stream: bytes) -> None:
        # One call to a stream at a time. Two could overtake each other, and the numbers in a stream must grow.
        while records := self._outgoing.pop(stream, None):
            for some in _batches(records):
                await self._enqueue(stream, some)
        self._passing.discard(stream)

    async def _enqueue(self, stream: bytes, records: list[tuple[bytes, int]]) -> None:
        call = NumberedCall(self._backend.keys.sent(stream, self._sender), next(self._calls))
        try:
            taken = await self._backend.functions.enqueue(stream, call, self._bounds, [record for record, _ in records])
        except (RedisError, OSError) as error:
            log.warning("requests_not_sent", count=len(records), error=str(error))
            for _, number in records:
                self._fail(number, _not_sent(error))
            return
        for _, number in records[taken:]:
            self._fail(number, Overloaded(_full(self._bounds)))

    async def receive(self) -> None:
        """Receive answers, until cancelled."""
        self._backend.when_moved(self._moved)
        while True:
            try:
                records = await self._inbox.read()
            except (RedisError, OSError) as error:
                log.warning("replies_not_read", error=str(error))
                await asyncio.sleep(0.2)
                continue
            for record in records:
                for raw in unpack(record):
                    self._settle(Reply(*raw))

    def _moved(self) -> None:
        """A master was replaced.

        Earlier requests may be lost, so they fail after `MOVED_S` instead of their time-out.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout_s
        loop.call_later(MOVED_S, self._give_up, until)

    def _give_up(self, until: float) -> None:
        """Fail the requests whose deadline is before a time."""
        for number, (deadline, *_) in list(self._waiting.items()):
            if deadline > until:
                break
            self._fail(number, Timeout("a master of Redis was replaced meanwhile: it may or may not be done"))

    def _settle(self, reply: Reply) -> None:
        waiting = self._waiting.pop(reply.number, None)
        if waiting is None:
            return
        _, future, cost = waiting
        cost(reply.cost_ms)
        if future.done():
            return
        if reply.error is None:
            future.set_result(reply.result)
        else:
            future.set_exception(from_wire(reply.error))

    def _fail(self, number: int, error: RequestError) -> None:
        _, future, _ = self._waiting.pop(number, (0, None, None))
        if future and not future.done():
            future.set_exception(error)

    def _expire(self) -> None:
        """Fail the requests whose deadline has passed, and set the timer for the next one."""
        loop = asyncio.get_running_loop()
        now, self._timer = loop.time(), None
        for number, (until, *_) in list(self._waiting.items()):
            if until > now:
                self._timer = loop.call_at(until, self._expire)
                break
            self._fail(number, Timeout("no answer in time: it may or may not be done"))


def _batches(records: list[tuple[bytes, int]]) -> Iterable[list[tuple[bytes, int]]]:
    """Cut records, in their order, into batches that keep no server busy for long."""
    batch, size_bytes = list[tuple[bytes, int]](), 0
    for record in records:
        if batch and (len(batch) == SEND_BATCH or size_bytes + len(record[0]) > SEND_BATCH_BYTES):
            yield batch
            batch, size_bytes = [], 0
        batch.append(record)
        size_bytes += len(record[0])
    yield batch


def _not_sent(error: Exception) -> RequestError:
    found = _REFUSED.search(str(error)) if isinstance(error, ResponseError) else None
    why = "OOM" if isinstance(error, OutOfMemoryError) else found and found[1]
    if why:
        return Overloaded(f"Redis takes no writes at the moment ({why}): nothing was done, try again later")
    return Timeout("the request could not be passed on: it may or may not be done")


class Answers:
    """The answering side of a process. Answers that gather while one round is in flight leave with the next.

    If an answer is lost, its request ends with a time-out, and can be repeated.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._outgoing: dict[str, list[Reply]] = {}
        self._sending: asyncio.Task[None] | None = None

    def send(self, replies: Mapping[str, Iterable[Reply]]) -> None:
        """Send replies soon. They are given by the id of the process that asked."""
        for name, answers in replies.items():
            self._outgoing.setdefault(name, []).extend(answers)
        if self._outgoing and (self._sending is None or self._sending.done()):
            self._sending = asyncio.create_task(self._send())

    async def sent(self) -> None:
        """Wait until all answers are sent, or lost."""
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
        await self._backend.functions.answer(stream, REPLIES, REPLIES_TTL_MS, pack(answers))
