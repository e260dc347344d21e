"""Stamps of a process that takes many partitions at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from redis.exceptions import ConnectionError

from tidewire.process.partition.loop import Stamps
from tidewire.redis.functions import Functions, Stamp
from tidewire.redis.keys import Home, Keys

HOMES = [Keys("dev", 3).home(partition) for partition in range(3)]


class Counting:
    """Functions that note each call, and refuse stamps of an even epoch."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Home, int]] = []
        self._error = error

    async def link_stamp(self, to: Home, stamps: Sequence[Stamp]) -> list[bool]:
        self.calls.append((to, len(stamps)))
        await asyncio.sleep(0)
        if self._error:
            raise self._error
        return [stamp.epoch % 2 == 1 for stamp in stamps]


def stamps_on(functions: Counting) -> Stamps:
    return Stamps(cast(Functions, functions))


async def test_each_destination_gets_the_stamps_of_all_partitions_in_two_calls_at_most() -> None:
    functions = Counting()
    stamps = stamps_on(functions)
    answers = await asyncio.gather(
        *(stamps(to, Stamp(f"broadcaster:{number}", number, ())) for number in range(50) for to in HOMES)
    )
    assert answers == [number % 2 == 1 for number in range(50) for _ in HOMES], "each caller gets its own answer"
    for to in HOMES:
        counts = [count for home, count in functions.calls if home == to]
        assert (sum(counts), len(counts) <= 2) == (50, True)


async def test_a_failed_call_fails_all_stamps_that_it_carried() -> None:
    stamps = stamps_on(Counting(ConnectionError("cut")))
    calls: list[Any] = [stamps(HOMES[0], Stamp(f"store:{number}", 1, ())) for number in range(3)]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        with pytest.raises(ConnectionError, match="cut"):
            raise error
