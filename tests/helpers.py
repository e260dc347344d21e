"""What several kinds of tests need."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable

from tidewire.services.cli import embedded

__all__ = ["LONG", "free_port", "wait_until"]

LONG = bool(os.environ.get("TIDEWIRE_TEST_LONG"))
"""Whether what takes minutes is done in full (`make test-long`), or in a short form."""


_given: set[int] = set()


WORKERS = 16
"""Processes that run tests at the same time, at most."""


def free_port() -> int:
    """A free port that no process of this test run is given twice: one that is about to be used may still look free."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    while (port := embedded.free_port()) in _given or port % WORKERS != worker:
        pass
    _given.add(port)
    return port


async def wait_until(condition: Callable[[], Awaitable[object] | object], what: str, timeout_s: float = 30.0) -> None:
    """Until the condition is true; it is asked every 50 ms."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return
        assert time.monotonic() < deadline, f"within {timeout_s} s it did not come to be that {what}"
        await asyncio.sleep(0.05)
