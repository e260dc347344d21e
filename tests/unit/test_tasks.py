"""Ending tasks, also those that swallow a cancellation."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tidewire.tasks import end, leaf, run


@pytest.fixture
def interrupted_soon() -> Iterator[None]:
    """As by Ctrl-C, also where a shell runs the tests in its background and has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    yield
    timer.cancel()
    signal.signal(signal.SIGINT, before)


async def forgetful(told: list[str], times: int = 1) -> str:
    """Work that swallows that many cancellations."""
    for _ in range(times):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.append("cancelled")
    await asyncio.sleep(60)
    return "done"


async def test_tasks_are_cancelled_until_they_end() -> None:
    told: list[str] = []
    tasks = [asyncio.create_task(forgetful(told)), asyncio.create_task(forgetful(told, 2))]
    await asyncio.sleep(0)
    await end(tasks, ask_again_s=0.01)
    assert all(task.cancelled() for task in tasks)
    assert told == ["cancelled"] * 3


@pytest.mark.usefixtures("interrupted_soon")
def test_an_interrupt_ends_work_that_swallowed_it() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(forgetful(told))
    assert told == ["cancelled"]


@pytest.mark.usefixtures("interrupted_soon")
def test_an_interrupted_function_may_end_with_its_own_error() -> None:
    async def careful() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("half of it is done") from None
        return "done"

    with pytest.raises(ValueError, match="half of it is done"):
        run(careful())


def test_without_an_interrupt_it_is_asyncio_run() -> None:
    async def work() -> int:
        return 7

    assert run(work()) == 7


def test_a_leaf_is_the_first_error_at_any_depth() -> None:
    cause = ValueError("the cause")
    inner = ExceptionGroup("inner", [cause, KeyError("later")])
    assert leaf(ExceptionGroup("outer", [inner, OSError("latest")])) is cause
    assert leaf(cause) is cause
