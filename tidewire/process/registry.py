"""The registry: each process keeps a registration that expires, and learns of all others with each heartbeat."""

from __future__ import annotations

import os
import platform
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from tidewire.model.records import pack, text, unpack
from tidewire.process.liveness import Verdict
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Owned, split_beat

FORGET_AFTER_MS = 60_000
"""How long, in ms, a dead process stays listed. A dead gateway stays until another one has swept it."""


class Registration(NamedTuple):
    """The registration of one process."""

    id: str
    alive: bool
    """Whether it is valid. If it has expired, `Liveness` judges whether the process is dead."""
    silent_ms: int
    """Milliseconds since it expired; negative while it is valid."""
    info: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.info.get("kind"))


class BeatReply(NamedTuple):
    """What one heartbeat of the keeper returned."""

    id: str
    """The id that the heartbeat renewed."""
    at_s: float
    """Time of the answer, on the monotonic clock, in seconds."""
    now_ms: int
    """The server's time at that moment, in ms since 1970."""
    services: dict[str, Registration]
    verdict: Verdict
    swept: bool
    """Whether another gateway has swept this one's connections."""
    doubtful: bool
    """Whether writes may be lost: contact was interrupted, or Redis is another server than before."""


def new_id() -> str:
    """Return a unique id for a process."""
    return secrets.token_hex(6)


def listed(now: int, raw: dict[str, tuple[int, bytes]]) -> dict[str, Registration]:
    """Decode the registrations of a heartbeat's answer."""
    return {id_: Registration(id_, expiry > now, now - expiry, unpack(info)) for id_, (expiry, info) in raw.items()}


class Leases:
    """The leases that the keeper renews. The event loop adds and removes them; the keeper's thread reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Owned, Callable[[], None]] = {}

    def hold(self, owned: Owned, lost: Callable[[], None]) -> None:
        """Have a lease renewed. The event loop calls `lost` if another worker has taken the partition."""
        with self._lock:
            self._held[owned] = lost

    def let_go(self, owned: Owned) -> None:
        """Renew a lease no more."""
        with self._lock:
            self._held.pop(owned, None)

    def held(self) -> list[tuple[Owned, Callable[[], None]]]:
        """Return all leases, each with its `lost`."""
        with self._lock:
            return list(self._held.items())


async def _not_kept() -> None:
    raise RuntimeError("no keeper runs for this registry")


class Registry:
    """This process's registration, and the last known registrations of the others.

    It belongs to the event loop of the service. A `Keeper` sends its heartbeats, renews its leases, and passes the
    answers on.
    """

    def __init__(self, kind: str, describe: Callable[[], dict[str, Any]]) -> None:
        self.id = new_id()
        self.kind = kind
        self.services: dict[str, Registration] = {}
        self.heard_at = 0.0  # monotonic; of the last answer
        self.leases = Leases()
        self.on_swept: Callable[[], None] = lambda: None
        """Called when another gateway has swept this one's connections: it must continue under another id."""
        self.on_doubt: Callable[[], None] = lambda: None
        """Called when items that this process wrote may be lost."""
        self.on_new_id: Callable[[], None] = lambda: None
        self.on_leave: Callable[[], Awaitable[None]] = _not_kept
        self._verdict = Verdict(frozenset(), frozenset(), interrupted=False)
        self._describe = describe
        self._clock_offset_ms = 0.0
        self._fixed = {"kind": kind, "host": platform.node(), "pid": os.getpid()}

    def now_ms(self) -> int:
        """Return the server's time, in ms since 1970, as the last heartbeat has it."""
        return int(time.monotonic() * 1000 + self._clock_offset_ms)

    def live(self, kind: str) -> list[str]:
        """Return the ids of the live processes of a kind, sorted.

        After a loss of contact, those last seen alive count too.
        """
        return sorted(service.id for service in self._of(self._verdict.live) if service.kind == kind)

    def dead(self, kind: str) -> list[Registration]:
        """Return the registrations of a kind whose processes are confirmed dead."""
        return [service for service in self._of(self._verdict.dead) if service.kind == kind]

    def information(self) -> bytes:
        """Return what this process publishes about itself, packed."""
        return pack(self._fixed | self._describe())

    def take(self, reply: BeatReply) -> None:
        """Take over the answer of a heartbeat."""
        self.heard_at = reply.at_s
        self._clock_offset_ms = reply.now_ms - reply.at_s * 1000
        self.services, self._verdict = reply.services, reply.verdict
        if reply.id != self.id:
            return  # a heartbeat under the former id
        if reply.swept:
            self.on_swept()
        elif reply.doubtful:
            self.on_doubt()

    def become_new(self) -> None:
        """Continue under another id. The old one is dead for good."""
        self.id = new_id()
        self.on_new_id()

    async def leave(self) -> None:
        """Remove the registration for good, so that others need not wait until it expires."""
        await self.on_leave()

    def _of(self, ids: frozenset[str]) -> list[Registration]:
        return [service for id_, service in self.services.items() if id_ in ids]


async def all_services(backend: Backend) -> dict[str, Registration]:
    """Return all registrations, for a process that has none itself."""
    now = await backend.now_ms()
    raw = await backend.commands.hgetall(backend.keys.services())
    beats = {text(id_): split_beat(value) for id_, value in raw.items()}
    return listed(now, beats)
