"""Bounds the work that the requests of each user make for the rest of the system. No I/O; only `admit` waits.

Work is measured in ms of machine time. The store says what a request cost when it answers it. Until then, the request
counts as much as the last ones of its user and action did. A user may be ahead of the allowed rate by a burst. One who
is further ahead waits, and the gateway reads nothing more from that connection meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from tidewire.errors import RateLimited

BURST_MS = 50.0
"""Work that a user who was idle may have under way at once."""
GUESS_BYTES_PER_MS = 16_384
"""Bytes of a request, and at most of its answer, that are guessed to cost a ms while nothing better is known."""
MAX_GUESS_MS = BURST_MS / 5
"""Maximum work that a user's first request of an action is guessed to make, so that a few may be under way at once."""
LEARNED = 0.25
"""Weight of the newest cost in the estimate for the user's next request of that action, if it was lower."""
FORGET_S = 60.0
"""Seconds after which a user without requests is forgotten."""
CHECK_S = 0.1
"""Seconds between two checks whether the peer of a waiting request is gone."""
MAX_HTTP_WAIT_S = 2.0
"""Maximum seconds that a request over HTTP waits. One over a websocket waits as long as it must."""


class _User:
    """The spent and the pending work of one user."""

    def __init__(self, now: float) -> None:
        self.debt_ms = 0.0
        """Work that was done beyond the allowed rate, as of `at`."""
        self.at = now
        self.under_way = 0
        self.under_way_ms = 0.0
        self.expected_ms: dict[str, float] = {}
        """By action: what the next request is expected to cost."""
        self.changed = asyncio.Event()


class Work:
    """The work of one request under way."""

    def __init__(self, user: _User | None, action: str, expected_ms: float) -> None:
        self._user = user
        self._action = action
        self._expected_ms = self._cost_ms = expected_ms

    def cost(self, cost_ms: float) -> None:
        """Note what the request has cost. Without this, it counts as much as was expected."""
        self._cost_ms = cost_ms
        if self._user:
            before = self._user.expected_ms.get(self._action, cost_ms)
            self._user.expected_ms[self._action] = max(cost_ms, before + LEARNED * (cost_ms - before))

    def cancel(self) -> None:
        """The request was not begun, so it counts nothing."""
        self._cost_ms = 0.0
        self.close()

    def close(self) -> None:
        """The request is under way no longer. May be called again."""
        user, self._user = self._user, None
        if user:
            user.under_way -= 1
            user.under_way_ms -= self._expected_ms
            user.debt_ms += self._cost_ms
            user.changed.set()


FREE = Work(None, "", 0.0)
"""The work of a request that is not counted."""


class WorkBudget:
    """The work of all users of one gateway."""

    def __init__(self, ms_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ms_per_s = ms_per_s
        self._clock = clock
        self._users: dict[str, _User] = {}
        self._forget_at = clock() + FORGET_S

    def __len__(self) -> int:
        return len(self._users)

    async def admit(
        self,
        user: str | None,
        action: str,
        request_bytes: int,
        answer_bytes: int,
        gone: Callable[[], bool] = lambda: False,
        max_wait_s: float | None = None,
    ) -> Work:
        """Wait until the user may begin a request, unless its peer is `gone`. Without a user, nothing is counted.

        `request_bytes` is the size of the request, and `answer_bytes` the maximum size of its answer.

        Raises:
            RateLimited: it would have waited longer than `max_wait_s`. Nothing was done.
        """
        if user is None or not self._ms_per_s:
            return FREE
        begun = self._clock()
        known = self._user(user)
        while True:
            guess_ms = min(max(request_bytes, answer_bytes) / GUESS_BYTES_PER_MS, MAX_GUESS_MS)
            expected_ms = max(known.expected_ms.get(action, guess_ms), request_bytes / GUESS_BYTES_PER_MS)
            wait_ms = self._wait_ms(known, expected_ms)
            if wait_ms <= 0 or gone():
                break
            if max_wait_s is not None and self._clock() - begun >= max_wait_s:
                raise RateLimited(
                    f"the requests of this user make more than {self._ms_per_s:g} ms of work a second "
                    "(TIDEWIRE_LIMIT_WORK_MS_PER_S): send fewer, or ask for less at a time",
                    retry_after_ms=int(wait_ms) + 1,
                )
            known.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(wait_ms / 1000, CHECK_S)):
                    await known.changed.wait()
        known.under_way += 1
        known.under_way_ms += expected_ms
        return Work(known, action, expected_ms)

    def charge(self, user: str, cost_ms: float) -> None:
        """Count work that no request waited for. The user's next ones wait instead."""
        if self._ms_per_s:
            self._user(user).debt_ms += cost_ms

    def _user(self, name: str) -> _User:
        now = self._clock()
        if now >= self._forget_at:
            self._forget_at = now + FORGET_S
            for other, user in list(self._users.items()):
                if not user.under_way and user.at < now - FORGET_S:
                    del self._users[other]
        known = self._users.get(name)
        if known is None:
            known = self._users[name] = _User(now)
        return known

    def _wait_ms(self, user: _User, expected_ms: float) -> float:
        """Return about how long the user must wait, in ms. A request that exceeds the burst waits for an idle user."""
        now = self._clock()
        user.debt_ms = max(user.debt_ms - self._ms_per_s * (now - user.at), 0.0)
        user.at = now
        beyond_ms = user.debt_ms + user.under_way_ms + expected_ms - BURST_MS
        if not user.under_way:
            beyond_ms = min(beyond_ms, user.debt_ms)
        return 1000 * beyond_ms / self._ms_per_s
