"""Writers are charged for the appends that their changes make."""

from __future__ import annotations

from typing import Any

import fakeredis
import pytest

from tidewire.app import App
from tidewire.audiences import Audience, everyone, user
from tidewire.model.records import Change, Item, Reply
from tidewire.redis.keys import Keys
from tidewire.services.store import spread
from tidewire.services.store.spread import APPENDS_PER_MS, FREE_APPENDS, Spread
from tidewire.testing import FakeBackend

KEYS = Keys("dev", 4)


def failing(_: Item) -> Audience:
    raise ValueError("a fault of the application")


def make_app() -> App:
    app = App("test")
    rooms = app.membership("members", group="room", member="user")
    app.table("messages", key=("room", "id"), readers=rooms.of("room"), writers=everyone)
    app.table("lists", key="id", readers=user("to"), writers=everyone)
    app.table("failing", key="id", readers=failing, writers=everyone)
    app.check()
    return app


def change(table: str, new: Item | None, old: Item | None = None) -> Change:
    return Change("MODIFY", table, {"id": 1}, 1, new, old, 0, "alice", None, None)


async def charged(spread: Spread, *changes: Change) -> float:
    """Return the cost of a command that wrote these changes, beside another command of the same gateway."""
    replies = {"g1": [Reply(1, {}, None, 0.5), Reply(2, {}, None, 0.5)]}
    found = spread.charged(replies, {("g1", 2): list(changes)})
    other, reply = found["g1"]
    assert other.cost_ms == 0.5, "who wrote nothing is charged nothing"
    return reply.cost_ms - 0.5


async def test_named_users_are_charged_at_once() -> None:
    async with FakeBackend(fakeredis.FakeServer(), KEYS) as backend:
        it = Spread(make_app(), backend)
        names = [f"u{n}" for n in range(1000)]
        costly = change("lists", {"id": 1, "to": names})
        assert await charged(it, costly) == pytest.approx((1000 - FREE_APPENDS) / APPENDS_PER_MS)
        assert await charged(it, costly, costly) == pytest.approx(2 * (1000 - FREE_APPENDS) / APPENDS_PER_MS)
        taken_back = change("lists", {"id": 1, "to": []}, {"id": 1, "to": names})
        assert await charged(it, taken_back) > 10, "those who lose the item hear of it too"
        assert await charged(it, change("lists", {"id": 1, "to": names[:FREE_APPENDS]})) == 0


async def test_the_size_of_a_group_is_learned_from_the_first_change_to_it() -> None:
    async with FakeBackend(fakeredis.FakeServer(), KEYS) as backend:
        it = Spread(make_app(), backend)
        for n in range(300):
            await backend.commands.zadd(KEYS.order("members", "hall"), {f"u{n}": 0})
        message = change("messages", {"room": "hall", "id": 1})
        assert await charged(it, message) == 0
        await it.look([("members", "hall")])
        assert await charged(it, message) == pytest.approx((300 - FREE_APPENDS) / APPENDS_PER_MS)


async def test_as_many_groups_are_remembered_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "MAX_GROUPS_SIZED", 2)
    async with FakeBackend(fakeredis.FakeServer(), KEYS) as backend:
        it = Spread(make_app(), backend)
        for room in ("one", "two", "three"):
            await backend.commands.zadd(KEYS.order("members", room), {"alice": 0})
        await it.look([("members", "one"), ("members", "two")])
        it.size("members", "one")
        await it.look([("members", "three")])
        assert [it.size("members", room) for room in ("one", "two", "three")] == [1, 0, 1], "the last used stay"


@pytest.mark.parametrize("of", [change("failing", {"id": 1}), change("unknown", {"id": 1}), change("lists", None)])
async def test_a_change_without_a_known_audience_costs_nothing(of: Any) -> None:
    async with FakeBackend(fakeredis.FakeServer(), KEYS) as backend:
        assert await charged(Spread(make_app(), backend), of) == 0
