"""Ending tasks so that they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def end(tasks: Iterable[asyncio.Task[Any]], *, ask_again_s: float = 0.2) -> None:
    """Cancel, and wait until all are done; what they raise is theirs to say.

    Once is not always enough: `asyncio.wait_for` of Python 3.11 forgets a cancellation that arrives in the moment its
    work is done, and the Redis client has one around each write. What has something of its own to clear away wants a
    longer `ask_again_s`: a second cancellation interrupts that.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=ask_again_s)


def run(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, but an interrupt ends it for certain, however often the work must be told."""

    async def watch() -> T:
        work = asyncio.create_task(main)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            await end([work], ask_again_s=1)
            if work.cancelled():
                raise
        return work.result()

    return asyncio.run(watch())
