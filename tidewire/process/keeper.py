"""The keeper: a thread that sends a process's heartbeats and renews its leases, however busy its event loop is.

A function of the application that sleeps, or one large decode, blocks the event loop. Heartbeats and renewals from that
loop would be late, and other workers would take over work in progress. So the keeper has an event loop and connections
of its own. If the process's loop stays blocked, the keeper stops, and other workers take over.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from redis.exceptions import RedisError

from tidewire.errors import Fenced
from tidewire.process.liveness import Liveness
from tidewire.process.registry import FORGET_AFTER_MS, BeatReply, Registry, listed
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Owned
from tidewire.redis.keys import ServiceKind
from tidewire.tasks import end

log = structlog.get_logger(__name__)

MAX_BLOCKED_S = 30.0
"""Maximum seconds that the service's event loop may be blocked before the keeper stops renewing."""


class Keeper:
    """An async context manager that keeps the registration and the leases of a registry.

    `run` must run beside it. It proves to the keeper that the event loop turns, and raises the error that ended the
    keeper.
    """

    def __init__(self, backend: Backend, registry: Registry, lease_ms: int) -> None:
        self._backend = backend
        self._registry = registry
        self._lease_ms = lease_ms
        self._interval_s = lease_ms / 3000
        self._liveness = Liveness(lease_ms / 1000)
        self._turns = 0
        self._information = b""
        self._server: bytes | None = None
        self._left = False
        self._given_up = False
        self._thread: threading.Thread | None = None

    # ── on the service's event loop ─────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Keeper:
        self._main = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = self._main.create_future()
        self._ended: asyncio.Future[None] = self._main.create_future()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._information = self._registry.information()
        self._registry.on_leave, self._registry.on_new_id = self._leave, lambda: self._signal("_wake")
        if own := self._backend.another():
            self._thread = threading.Thread(target=self._run_thread, args=(own,), name="keeper", daemon=True)
            self._thread.start()
        else:
            self._task = asyncio.create_task(self._run_here(), name="keeper")
        try:
            await asyncio.wait({self._begun, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                self._ended.result()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        self._signal("_stop")
        await asyncio.wait({self._ended})
        self._ended.exception()  # `run` has raised it
        if self._thread:
            self._thread.join()

    async def run(self) -> None:
        """Prove to the keeper that the event loop turns, until cancelled. Raises the error that ended the keeper."""
        while True:
            self._turns += 1
            self._information = self._registry.information()
            await asyncio.wait({self._ended}, timeout=self._interval_s / 2)
            if self._ended.done():
                self._ended.result()
                raise RuntimeError("the keeper has ended")

    async def _leave(self) -> None:
        """Send no more heartbeats, and remove the registration. Raises redis-py's errors, or TimeoutError."""
        self._left = True
        loop = self._loop
        if loop is None or self._ended.done():
            await self._backend.commands.hdel(self._backend.keys.services(), self._registry.id)
            return
        # On the keeper's connection, behind a heartbeat that is in flight. Otherwise that one would register again.
        left = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._unregister(), loop))
        await asyncio.wait({left, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            left.result()

    def _signal(self, event: str) -> None:
        if self._loop:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._loop.call_soon_threadsafe(getattr(self, event).set)

    # ── the thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _run_thread(self, own: Backend) -> None:
        async def keep() -> None:
            async with own:
                await self._keep(own)

        error: BaseException | None = None
        try:
            asyncio.run(keep())
        except BaseException as raised:  # whatever it is, the service must learn of it
            error = raised
        self._tell(_settle, self._ended, error)

    async def _run_here(self) -> None:
        """Keep on the service's own loop, if its backend cannot be used on another thread."""
        error: BaseException | None = None
        try:
            await self._keep(self._backend)
        except BaseException as raised:
            error = raised
        _settle(self._ended, error)

    async def _keep(self, backend: Backend) -> None:
        self._kept = backend
        self._wake, self._stop, self._registering = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        if self._stopping:
            return
        await backend.reach()
        await self._beat()  # a service whose first heartbeat fails does not start
        self._tell(_settle, self._begun, None)
        rounds = asyncio.create_task(self._rounds(), name="keeper")
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([rounds, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end([rounds, stop])
        if not rounds.cancelled():
            rounds.result()

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the service's loop is closed
            self._main.call_soon_threadsafe(what, *arguments)

    async def _rounds(self) -> None:
        """Send a heartbeat and renew all leases, three times in a lease. All calls of a round leave in one write.

        Each handover of the interpreter lock makes the busy thread wait, so this thread should run seldom.
        """
        under_way: set[object] = set()

        async def guarded(call: object, work: Coroutine[Any, Any, None], **where: str) -> None:
            try:
                async with asyncio.timeout(self._lease_ms / 1000):
                    await work
            except (RedisError, OSError) as error:
                log.warning("not_kept", error=str(error) or type(error).__name__, **where)
            finally:
                under_way.discard(call)

        seen, blocked_s = 0, 0.0
        async with asyncio.TaskGroup() as calls:  # an error of a call ends the keeper
            while True:
                # Counted in rounds, not by the clock: a process that was paused as a whole is not blocked.
                blocked_s = blocked_s + self._interval_s if self._turns == seen else 0.0
                seen = self._turns
                # A call that still waits for its answer is not repeated, and delays no other.
                if self._main_turns(blocked_s):
                    if not self._left and "beat" not in under_way:
                        under_way.add("beat")
                        calls.create_task(guarded("beat", self._beat(), what="beat"))
                    for owned, lost in self._registry.leases.held():
                        if owned not in under_way:
                            under_way.add(owned)
                            calls.create_task(guarded(owned, self._renew(owned, lost), what=owned.lease.decode()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s):
                        await self._wake.wait()
                self._wake.clear()

    async def _beat(self) -> None:
        async with self._registering:
            if self._left:
                return
            id_, keys = self._registry.id, self._kept.keys
            begun = time.monotonic()
            beat = await self._kept.functions.service_beat(
                keys.services(), keys.swept(), id_, self._lease_ms, self._information
            )
        ended = time.monotonic()
        services = listed(beat.now, beat.services)
        verdict = self._liveness.judge(begun, ended, {one.id: not one.alive for one in services.values()})
        restarted = self._server not in (None, beat.server)
        self._server = beat.server
        reply = BeatReply(id_, ended, beat.now, services, verdict, beat.swept, verdict.interrupted or restarted)
        self._tell(self._registry.take, reply)
        for service in verdict.dead:
            one = services[service]
            if one.silent_ms > FORGET_AFTER_MS and one.kind != ServiceKind.GATEWAY:
                await self._kept.functions.service_forget(keys.services(), service)

    async def _unregister(self) -> None:
        async with asyncio.timeout(self._lease_ms / 1000), self._registering:
            await self._kept.commands.hdel(self._kept.keys.services(), self._registry.id)

    async def _renew(self, owned: Owned, lost: Callable[[], None]) -> None:
        try:
            await self._kept.functions.lease_renew(owned, self._lease_ms)
        except Fenced:
            self._tell(lost)

    def _main_turns(self, blocked_s: float) -> bool:
        """Whether the service's event loop turns, or has been blocked for less than `MAX_BLOCKED_S`."""
        given_up = blocked_s > MAX_BLOCKED_S
        if given_up and not self._given_up:
            log.critical("event_loop_blocked", service=self._registry.kind, limit_s=MAX_BLOCKED_S)
        self._given_up = given_up
        return not given_up


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
