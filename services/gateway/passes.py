"""Passes: frames that arrive close together leave together, in slices between which requests get their turn.

Frames of a feed gather while the event loop is busy. A pass writes what has gathered to every live follower, in one
buffer. So a gateway that cannot keep up does less for each frame, not more. Between two slices the loop reads,
answers and pings. Under load a pass begins at most every `PASS_S`: fewer and larger writes cost the sender and the
receivers less.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Protocol

import structlog

log = structlog.get_logger(__name__)

SLICE_S = 0.002
"""Seconds of delivering after which the loop gets its turn."""
PASS_S = 0.01
"""Seconds between the beginnings of two passes under load."""


class Source(Protocol):
    """A feed that has gathered frames."""

    def deliver(self) -> Iterator[None]:
        """Deliver what has gathered, yielding after every few followers."""


class Passes:
    """Delivers what sources have gathered. Each source's frames leave in their order."""

    def __init__(self) -> None:
        self._due: dict[Source, None] = {}
        self._is_running = False
        self._begun = 0.0
        self._work: Iterator[None] = iter(())

    def add(self, source: Source) -> None:
        """Have a source's frames delivered soon."""
        self._due[source] = None
        if not self._is_running:
            self._is_running = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        due, self._due = self._due, {}
        self._begun = time.perf_counter()
        self._work = itertools.chain.from_iterable(source.deliver() for source in due)
        self._slice()

    def _slice(self) -> None:
        loop, until = asyncio.get_running_loop(), time.perf_counter() + SLICE_S
        while True:
            try:
                for _ in self._work:
                    if time.perf_counter() >= until:
                        loop.call_soon(self._slice)
                        return
                break
            except Exception:  # of one source. Its followers find a gap later, and read the feed
                log.exception("not_delivered")
        if self._due:
            loop.call_later(max(0.0, self._begun + PASS_S - time.perf_counter()), self._begin)
        else:
            self._is_running = False
