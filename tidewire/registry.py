"""Who is alive: every service process says so each second, and hears of all others in the same call."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog
from redis.exceptions import RedisError

from tidewire.backend import Backend
from tidewire.functions import split_beat
from tidewire.records import pack, text, unpack

log = structlog.get_logger(__name__)

FORGET_AFTER_MS = 60_000
"""For so long a dead service is still listed, unless something of it must be cleaned up first."""


class Service(NamedTuple):
    """One process, as registered."""

    id: str
    alive: bool
    silent_ms: int  # since its word expired; negative while it is alive
    info: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.info.get("kind"))


def new_id() -> str:
    """An id for a process: time-sortable is not needed, unique is."""
    return secrets.token_hex(6)


def listed(now: int, raw: dict[str, tuple[int, bytes]]) -> dict[str, Service]:
    """The services of a beat's answer."""
    return {id_: Service(id_, expiry > now, now - expiry, unpack(info)) for id_, (expiry, info) in raw.items()}


class Registry:
    """This process's word, renewed at a third of its length, and the last known list of the others."""

    def __init__(self, backend: Backend, kind: str, ttl_ms: int, describe: Callable[[], dict[str, Any]]) -> None:
        self.id = new_id()
        self.kind = kind
        self.services: dict[str, Service] = {}
        self.heard_at = 0.0  # monotonic; of the last answer
        self.lapsed = False  # its word expired before it was renewed: others have counted it dead
        self._backend = backend
        self._ttl_ms = ttl_ms
        self._describe = describe
        self._clock_offset_ms = 0.0
        self._fixed = {"kind": kind, "host": platform.node(), "pid": os.getpid()}

    def now_ms(self) -> int:
        """The server's time, as far as it is known here."""
        return int(time.monotonic() * 1000 + self._clock_offset_ms)

    def live(self, kind: str) -> list[str]:
        """Ids of the live services of a kind, sorted."""
        return sorted(id_ for id_, service in self.services.items() if service.alive and service.kind == kind)

    async def beat(self) -> None:
        """Say it once, and hear of the others."""
        information = pack(self._fixed | self._describe())
        begun = time.monotonic()
        now, raw = await self._backend.functions.service_beat(
            self._backend.keys.services(), self.id, self._ttl_ms, information
        )
        if self.heard_at and (begun - self.heard_at) * 1000 > self._ttl_ms:
            self.lapsed = True
        self.heard_at = time.monotonic()
        self._clock_offset_ms = now - self.heard_at * 1000
        self.services = listed(now, raw)
        for service in self.services.values():
            if service.silent_ms > FORGET_AFTER_MS and service.kind != "gateway":  # those are swept first
                await self.forget(service.id)

    async def forget(self, service: str) -> None:
        await self._backend.commands.hdel(self._backend.keys.services(), service)

    def become_new(self) -> None:
        """Go on under another id: the old one counts as dead, and stays so."""
        self.id, self.lapsed = new_id(), False

    async def leave(self) -> None:
        """Take the word back: others need not wait until it expires."""
        await self.forget(self.id)

    async def run(self) -> None:
        """Beat until cancelled; a Redis that does not answer is tried again."""
        while True:
            try:
                await self.beat()
            except (RedisError, OSError) as error:
                log.warning("beat_failed", error=str(error))
            await asyncio.sleep(self._ttl_ms / 3000)


async def all_services(backend: Backend) -> dict[str, Service]:
    """The list for one who is no service."""
    now = await backend.now_ms()
    raw = await backend.commands.hgetall(backend.keys.services())
    beats = {text(id_): split_beat(value) for id_, value in raw.items()}
    return listed(now, beats)
