"""The deadline of a handshake. It ends in a welcome or a refusal, even if Redis or another service does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import structlog
from prometheus_client import Counter

from tidewire.errors import Overloaded

log = structlog.get_logger(__name__)

T = TypeVar("T")

TIMED_OUT = Counter(
    "tidewire_gateway_handshakes_timed_out_total", "Handshakes refused because a step did not finish in time."
)


class Deadline:
    """The deadline of one handshake, counted from its construction."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until = asyncio.get_running_loop().time() + timeout_s
        self.step = "a credential to be authorized"
        """What the handshake waits for at the moment; the log names it."""

    async def bound(self, work: Awaitable[T]) -> T:
        """Await the work until the deadline, and return its result.

        At the deadline the work is cancelled, but not awaited: its cleanup may wait for the same Redis.

        Raises:
            Overloaded: the deadline has passed; the log names the step.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=max(self._until - asyncio.get_running_loop().time(), 0))
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        task.cancel()
        TIMED_OUT.inc()
        log.warning("handshake_timed_out", waited_for=self.step, limit_s=self._timeout_s)
        raise Overloaded(f"the handshake did not end within {self._timeout_s:g} s: connect again")
