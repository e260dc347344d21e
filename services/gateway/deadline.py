"""The deadline of a handshake: it ends in a welcome or in a refusal, whatever does not answer behind the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import structlog
from prometheus_client import Counter

from tidewire.errors import Overloaded

log = structlog.get_logger(__name__)

T = TypeVar("T")

TIMED_OUT = Counter("tidewire_gateway_handshakes_timed_out_total", "Handshakes refused because a step did not end.")


class Deadline:
    """One handshake's deadline, from the moment it is made, and the step that the handshake waits for."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until = asyncio.get_running_loop().time() + timeout_s
        self.step = "a credential to be authorized"

    async def bound(self, work: Awaitable[T]) -> T:
        """The result of the work. Raises Overloaded at the deadline, and logs the step.

        The work is then cancelled, and may still be clearing away: that can wait for what did not answer.
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
