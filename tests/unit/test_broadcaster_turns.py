"""Decisions that take long give other tasks their turn, and end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

import pytest

from tidewire.services.broadcaster import service
from tidewire.services.broadcaster.service import in_turns

MANY = 10_000


def busy(step_s: float) -> Generator[None, bool | None, int]:
    """Take a while for each step, and return how many there were when the time was up."""
    for number in range(MANY):
        until = time.perf_counter() + step_s
        while time.perf_counter() < until:
            pass
        if (yield):
            return number
    return MANY


async def test_a_long_decision_ends_when_its_time_is_up() -> None:
    begun = time.perf_counter()
    assert await in_turns(busy(0.01)) < MANY
    assert time.perf_counter() - begun < MANY * 0.01 / 2, "it did not take all steps"


async def test_other_tasks_get_a_turn_after_each_long_step() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    steps = await in_turns(busy(2 * service.STEP_S))
    task.cancel()
    assert turns >= steps


async def test_steps_that_take_no_time_do_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STEP_S", 60.0)

    async def other() -> None:
        raise AssertionError("it had a turn")

    task = asyncio.create_task(other())
    assert await in_turns(busy(0.0)) == MANY
    task.cancel()


async def test_an_error_of_a_step_is_raised() -> None:
    def failing() -> Generator[None, bool | None, int]:
        yield
        raise ValueError("no such attribute")

    with pytest.raises(ValueError, match="no such attribute"):
        await in_turns(failing())
