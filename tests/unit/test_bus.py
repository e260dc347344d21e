"""The asking side of the bus, without a server: what it holds, and for how long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tidewire.bus import Bus
from tidewire.errors import Overloaded, Timeout


def unsent(timeout_s: float, **limits: int) -> Bus:
    """A bus whose requests stay where they are."""
    backend: Any = None
    return Bus(backend, lambda: "gateway", timeout_s=timeout_s, **limits)


def ask(bus: Bus) -> asyncio.Future[Any]:
    return bus.request(b"stream", lambda number: (number,))


async def test_what_is_not_answered_times_out_in_the_order_of_asking() -> None:
    bus, order = unsent(0.02), list[str]()

    async def asked(name: str) -> None:
        with pytest.raises(Timeout, match="may or may not be done"):
            await ask(bus)
        order.append(name)

    await asyncio.gather(*(asked(name) for name in ("first", "second", "third")))
    assert order == ["first", "second", "third"]


async def test_one_asked_after_all_have_timed_out_times_out_too() -> None:
    bus = unsent(0.01)
    for _ in range(3):
        with pytest.raises(Timeout):
            await asyncio.wait_for(ask(bus), 5)


async def test_what_has_timed_out_makes_room_for_others() -> None:
    bus = unsent(0.01, most_waiting=1)
    first = ask(bus)
    with pytest.raises(Overloaded):
        ask(bus)
    with pytest.raises(Timeout):
        await first
    with pytest.raises(Timeout):
        await ask(bus)
