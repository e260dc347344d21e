"""A Redis that is full: which requests make it hold more, and when it counts as full."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from tidewire.app import App
from tidewire.audiences import everyone
from tidewire.services.store import batches
from tidewire.services.store.batches import Deciding
from tidewire.services.store.budget import UNLIMITED
from tidewire.services.store.memory import FULL_PERCENT, Memory, fullness
from tidewire.services.store.view import Situation

from .world import GENERATION, KEYS, NOW, World

FULL = "Redis is full: delete items"


@pytest.fixture
def world() -> World:
    app = App("test")
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone, expires="until")
    app.check()
    world = World(app)
    for n in range(3):
        world.do("alice", "put", table="lines", item={"page": "p", "n": n})
    return world


@pytest.mark.parametrize(
    ("used", "most", "full"),
    [(96, 100, False), (FULL_PERCENT, 100, True), (120, 100, True), (10**12, 0, False)],
)
def test_a_node_is_full_shortly_before_its_maxmemory(used: int, most: int, full: bool) -> None:
    why = fullness({"used_memory": used, "maxmemory": most})
    assert (why is not None) == full
    if why:
        assert str(most) in why
        assert "raise maxmemory" in why


PUT: dict[str, Any] = {"action": "put", "table": "lines", "item": {"page": "p", "n": 7}}
DELETE: dict[str, Any] = {"action": "delete", "table": "lines", "key": {"page": "p", "n": 1}}


@pytest.mark.parametrize(
    "body",
    [
        PUT,
        {"action": "update", "table": "lines", "key": {"page": "p", "n": 1}, "set": {"x": 1}},
        {"action": "transact", "operations": [DELETE, PUT]},
        {"action": "send", "user": "bob", "body": 1},
        {"action": "load", "items": [["lines", {"page": "p", "n": 7}]]},
    ],
)
def test_a_growing_write_is_overloaded_and_nothing_is_done(world: World, body: dict[str, Any]) -> None:
    before = len(world.changes)
    (reply,) = world.run(world.command("job", role="service", **body), full=FULL)
    assert reply.error == {"code": "overloaded", "message": FULL, "details": {}}
    assert len(world.changes) == before


@pytest.mark.parametrize(
    "body",
    [
        DELETE,
        {"action": "transact", "operations": [DELETE]},
        {"action": "get", "table": "lines", "key": {"page": "p", "n": 1}},
        {"action": "query", "table": "lines", "key": "p"},
        {"action": "put", "table": "connections", "item": {"user": "bob", "connection": "c", "gateway": "g"}},
    ],
)
def test_reads_deletes_and_what_gateways_note_go_on(world: World, body: dict[str, Any]) -> None:
    (reply,) = world.run(world.command("job", role="service", **body), full=FULL)
    assert reply.error is None


def test_a_refused_request_is_done_when_it_is_repeated(world: World) -> None:
    (refused,) = world.run(world.command("alice", request="q", **PUT), full=FULL)
    assert refused.error
    assert world.do("alice", request="q", **PUT)["version"] == 1


async def test_a_first_sort_key_that_redis_has_no_room_for_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(_: Any, partition: int, facts: Any, *args: Any, **options: Any) -> dict[Any, Any]:
        return {fact: world.fetch(fact) for fact in facts}

    async def refuse(*_: Any) -> str:
        raise OutOfMemoryError("OOM command not allowed")

    monkeypatch.setattr(batches, "fetch", fetch)
    monkeypatch.setattr(batches, "settle_kind", refuse)
    world.kinds.clear()
    backend: Any = type("Keyed", (), {"keys": KEYS})()
    situation = Situation(0, GENERATION, NOW, world.last, 0)
    deciding = Deciding(world.app, backend, Memory(backend), [world.command("alice", **PUT)], situation, UNLIMITED)
    decision = await deciding.decision()
    (reply,) = decision.replies["g1"]
    assert reply.error
    assert reply.error["code"] == "overloaded"
    assert (decision.changes, decision.kinds) == (0, {})


async def test_a_kind_that_another_partition_has_settled_meanwhile_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(_: Any, partition: int, facts: Any, *args: Any, **options: Any) -> dict[Any, Any]:
        return {fact: world.fetch(fact) for fact in facts}

    async def settle(*_: Any) -> str:
        return "s"

    monkeypatch.setattr(batches, "fetch", fetch)
    monkeypatch.setattr(batches, "settle_kind", settle)
    world.kinds.clear()
    backend: Any = type("Keyed", (), {"keys": KEYS})()
    situation = Situation(0, GENERATION, NOW, world.last, 0)
    deciding = Deciding(world.app, backend, Memory(backend), [world.command("alice", **PUT)], situation, UNLIMITED)
    decision = await deciding.decision()
    (reply,) = decision.replies["g1"]
    assert reply.error
    assert reply.error["code"] == "bad_request"
    assert decision.changes == 0
