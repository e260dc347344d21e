"""Expensive reads: decided beside their partition, a slice at a time, on facts of their own.

A read comes here when it is too expensive for the serial path of its partition. It begins after the commit of
everything before it, so its result contains all of that. It may also contain later changes. Its position says up to
which change the result is complete.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError

from tidewire.app import App
from tidewire.errors import Fenced, Internal, Overloaded, RequestError, Timeout
from tidewire.model.protocol import Get, Query, parse_request
from tidewire.model.records import Command, Reply
from tidewire.process.bus import Answers
from tidewire.process.settings import Settings
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Owned
from tidewire.tasks import end

from .budget import Account, Limits
from .decide import wire_error
from .facts import Fact, Sizes, Value
from .fetching import fetch
from .reading import Reading, reading_of
from .rights import Rights
from .view import Missing, Situation, View

log = structlog.get_logger(__name__)

MAX_READS = 4
"""Maximum expensive reads in progress in a process. Each user has at most one."""
MAX_QUEUED = 1024
MAX_QUEUED_OF_USER = 256
"""Maximum expensive reads that wait for their turn, of all users and of one. Beyond them, `overloaded`."""
SLICE_S = 0.001
"""Maximum seconds of computing in one slice."""
REST_SLICES = 3
"""Rest after each slice, as a multiple of it. Expensive reads so take a quarter of the event loop's time together."""

DETACHED = Counter("tidewire_store_detached_total", "Reads that left the partition's serial path as too expensive.")
WAITING = Gauge("tidewire_store_reads_waiting", "Expensive reads that wait for their turn.")


class Read(NamedTuple):
    """A detached read, with the partition as it was when the read left it."""

    command: Command
    situation: Situation
    owned: Owned
    begun_s: float
    """Monotonic time of `situation.now`, in seconds."""

    @property
    def user(self) -> tuple[str, str]:
        return self.command.role, self.command.user

    @property
    def left_s(self) -> float:
        """Seconds until the deadline of the command."""
        left_ms: int = self.command.deadline - self.situation.now
        return left_ms / 1000 - (time.monotonic() - self.begun_s)

    def view(self, app: App, backend: Backend, facts: dict[Fact, Value], account: Account) -> View:
        now = self.situation.now + int(1000 * (time.monotonic() - self.begun_s))
        view = View(app, backend.keys, facts, replace(self.situation, now=now))
        view.begin(account)
        return view


class Reads:
    """The expensive reads of a process. Users take turns, and each has one read in progress."""

    def __init__(self, app: App, backend: Backend, settings: Settings, answers: Answers) -> None:
        self._app = app
        self._backend = backend
        self._answers = answers
        self._limits = Limits.of(settings)
        self._waiting: dict[tuple[str, str], deque[Read]] = {}
        self._count = 0
        self._under_way: dict[tuple[str, str], tuple[Read, asyncio.Task[None]]] = {}
        self._turn = asyncio.Lock()
        self._draining = False

    def add(self, read: Read) -> None:
        """Answer a read when its turn comes, or at once with `overloaded` if too many wait."""
        DETACHED.inc()
        queue = self._waiting.get(read.user, ())
        if self._draining:
            self._answer(read, LEAVING)
        elif self._count >= MAX_QUEUED or len(queue) >= MAX_QUEUED_OF_USER:
            self._answer(read, BUSY)
        else:
            self._waiting.setdefault(read.user, deque()).append(read)
            self._count += 1
            self._start()

    async def drain(self) -> None:
        """End all reads, with an answer that says so."""
        self._draining = True
        under_way, waiting = (
            list(self._under_way.values()),
            [read for queue in self._waiting.values() for read in queue],
        )
        self._waiting.clear()
        self._count = 0
        await end([task for _, task in under_way])
        for read in [*(read for read, _ in under_way), *waiting]:
            self._answer(read, LEAVING)

    def _start(self) -> None:
        WAITING.set(self._count)
        for user in list(self._waiting):
            if len(self._under_way) >= MAX_READS:
                return
            if user in self._under_way:
                continue
            queue = self._waiting.pop(user)
            read = queue.popleft()
            self._count -= 1
            if queue:
                self._waiting[user] = queue  # behind the other users
            task = asyncio.create_task(self._do(read), name=f"read:{read.command.reply_to}:{read.command.number}")
            self._under_way[user] = read, task
            task.add_done_callback(lambda task, user=user: self._ended(user, task))  # type: ignore[misc]

    def _ended(self, user: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._under_way[user]
        if not task.cancelled():
            self._start()

    async def _do(self, read: Read) -> None:
        account = Account(self._limits)
        try:
            if read.left_s <= 0:
                raise Timeout("the request waited longer than its time, and was not done")
            async with asyncio.timeout(read.left_s):
                result = await self._result(read, account)
            reply = Reply(read.command.number, result, None)
        except RequestError as error:
            reply = _refusal(read, error)
        except TimeoutError:
            reply = _refusal(read, Timeout("the request took longer than its time: narrow it"))
        except Fenced:
            reply = _refusal(read, Overloaded("the partition went to another server while it was read: try again"))
        except (RedisError, OSError) as error:
            log.warning("read_failed", error=str(error))
            reply = _refusal(read, Overloaded("Redis did not answer while the partition was read: try again"))
        except Exception:  # the edge of one read: the others must be answered
            log.exception("read_failed", action=read.command.action, table=read.command.body.get("table"))
            reply = _refusal(read, Internal("something went wrong on the server"))
        self._answers.send({read.command.reply_to: [reply._replace(cost_ms=account.cost_ms())]})

    def _answer(self, read: Read, error: RequestError) -> None:
        self._answers.send({read.command.reply_to: [_refusal(read, error)]})

    async def _result(self, read: Read, account: Account) -> dict[str, Any]:
        facts = dict[Fact, Value]()
        request = parse_request(read.command.body)
        assert isinstance(request, Get | Query)
        view = read.view(self._app, self._backend, facts, account)
        reading = reading_of(request, view, Rights(view, read.command), serial=False)
        while not reading.done:
            try:
                await self._slice(read, reading, facts, account)
            except Missing as need:
                if reading.turning:
                    facts.clear()  # facts about rights must not be older than the page that they concern
                account.ask(len(need.facts))
                account.check()
                sizes: Sizes = {}
                facts |= await fetch(
                    self._backend, read.situation.partition, need.facts, sizes, max_bytes=self._limits.bytes
                )
                account.add_bytes(sum(sizes.values()))
                account.check()
        # The result is as new as its position says only if Redis lost nothing, and no other owner has begun. A batch of
        # no entries checks the fence. It does not renew the lease, which may have been released.
        await self._backend.functions.batch(read.owned, 0, 0)
        return reading.result(read.view(self._app, self._backend, facts, account))

    async def _slice(self, read: Read, reading: Reading, facts: dict[Fact, Value], account: Account) -> None:
        """Compute for one slice, then rest. Raises Missing.

        The lock is held during the rest, so all reads together take a fixed share of the event loop's time.
        """
        async with self._turn:
            begun_s = time.monotonic()
            view = read.view(self._app, self._backend, facts, account)
            rights = Rights(view, read.command)
            account.begin()
            try:
                while not reading.done and time.monotonic() - begun_s < SLICE_S:
                    reading.step(view, rights)
                account.check()
            finally:
                account.pause()
                await asyncio.sleep(REST_SLICES * (time.monotonic() - begun_s))


def _refusal(read: Read, error: RequestError) -> Reply:
    return Reply(read.command.number, None, wire_error(error))


BUSY = Overloaded(
    f"{MAX_QUEUED} expensive reads of this store, or {MAX_QUEUED_OF_USER} of this user, wait for their turn: try again "
    "shortly, or narrow them"
)
LEAVING = Overloaded("this server is leaving: try again")
