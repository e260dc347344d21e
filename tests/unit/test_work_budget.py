"""The budget of work: requests that begin, wait or are refused, and costs learned from answers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.errors import RateLimited
from tidewire.services.gateway.work import BURST_MS, FORGET_S, FREE, GUESS_BYTES_PER_MS, Work, WorkBudget

MS_PER_S = 100


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def begin(budget: WorkBudget, user: str | None = "alice", action: str = "put", size: int = 100) -> Work:
    return await budget.admit(user, action, size, size)


async def waits(budget: WorkBudget, user: str = "alice", action: str = "put") -> bool:
    """Whether a request of the user would wait now."""
    task = asyncio.create_task(begin(budget, user, action))
    for _ in range(5):
        await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        return True
    task.result().cancel()
    return False


async def done(budget: WorkBudget, cost_ms: float, user: str = "alice", action: str = "put") -> None:
    work = await begin(budget, user, action)
    work.cost(cost_ms)
    work.close()


async def test_a_user_whose_requests_cost_too_much_waits_until_the_debt_is_paid() -> None:
    clock = Clock()
    budget = WorkBudget(MS_PER_S, clock)
    await done(budget, 3 * BURST_MS)
    assert await waits(budget), "the debt is three bursts"
    assert not await waits(budget, "bob"), "another user has no debt"
    clock.now += 2 * BURST_MS / MS_PER_S
    assert await waits(budget), "one burst is left, and the next request is expected to cost three"
    clock.now += BURST_MS / MS_PER_S
    assert not await waits(budget), "alone, and without debt, it may exceed the burst"


async def test_cheap_requests_of_a_user_do_not_wait() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    works = [await asyncio.wait_for(begin(budget), 5) for _ in range(64)]
    for work in works:
        work.cost(0.1)
        work.close()
    assert not await waits(budget)


async def test_a_request_under_way_counts_as_much_as_the_last_one() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    await done(budget, BURST_MS / 4)
    under_way = [await asyncio.wait_for(begin(budget), 5) for _ in range(3)]
    waiting = asyncio.create_task(begin(budget))
    await asyncio.sleep(0)
    assert not waiting.done(), "with the debt, four of them fill the burst"
    under_way[0].cost(0.0)
    under_way[0].close()
    await asyncio.wait_for(waiting, 5)


async def test_the_first_requests_of_an_action_are_guessed_from_their_bytes() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    large = 1 << 20
    few = [await asyncio.wait_for(budget.admit("alice", "query", 100, large), 5) for _ in range(5)]
    waiting = asyncio.create_task(budget.admit("alice", "query", 100, large))
    await asyncio.sleep(0)
    assert not waiting.done(), "nobody knows yet what they cost"
    few[0].cost(0.2)
    few[0].close()
    await asyncio.wait_for(waiting, 5)
    many = [await asyncio.wait_for(begin(budget, action="query"), 5) for _ in range(20)]
    assert many, "the first answer has shown that they cost little"


async def test_a_large_request_is_never_expected_to_be_cheap() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    await done(budget, 0.1)
    large = int(0.6 * BURST_MS * GUESS_BYTES_PER_MS)
    await asyncio.wait_for(budget.admit("alice", "put", large, 100), 5)
    waiting = asyncio.create_task(budget.admit("alice", "put", large, 100))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_a_request_that_did_not_begin_counts_nothing() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    await done(budget, BURST_MS)
    clock = budget._clock
    assert isinstance(clock, Clock)
    clock.now += BURST_MS / MS_PER_S
    (await asyncio.wait_for(begin(budget), 5)).cancel()
    assert not await waits(budget)


async def test_work_without_a_request_makes_the_next_one_wait() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    budget.charge("alice", 2 * BURST_MS)
    assert await waits(budget)


async def test_a_request_over_http_is_refused_when_it_would_wait_too_long() -> None:
    budget = WorkBudget(MS_PER_S)
    budget.charge("alice", 1000 * BURST_MS)
    with pytest.raises(RateLimited, match="TIDEWIRE_LIMIT_WORK_MS_PER_S") as refusal:
        await budget.admit("alice", "put", 100, 100, max_wait_s=0.05)
    assert refusal.value.details["retry_after_ms"] > 1000


async def test_a_request_whose_peer_is_gone_waits_no_longer() -> None:
    budget = WorkBudget(MS_PER_S, Clock())
    budget.charge("alice", 2 * BURST_MS)
    await asyncio.wait_for(budget.admit("alice", "put", 100, 100, gone=lambda: True), 5)


async def test_without_a_user_or_a_limit_nothing_is_counted() -> None:
    assert await WorkBudget(MS_PER_S).admit(None, "put", 100, 100) is FREE
    unlimited = WorkBudget(0)
    assert await unlimited.admit("alice", "put", 100, 100) is FREE
    unlimited.charge("alice", 1e9)
    assert len(unlimited) == 0


async def test_users_without_requests_are_forgotten() -> None:
    clock = Clock()
    budget = WorkBudget(MS_PER_S, clock)
    for number in range(100):
        await done(budget, 0.1, f"user{number}")
    busy = await begin(budget, "busy")
    clock.now += FORGET_S + 1
    await done(budget, 0.1)
    assert len(budget) == 2, "alice, and busy with a request under way"
    busy.close()


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(0, 2)), min_size=1, max_size=40))
def test_a_user_gets_no_more_work_done_than_the_rate_a_burst_and_one_request(steps: list[tuple[float, float]]) -> None:
    """Requests of any cost with any pauses: in the long run, the work that begins keeps to the rate."""
    clock = Clock()
    budget = WorkBudget(MS_PER_S, clock)
    work_ms = largest = 0.0

    async def run() -> None:
        nonlocal work_ms, largest
        for cost_ms, pause_s in steps:
            clock.now += pause_s
            if await waits(budget):
                continue
            await done(budget, cost_ms)
            work_ms += cost_ms
            largest = max(largest, cost_ms)

    begun = clock.now
    asyncio.run(run())
    assert work_ms <= MS_PER_S * (clock.now - begun) + BURST_MS + largest + 1e-6
