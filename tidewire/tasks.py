"""Ending tasks, and finding out why one has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def end(tasks: Iterable[asyncio.Task[Any]], *, ask_again_s: float = 0.2) -> None:
    """Cancel tasks and wait until all have ended. Their errors are not raised.

    One cancellation is not always enough: `asyncio.wait_for` of Python 3.11 swallows one that arrives in the moment its
    work is done, and redis-py has a `wait_for` around each write. So the tasks are cancelled again every `ask_again_s`
    seconds. A task with a cleanup of its own needs a longer time, because another cancellation interrupts the cleanup.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=ask_again_s)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run like `asyncio.run`, but end for certain after an interrupt, however often the work must be cancelled."""

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


def leaf(error: BaseException) -> BaseException:
    """Return the first error inside an exception group, at any depth; or the error itself if it is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
