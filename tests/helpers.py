"""Helpers of several kinds of tests."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable

from tidewire.services.cli import embedded

__all__ = ["LONG", "free_port", "wait_until"]

LONG = bool(os.environ.get("TIDEWIRE_TEST_LONG"))
"""Whether tests that take minutes run in full (`make test-long`), or in a short form."""


WORKERS = 4
"""Processes that run tests at the same time, at most."""

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
_own = range(10_000 + _worker, 16_384, WORKERS)
_ports = itertools.cycle(random.sample(_own, len(_own)))


def free_port() -> int:
    """Return a free port that nothing else in this test run takes before it is used.

    Each process of the run has ports of its own. Those that `tidewire up` chooses, and the second ports of cluster
    nodes (10,000 above the first), lie elsewhere.
    """
    return next(port for port in _ports if embedded.is_free(port))


async def wait_until(condition: Callable[[], Awaitable[object] | object], what: str, timeout_s: float = 30.0) -> None:
    """Wait until the condition is true. It is checked every 50 ms."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return
        assert time.monotonic() < deadline, f"within {timeout_s} s it did not come to be that {what}"
        await asyncio.sleep(0.05)
