"""Who connects: asks the authorizers, remembers their answers briefly, and hears of revocations at once."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from tidewire.errors import Unauthenticated
from tidewire.model.records import Authorization, Principal
from tidewire.process.bus import Bus
from tidewire.redis.backend import Backend

log = structlog.get_logger(__name__)

REMEMBERED_S = 60.0
CACHED_AT_MOST = 100_000


class Gatekeeper:
    """Answers from the cache are at most `cache_s` old, and never older than a revocation."""

    def __init__(
        self, backend: Backend, bus: Bus, name: Callable[[], str], now_ms: Callable[[], int], cache_s: float
    ) -> None:
        self._backend = backend
        self._now_ms = now_ms
        self._bus = bus
        self._name = name
        self._cache_s = cache_s
        self._cache: dict[bytes, tuple[Principal, float]] = {}
        self._revoked: dict[str, float] = {}
        self._from: bytes | str = "$"
        self.on_revoked: Callable[[str], None] = lambda credential: None

    async def authorize(self, auth_key: str) -> Principal:
        """Who the credential stands for. Raises Unauthenticated, or Timeout/Overloaded when nobody answers."""
        digest = hashlib.sha256(auth_key.encode()).digest()
        cached = self._cache.get(digest)
        if cached and cached[1] > time.monotonic():
            self.check(cached[0])
            return cached[0]
        answer = await self._bus.request(
            self._backend.keys.authorizations(), lambda number: Authorization(auth_key, self._name(), number)
        )
        principal = Principal(*answer)
        self.check(principal)  # the answer may have been decided before the revocation that is known here
        if len(self._cache) >= CACHED_AT_MOST:
            self._cache.clear()
        self._cache[digest] = (principal, time.monotonic() + self._cache_s)
        return principal

    def check(self, principal: Principal) -> None:
        """Raises Unauthenticated when the credential has been revoked or has expired meanwhile."""
        if principal.expires_at is not None and principal.expires_at <= self._now_ms():
            raise Unauthenticated("the auth_key has expired")
        if principal.credential in self._revoked:
            raise Unauthenticated("the auth_key has been revoked")

    async def start(self) -> None:
        """Take the position in the revocations before the first authorization."""
        last = await self._backend.commands.xrevrange(self._backend.keys.revocations(), count=1)
        self._from = last[0][0] or "0-0" if last else "0-0"

    async def run(self) -> None:
        """Follow the revocations until cancelled."""
        stream = self._backend.keys.revocations()
        while True:
            try:
                found = await self._backend.read({stream: self._from})
            except (RedisError, OSError) as error:
                log.warning("revocations_not_read", error=str(error))
                await asyncio.sleep(0.2)
                continue
            for _, entries in found:
                for id_, fields in entries:
                    self._from = id_
                    self._revoke(fields[b"credential"].decode())
            now = time.monotonic()
            self._revoked = {id_: until for id_, until in self._revoked.items() if until > now}

    def _revoke(self, credential: str) -> None:
        self._revoked[credential] = time.monotonic() + REMEMBERED_S
        self._cache = {digest: cached for digest, cached in self._cache.items() if cached[0].credential != credential}
        self.on_revoked(credential)
