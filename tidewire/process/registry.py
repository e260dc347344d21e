"""The registry: every service process keeps a word in it that expires, and hears of all others with each beat."""

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
"""How long a dead service stays listed, in ms. A gateway is forgotten by the one that swept it."""


class Registration(NamedTuple):
    """One process, as registered."""

    id: str
    alive: bool  # its word is valid; whether it is dead is for `Liveness` to judge
    silent_ms: int  # since its word expired; negative while it is alive
    info: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.info.get("kind"))


class BeatReply(NamedTuple):
    """What the keeper heard with one beat."""

    id: str
    """The id that the beat renewed."""
    at_s: float
    """When the answer came, on the monotonic clock."""
    now_ms: int
    """The server's time then."""
    services: dict[str, Registration]
    verdict: Verdict
    swept: bool
    """Another gateway has removed this one's connections."""
    doubtful: bool
    """Writes may be lost, or this process may have looked dead: contact was interrupted, or the server is another."""


def new_id() -> str:
    """An id for a process: time-sortable is not needed, unique is."""
    return secrets.token_hex(6)


def listed(now: int, raw: dict[str, tuple[int, bytes]]) -> dict[str, Registration]:
    """The services of a beat's answer."""
    return {id_: Registration(id_, expiry > now, now - expiry, unpack(info)) for id_, (expiry, info) in raw.items()}


class Leases:
    """The leases that the keeper renews. The event loop adds and removes them, the keeper's thread reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Owned, Callable[[], None]] = {}

    def hold(self, owned: Owned, lost: Callable[[], None]) -> None:
        """Have a lease renewed. The event loop calls `lost` when a renewal is fenced."""
        with self._lock:
            self._held[owned] = lost

    def let_go(self, owned: Owned) -> None:
        with self._lock:
            self._held.pop(owned, None)

    def held(self) -> list[tuple[Owned, Callable[[], None]]]:
        with self._lock:
            return list(self._held.items())


async def _not_kept() -> None:
    raise RuntimeError("no keeper runs for this registry")


class Registry:
    """What this process says of itself, and what it last heard of the others.

    It belongs to the event loop of the service. A `Keeper` sends its beats, renews its leases, and gives it what it
    hears.
    """

    def __init__(self, kind: str, describe: Callable[[], dict[str, Any]]) -> None:
        self.id = new_id()
        self.kind = kind
        self.services: dict[str, Registration] = {}
        self.heard_at = 0.0  # monotonic; of the last answer
        self.leases = Leases()
        self.on_swept: Callable[[], None] = lambda: None
        """Called when another gateway has removed this one's connections: it needs another id."""
        self.on_doubt: Callable[[], None] = lambda: None
        """Called when items that this process wrote may be gone."""
        self.on_new_id: Callable[[], None] = lambda: None
        self.on_leave: Callable[[], Awaitable[None]] = _not_kept
        self._verdict = Verdict(frozenset(), frozenset(), interrupted=False)
        self._describe = describe
        self._clock_offset_ms = 0.0
        self._fixed = {"kind": kind, "host": platform.node(), "pid": os.getpid()}

    def now_ms(self) -> int:
        """The server's time, as far as it is known here."""
        return int(time.monotonic() * 1000 + self._clock_offset_ms)

    def live(self, kind: str) -> list[str]:
        """Ids of the live services of a kind, sorted. While the registry was away, nobody is taken off."""
        return sorted(service.id for service in self._of(self._verdict.live) if service.kind == kind)

    def dead(self, kind: str) -> list[Registration]:
        """Services of a kind whose death is confirmed."""
        return [service for service in self._of(self._verdict.dead) if service.kind == kind]

    def information(self) -> bytes:
        """What this process tells the others, packed."""
        return pack(self._fixed | self._describe())

    def take(self, heard: BeatReply) -> None:
        """Take what the keeper heard."""
        self.heard_at = heard.at_s
        self._clock_offset_ms = heard.now_ms - heard.at_s * 1000
        self.services, self._verdict = heard.services, heard.verdict
        if heard.id != self.id:
            return  # a beat under the id before
        if heard.swept:
            self.on_swept()
        elif heard.doubtful:
            self.on_doubt()

    def become_new(self) -> None:
        """Go on under another id: the old one counts as dead, and stays so."""
        self.id = new_id()
        self.on_new_id()

    async def leave(self) -> None:
        """Take the word back, for good: others need not wait until it expires."""
        await self.on_leave()

    def _of(self, ids: frozenset[str]) -> list[Registration]:
        return [service for id_, service in self.services.items() if id_ in ids]


async def all_services(backend: Backend) -> dict[str, Registration]:
    """The list, for a process that is no service itself."""
    now = await backend.now_ms()
    raw = await backend.commands.hgetall(backend.keys.services())
    beats = {text(id_): split_beat(value) for id_, value in raw.items()}
    return listed(now, beats)
