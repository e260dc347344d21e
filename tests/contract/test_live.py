"""Live views of the Python client, on the whole system."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tidewire import App, everyone
from tidewire.client import Client
from tidewire.errors import ConfigurationError, NotFound, PermissionDenied
from tidewire.testing import Stage

from .conftest import PATIENCE_S, Open, wire

Shown = dict[Any, dict[str, Any]]


async def until(views: AsyncIterator[Shown], check: Callable[[Shown], bool]) -> list[Shown]:
    """All views up to the first one that is as it should be."""
    found: list[Shown] = []
    async with asyncio.timeout(PATIENCE_S):
        async for view in views:
            found.append(view)
            if check(view):
                return found
    raise AssertionError("it ended")


async def room(stage: Stage, *names: str) -> list[Client]:
    clients = [await stage.client(name) for name in names]
    for name in names:
        await clients[0].put("members", {"room": "r", "user": name})
    return clients


async def say(client: Client, id_: Any, text: str = "") -> None:
    await client.put("messages", {"room": "r", "id": id_, "text": text})


async def test_a_view_shows_present_items_and_then_follows_them(stage: Stage) -> None:
    alice, bob = await room(stage, "alice", "bob")
    await say(alice, 2, "there")
    views = bob.live("messages", room="r")
    assert (await anext(views)) == {2: {"room": "r", "id": 2, "text": "there"}}
    await say(alice, 10)
    await say(alice, 9)
    await alice.delete("messages", {"room": "r", "id": 2})
    assert list((await until(views, lambda view: 2 not in view))[-1]) == [9, 10]
    await views.aclose()


async def test_a_member_who_leaves_sees_nothing_and_one_who_returns_sees_all(stage: Stage) -> None:
    alice, bob = await room(stage, "alice", "bob")
    for n in range(3):
        await say(alice, n)
    views = bob.live("messages", room="r")
    await until(views, lambda view: len(view) == 3)
    await alice.delete("members", {"room": "r", "user": "bob"})
    await until(views, lambda view: not view)
    await say(alice, 3)
    await alice.put("members", {"room": "r", "user": "bob"})
    await until(views, lambda view: list(view) == [0, 1, 2, 3])


async def test_a_view_fills_when_its_user_becomes_a_member(stage: Stage) -> None:
    (alice,) = await room(stage, "alice")
    bob = await stage.client("bob")
    for n in range(150):  # more than a membership carries: the rest is queried
        await say(alice, n)
    views = bob.live("messages", room="r")
    assert await anext(views) == {}
    await alice.put("members", {"room": "r", "user": "bob"})
    await until(views, lambda view: len(view) == 150)


async def test_a_transaction_is_seen_whole_or_not_at_all(stage: Stage) -> None:
    alice, bob = await room(stage, "alice", "bob")
    views = bob.live("messages", room="r")
    await anext(views)

    def all_say(text: str) -> list[dict[str, Any]]:
        items = [{"room": "r", "id": n, "text": text} for n in range(5)]
        return [{"action": "put", "table": "messages", "item": item} for item in items]

    for n in range(10):
        await alice.transact(*all_say(str(n)))
    for view in await until(views, lambda view: bool(view) and view[4]["text"] == "9"):
        assert len(view) == 5
        assert len({item["text"] for item in view.values()}) == 1


async def test_more_than_a_page_while_it_is_written_to(stage: Stage) -> None:
    alice, bob = await room(stage, "alice", "bob")
    for first in range(0, 1100, 50):
        await asyncio.gather(*(say(alice, n) for n in range(first, first + 50)))
    done = asyncio.Event()

    async def write() -> None:
        n = 0
        while not done.is_set():
            await say(alice, n % 1100, "again")
            n += 37

    writing = asyncio.create_task(write())
    views = bob.live("messages", room="r")
    assert len(await anext(views)) == 1100
    done.set()
    await writing
    await say(alice, 2000)
    last = (await until(views, lambda view: 2000 in view))[-1]
    after: Any = None
    stored: Shown = {}
    while True:
        page = await bob.query("messages", "r", limit=1000, **({} if after is None else {"after": after}))
        stored |= {one["item"]["id"]: one["item"] for one in page["items"]}
        if (after := page["next"]) is None:
            break
    assert last == stored


async def test_it_begins_empty_after_a_reset_and_is_filled_again(open_stage: Open) -> None:
    async with open_stage(resume_window_s=1.5) as stage:
        alice, bob = await room(stage, "alice", "bob")
        await say(alice, 1)
        views = bob.live("messages", room="r")
        await until(views, lambda view: list(view) == [1])
        home = stage.backend.keys.home_of(stage.backend.keys.user_feed("bob"))
        now = await stage.backend.now_ms()
        await stage.backend.commands.hset(home.partition, "feeds", str(now))  # as if the server had gone back
        seen = await until(views, lambda view: list(view) == [1])
        assert seen == [{}, {1: {"room": "r", "id": 1, "text": ""}}]
        await say(alice, 2)
        await until(views, lambda view: list(view) == [1, 2])


async def test_a_view_of_a_table_behind_a_topic_follows_the_topic_first(stage: Stage) -> None:
    alice, bob = [await stage.client(name) for name in ("alice", "bob")]
    await alice.put("tiles", {"id": "t", "cell": "c1"})
    views = bob.live("tiles", id="t", topic="cell:c1")
    assert await anext(views) == {"t": {"id": "t", "cell": "c1"}}
    assert "cell:c1" in bob.topics
    await alice.put("tiles", {"id": "t", "cell": "c1", "n": 2})
    await until(views, lambda view: bool(view) and view["t"].get("n") == 2)
    await alice.put("tiles", {"id": "t", "cell": "c2"})
    await until(views, lambda view: not view)


async def test_several_views_and_events_of_one_client_go_side_by_side(stage: Stage) -> None:
    alice, bob = await room(stage, "alice", "bob")
    views = [bob.live("messages", room="r"), bob.live("members", room="r"), bob.live("messages", room="r")]
    for view in views:
        await anext(view)
    await say(alice, 1)
    await until(views[0], lambda view: 1 in view)
    await until(views[2], lambda view: 1 in view)
    await alice.put("members", {"room": "r", "user": "carol"})
    await until(views[1], lambda view: "carol" in view)
    async for event in bob.events():
        if event.get("table") == "messages":
            break
    assert event["key"] == {"room": "r", "id": 1}


async def test_a_view_of_a_wrong_table_is_refused(stage: Stage) -> None:
    alice = await stage.client("alice")
    with pytest.raises(ConfigurationError, match="needs one attribute"):
        await anext(alice.live("messages"))
    with pytest.raises(ConfigurationError, match="table 'messages' has the partition key 'room', not 'rom'"):
        await anext(alice.live("messages", rom="r"))
    with pytest.raises(Exception, match="there is no table 'nowhere'"):
        await anext(alice.live("nowhere", id=1))
    with pytest.raises(NotFound, match="no topic 'nowhere'"):
        await anext(alice.live("tiles", id="t", topic="nowhere"))
    with pytest.raises(PermissionDenied):
        await anext(alice.live("tiles", id="t", topic="room:r"))


async def test_a_client_follows_again_after_its_connection_was_lost(stage: Stage) -> None:
    alice, bob = [await stage.client(name) for name in ("alice", "bob")]
    await bob.follow("cell:1")
    assert bob._ws
    bob._ws.transport.abort()
    await alice.put("tiles", {"id": "t", "cell": 1})
    while (event := await bob.next_event()).get("topic") != "cell:1":
        pass
    assert event["new"] == {"id": "t", "cell": 1}
    await bob.unfollow("cell:1")
    assert "cell:1" not in bob.topics
    async with wire(stage, await stage.key("bob")) as other:
        assert "cell:1" not in other.welcome["topics"]


async def test_a_view_that_would_never_change_is_refused_with_what_to_do(stage: Stage) -> None:
    (alice,) = await room(stage, "alice")
    backend = await stage.client("backend", role="service")
    await say(alice, 1)
    for value in ("r", "empty"):
        with pytest.raises(ConfigurationError, match="would never change: its changes"):
            await anext(backend.live("messages", room=value))
    await alice.put("members", {"room": "r", "user": "backend"})
    assert list(await anext(backend.live("messages", room="r"))) == [1], "a member's feed carries the changes"


async def test_a_view_of_a_topics_table_needs_the_topic(open_stage: Open) -> None:
    app = App("test")
    cells = app.topic("cell:{cell}", followers=everyone)
    app.table("units", key="cell", readers=cells.of("cell"), writers=everyone)
    async with open_stage(app) as stage:
        alice = await stage.client("alice")
        with pytest.raises(ConfigurationError, match="as `topic`"):
            await anext(alice.live("units", cell="c1"))
        views = alice.live("units", topic="cell:c1", cell="c1")
        assert await anext(views) == {}
        await alice.put("units", {"cell": "c1", "unit": "u"})
        assert await anext(views) == {"c1": {"cell": "c1", "unit": "u"}}
