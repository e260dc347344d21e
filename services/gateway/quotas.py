"""What one user may have of all gateways together: open connections, and requests a second.

Each gateway writes its own numbers to a hash of the user, and reads those of the others with them. Numbers of gateways
that do not live are not counted. Writing a number twice changes nothing, so a repeated call to Redis does no harm.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable

import structlog
from redis.exceptions import RedisError

from tidewire.errors import RateLimited
from tidewire.model.records import text
from tidewire.redis.backend import Backend
from tidewire.tasks import end

log = structlog.get_logger(__name__)

KEPT_S = 86_400
"""Seconds that the numbers of a user are kept after the last one was written."""
CLOSING_S = 1.0
"""Seconds that a gateway that ends takes to tell its last numbers."""
SHARE_S = 1.0
"""Seconds between two looks at how many requests a user makes through the other gateways."""
SHARED_PART = 8
"""A user who makes less than this part of the requests that are allowed, through one gateway, is not looked up."""

Live = Callable[[], Iterable[str]]
"""Returns the ids of the live gateways."""


class ConnectionQuota:
    """The connections of each user. `most` is the maximum of one user; 0 for no limit."""

    def __init__(self, backend: Backend, name: Callable[[], str], live: Live, most: int) -> None:
        self._backend = backend
        self._name = name
        self._live = live
        self._most = most
        self._here: Counter[str] = Counter()
        self._telling: set[asyncio.Task[None]] = set()

    async def enter(self, user: str) -> bool:
        """Count a connection of a user. False if there are too many, and then it does not count."""
        if not self._most:
            return True
        self._here[user] += 1
        try:
            counts = await self._tell(user)
        except (RedisError, OSError) as error:
            log.warning("connections_not_counted", error=str(error))
            return True  # the handshake needs Redis too, and will find out
        except BaseException:
            self.leave(user)
            raise
        if self._here[user] + sum(counts.values()) <= self._most:
            return True
        self.leave(user)
        return False

    def leave(self, user: str) -> None:
        """Count a connection no more. The others learn of it soon."""
        if not self._most:
            return
        self._here[user] -= 1
        task = asyncio.create_task(self._tell_quietly(user), name="quota")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def close(self) -> None:
        """Let the others learn of the last connections that have ended. Call it while Redis is still connected."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=CLOSING_S)
        await end(self._telling)

    async def _tell(self, user: str) -> dict[str, int]:
        """Tell the number of connections here, and return those of the other live gateways."""
        key, name, here = self._backend.keys.user_connections(user), self._name(), self._here[user]
        if not here:
            del self._here[user]
            await self._backend.calls([("HDEL", key, name)])
            return {}
        told = [("HSET", key, name, here), ("EXPIRE", key, KEPT_S), ("HGETALL", key)]
        counts = _counts((await self._backend.calls(told))[-1])
        live = set(self._live())
        return {gateway: count for gateway, count in counts.items() if gateway in live and gateway != name}

    async def _tell_quietly(self, user: str) -> None:
        try:
            await self._tell(user)
        except (RedisError, OSError) as error:
            log.warning("connections_not_counted", error=str(error))


class TokenBucket:
    """Tokens that come at a rate. A full bucket has those of a second, and at least one."""

    def __init__(self, per_s: float, now: float) -> None:
        self.at = now
        """When a token was last asked for, in seconds."""
        self._tokens = per_s

    def take(self, per_s: float, now: float) -> float:
        """Take a token. Returns 0, or the seconds until there is one. `per_s` is the rate, which may change."""
        self._tokens = min(self._tokens + per_s * (now - self.at), max(per_s, 1.0))
        self.at = now
        if self._tokens < 1:
            return (1 - self._tokens) / per_s
        self._tokens -= 1
        return 0.0


class _UserBucket(TokenBucket):
    """The tokens of one user here."""

    def __init__(self, per_s: float, now: float) -> None:
        super().__init__(per_s, now)
        self.share = 1.0
        """Part of the user's requests that may be made here."""
        self.used = 0
        """Requests since the last look at the others."""


class RequestQuota:
    """The requests of each user: `per_s` a second, and as many at once after a second of silence. 0 for no limit."""

    def __init__(
        self,
        backend: Backend,
        name: Callable[[], str],
        live: Live,
        per_s: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._name = name
        self._live = live
        self._per_s = per_s
        self._clock = clock
        self._users: dict[str, _UserBucket] = {}

    def __len__(self) -> int:
        return len(self._users)

    def take(self, user: str) -> None:
        """Count a request. Raises RateLimited if there are too many."""
        if not self._per_s:
            return
        now, bucket = self._clock(), self._users.get(user)
        if bucket is None:
            bucket = self._users[user] = _UserBucket(self._per_s, now)
        bucket.used += 1
        wait_s = bucket.take(self._per_s * bucket.share, now)
        if wait_s:
            raise RateLimited(
                f"this user makes more than {self._per_s} requests a second (TIDEWIRE_LIMIT_REQUESTS_PER_S): "
                "send fewer",
                retry_after_ms=int(1000 * wait_s) + 1,
            )

    async def run(self) -> None:
        """Share the requests of busy users with the other gateways, until cancelled."""
        while self._per_s:
            await asyncio.sleep(SHARE_S)
            try:
                await self.share()
            except (RedisError, OSError) as error:
                log.warning("requests_not_shared", error=str(error))
        await asyncio.Event().wait()

    async def share(self) -> None:
        """Tell how much the busy users have asked for here, and take the part of it as the share of this gateway."""
        now, busy = self._clock(), dict[str, int]()
        for user, bucket in list(self._users.items()):
            if bucket.used * SHARED_PART > self._per_s:
                busy[user] = bucket.used
            elif now - bucket.at > 2 * SHARE_S:
                del self._users[user]  # the bucket is full again
            else:
                bucket.share = 1.0
            bucket.used = 0
        name, live = self._name(), set(self._live())
        told = []
        for user, used in busy.items():
            key = self._backend.keys.user_requests(user)
            told += [("HSET", key, name, used), ("PEXPIRE", key, int(2500 * SHARE_S)), ("HGETALL", key)]
        answers = await self._backend.calls(told) if told else []
        for (user, used), raw in zip(busy.items(), answers[2::3], strict=True):
            counts = _counts(raw)
            total = used + sum(count for gateway, count in counts.items() if gateway in live and gateway != name)
            if user in self._users:
                self._users[user].share = used / total


def _counts(raw: dict[bytes, bytes] | list[bytes]) -> dict[str, int]:
    """Read a hash in the form of RESP3 or RESP2."""
    pairs = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=True)
    return {text(name): int(count) for name, count in pairs}
