"""The budget of answers under way: reservations, waits and refusals, and that all of it is returned."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.errors import Overloaded
from tidewire.model.protocol import parse_request
from tidewire.services.gateway import budget
from tidewire.services.gateway.budget import PAGE_BYTES, SMALL_BYTES, AnswerBudget, max_bytes


def max_bytes_of(action: str, **fields: Any) -> int:
    return max_bytes(parse_request({"action": action, **fields}), 262_144)


def test_the_most_that_an_answer_can_have_follows_from_its_request() -> None:
    whole_page = max_bytes_of("query", table="t", key="k", limit=1000)
    assert PAGE_BYTES < whole_page < 2 * PAGE_BYTES
    assert max_bytes_of("query", table="t", key="k", limit=1) == max_bytes_of("get", table="t", key="k")
    assert 262_144 <= max_bytes_of("update", table="t", key="k") < 300_000
    assert max_bytes_of("put", table="t", item={"id": "k"}) == max_bytes_of("ping") == SMALL_BYTES
    put = {"action": "put", "table": "t", "item": {"id": "k"}}
    update = {"action": "update", "table": "t", "key": "k"}
    assert max_bytes_of("transact", operations=[put] * 3) < 2 * SMALL_BYTES
    assert max_bytes_of("transact", operations=[put, update, update]) > 2 * 262_144


async def test_a_connection_waits_for_its_own_answers() -> None:
    answers = AnswerBudget(100)
    first = await answers.room("c1", "alice", 80)
    waiting = asyncio.create_task(answers.room("c1", "alice", 80))
    await asyncio.sleep(0)
    other = await answers.room("c2", "alice", 80)
    assert not waiting.done(), "its own connection is full"
    first.resize(20)
    second = await asyncio.wait_for(waiting, 10)
    assert answers.held_bytes == 180
    for room in (first, second, other, other):
        room.close()
    assert answers.held_bytes == 0


async def test_over_the_budget_of_a_user_or_the_gateway_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_WAIT_S", 0.05)
    answers = AnswerBudget(100)
    for name in ("c1", "c2"):
        await answers.room(name, "alice", 100)
    with pytest.raises(Overloaded, match="TIDEWIRE_LIMIT_ANSWER_BYTES") as refusal:
        await answers.room("c3", "alice", 100)
    assert "of this user" in refusal.value.message
    for number in range(14):
        await answers.room(f"s{number}", None, 100)
    with pytest.raises(Overloaded, match="of this gateway"):
        await answers.room("c4", "bob", 100)
    assert answers.held_bytes == 1600, "what was refused holds nothing"


async def test_an_answer_larger_than_the_budget_goes_alone() -> None:
    answers = AnswerBudget(100)
    async with asyncio.timeout(10):
        with await answers.room("c1", "alice", 5000):
            pass
        with await AnswerBudget(0).room("c1", "alice", 5000), await AnswerBudget(0).room("c1", "alice", 5000):
            pass
    assert answers.held_bytes == 0


async def test_an_answer_to_a_peer_that_is_gone_is_not_waited_for() -> None:
    answers, gone = AnswerBudget(100), asyncio.Event()
    await answers.room("c1", "alice", 100)
    waiting = asyncio.create_task(answers.room("c1", "alice", 100, gone.is_set))
    await asyncio.sleep(0)
    assert not waiting.done()
    gone.set()
    (await asyncio.wait_for(waiting, 30)).close()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 120), st.booleans())))
def test_the_budget_stays_within_its_bounds_and_is_given_back(
    steps: list[tuple[str, str, int, bool]],
) -> None:
    async def main() -> None:
        answers, held = AnswerBudget(100), list[budget.Room]()
        for connection, user, size, close in steps:
            owners = ("g", f"u{user}", f"c{connection}{user}")
            if answers.full(owners, size) is None:
                held.append(await answers.room(connection + user, user, size))
            if close and held:
                held.pop(0).close()
            for owner, most in (("g", 1600), ("ux", 200), ("uy", 200)):
                assert answers.full((owner,), 0) is None or answers.held_bytes <= most + 120
        for room in held:
            room.close()
        assert answers.held_bytes == 0

    asyncio.run(main())
