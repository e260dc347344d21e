"""Who connects: the gatekeeper asks the authorizers, caches their answers briefly, and follows the revocations."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from tidewire.errors import Unauthenticated
from tidewire.model.credentials import ApiKey
from tidewire.model.records import Authorization, Principal
from tidewire.process.bus import Bus
from tidewire.redis.backend import Backend

log = structlog.get_logger(__name__)

REVOKED_FOR_S = 60.0
"""Seconds for which a revocation is remembered: longer than any answer under way may take."""
MAX_CACHED = 100_000
"""Maximum cached credentials. At this number the whole cache is dropped."""


class Gatekeeper:
    """Authorizes credentials.

    A cached answer is at most `cache_s` seconds old, and is dropped when its credential is revoked.
    """

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
        """Return whom a credential stands for.

        Raises:
            Unauthenticated: the credential is not valid.
            Timeout, Overloaded: no authorizer answers.
        """
        if ApiKey.parse(auth_key) is None:  # a malformed credential is not worth an entry in Redis
            raise Unauthenticated("the auth_key is not valid")
        digest = hashlib.sha256(auth_key.encode()).digest()
        cached = self._cache.get(digest)
        if cached and cached[1] > time.monotonic():
            self.check(cached[0])
            return cached[0]
        answer = await self._bus.request(
            self._backend.keys.authorizations(), lambda number: Authorization(auth_key, self._name(), number)
        )
        principal = Principal(*answer)
        self.check(principal)  # the authorizer may have answered before a revocation that is known here
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[digest] = (principal, time.monotonic() + self._cache_s)
        return principal

    def check(self, principal: Principal) -> None:
        """Raise Unauthenticated if the credential has expired, or was revoked."""
        if principal.expires_at is not None and principal.expires_at <= self._now_ms():
            raise Unauthenticated("the auth_key has expired")
        if principal.credential in self._revoked:
            raise Unauthenticated("the auth_key has been revoked")

    async def start(self) -> None:
        """Note the newest revocation, before the first authorization."""
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
        self._revoked[credential] = time.monotonic() + REVOKED_FOR_S
        self._cache = {digest: cached for digest, cached in self._cache.items() if cached[0].credential != credential}
        self.on_revoked(credential)
