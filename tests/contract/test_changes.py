"""Live changes, and resuming them."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tidewire import testing
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user, make_app, wire


async def test_the_welcome_comes_first_with_all_its_fields(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    welcome = alice.welcome
    assert welcome.keys() == {"type", "connection", "user", "cursor", "resumed", "replayed", "topics"}
    assert (welcome["user"], welcome["resumed"], welcome["replayed"]) == ("alice", False, 0)
    assert isinstance(welcome["connection"], str)
    assert isinstance(welcome["cursor"], str)
    assert {"scores", "lines", "connections"} <= welcome["topics"].keys()
    assert not {"notes", "messages", "closed", "members"} & welcome["topics"].keys()


async def test_a_change_arrives_with_all_its_fields(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    item = {"id": "n1", "owner": ["alice", "bob"], "x": {"y": [1, None, "é"]}}
    bob = await as_user(stage, stack, "bob")
    written = await bob.do("put", table="notes", item=item)
    assert written == {"key": {"id": "n1"}, "version": 1, "position": written["position"]}
    change = await alice.next(type="change", table="notes")
    assert len(change["position"].split("-")) == 4
    assert isinstance(change.pop("cursor"), str)
    assert isinstance(change.pop("at"), int)
    assert change == {
        "type": "change",
        "position": written["position"],
        "event": "INSERT",
        "table": "notes",
        "key": {"id": "n1"},
        "version": 1,
        "new": item,
        "old": None,
        "by": "bob",
    }
    assert (await bob.next(type="change", table="notes"))["position"] == written["position"]


async def test_changes_come_in_order_with_versions_and_images(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    await alice.do("put", table="notes", item={"id": "n1", "owner": "alice"})
    updated = await alice.do("update", table="notes", key="n1", set={"a.b": 1}, add={"n": 2})
    assert updated["item"] == {"id": "n1", "owner": "alice", "a": {"b": 1}, "n": 2}
    await alice.do("delete", table="notes", key={"id": "n1"})
    frames = [await alice.next(type="change", table="notes") for _ in range(3)]
    assert [(f["event"], f["version"]) for f in frames] == [("INSERT", 1), ("MODIFY", 2), ("REMOVE", 3)]
    assert frames[1]["old"] == frames[0]["new"]
    assert frames[2]["old"] == frames[1]["new"]
    assert frames[2]["new"] is None
    positions = [tuple(map(int, f["position"].split("-"))) for f in frames]
    assert positions == sorted(set(positions))


async def test_frames_of_a_topic_name_it_and_have_its_cursor(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
    await alice.do("put", table="scores", item={"id": 1})
    for reader in (alice, bob):
        frame = await reader.next(type="change", topic="scores")
        assert frame["new"] == {"id": 1}
        assert frame["cursor"] != reader.welcome["topics"]["scores"]


async def test_both_connections_of_a_user_see_the_same(stage: Stage, stack: AsyncExitStack) -> None:
    key = await stage.key("alice")
    one, two = [await stack.enter_async_context(wire(stage, key)) for _ in range(2)]
    for n in range(5):
        await one.do("put", table="notes", item={"id": n, "owner": "alice"})
    seen = [[await reader.next(type="change", table="notes") for _ in range(5)] for reader in (one, two)]
    assert seen[0] == seen[1]


async def leave_and_miss(stage: Stage, table: str, missed: int) -> tuple[str, str, str, list[dict[str, Any]]]:
    """alice sees one change, leaves, and misses some; her key, her cursor, her topic's cursor, what she missed."""
    key = await stage.key("alice")
    async with wire(stage, key) as alice:
        await alice.do("put", table=table, item={"id": "first", "owner": ["alice", "bob"]})
        seen = await alice.next(type="change", table=table)
    async with wire(stage, await stage.key("bob")) as bob:
        for n in range(missed):
            await bob.do("put", table=table, item={"id": n, "owner": ["alice", "bob"]})
        changes = [await bob.next(type="change", table=table, event="INSERT") for _ in range(missed)]
        changes = changes if changes else []
    return key, seen["cursor"], seen.get("topic", ""), changes


@pytest.mark.parametrize("missed", [0, 3])
async def test_a_cursor_resumes_with_exactly_what_was_missed(stage: Stage, missed: int) -> None:
    key, cursor, _, _ = await leave_and_miss(stage, "notes", missed)
    async with wire(stage, key, cursor=cursor) as alice:
        assert alice.welcome["resumed"] is True
        assert alice.welcome["replayed"] == missed
        replayed = [await alice.next(type="change", table="notes") for _ in range(missed)]
        assert sorted(frame["key"]["id"] for frame in replayed) == list(range(missed))
        await alice.do("put", table="notes", item={"id": "live", "owner": "alice"})
        assert (await alice.next(type="change", table="notes"))["key"] == {"id": "live"}
        assert not [frame for frame in alice.frames if frame["type"] == "reset"]


async def test_a_topic_resumes_by_its_own_cursor(stage: Stage) -> None:
    key, cursor, topic, _ = await leave_and_miss(stage, "scores", 3)
    assert topic == "scores"
    async with wire(stage, key, topics=json.dumps({"scores": cursor})) as alice:
        assert alice.welcome["resumed"] is False, "the feed itself was not"
        replayed = [await alice.next(type="change", topic="scores") for _ in range(3)]
        assert sorted(frame["key"]["id"] for frame in replayed) == [0, 1, 2]


async def test_the_first_frame_resumes_too(stage: Stage) -> None:
    key, cursor, _, _ = await leave_and_miss(stage, "notes", 2)
    async with wire(stage, welcome=False) as alice:
        await alice.send({"action": "auth", "auth_key": key, "cursor": cursor})
        welcome = await alice.receive()
        assert (welcome["type"], welcome["resumed"], welcome["replayed"]) == ("welcome", True, 2)
        ids = [(await alice.next(type="change", table="notes"))["key"]["id"] for _ in range(2)]
        assert sorted(ids) == [0, 1]


HUGE = "9" * 40


async def goes_on_after_reset(alice: Wire, reason: str) -> None:
    assert alice.welcome["resumed"] is False
    assert alice.welcome["replayed"] == 0
    reset = await alice.next(type="reset")
    assert reset["reason"] == reason
    assert reset["cursor"] != alice.welcome["cursor"], "until the reset is heard, a cursor that is refused"
    await alice.do("put", table="notes", item={"id": "live", "owner": "alice"})
    assert (await alice.next(type="change", table="notes"))["new"]["id"] == "live"


@pytest.mark.parametrize("cursor", ["garbage", "1.2.x y", "0.0.", "é"])
async def test_a_garbage_cursor_is_reset_as_unknown(stage: Stage, cursor: str) -> None:
    async with wire(stage, await stage.key("alice"), cursor=cursor) as alice:
        await goes_on_after_reset(alice, "cursor_unknown")


async def test_a_client_that_missed_a_reset_gets_it_again(stage: Stage) -> None:
    key = await stage.key("alice")
    topics = '{"scores": "1.2.abc"}'
    async with wire(stage, key, cursor="1.2.abc", topics=topics) as alice:
        welcome = alice.welcome  # and no more
    again = {"cursor": welcome["cursor"], "topics": json.dumps(welcome["topics"])}
    async with wire(stage, key, **again) as alice:
        assert not alice.welcome["resumed"]
        reset = await alice.next(type="reset", topic=None)
        topic_reset = await alice.next(type="reset", topic="scores")
    again = {"cursor": reset["cursor"], "topics": json.dumps({"scores": topic_reset["cursor"]})}
    async with wire(stage, key, **again) as alice:
        assert alice.welcome["resumed"]
        await alice.do("put", table="scores", item={"id": "s"})
        assert (await alice.next(type="change", table="scores"))["topic"] == "scores"
        assert not [frame for frame in alice.frames if frame["type"] == "reset"]


async def test_a_cursor_with_a_huge_number_is_reset_too(stage: Stage) -> None:
    async with wire(stage, await stage.key("alice"), welcome=False, cursor=f"1.{HUGE}.abc") as alice:
        alice.welcome = await alice.receive()
        assert (await alice.next(type="reset"))["reason"] in ("cursor_unknown", "cursor_expired")


async def test_a_cursor_of_another_epoch_is_reset_as_expired(stage: Stage) -> None:
    key, cursor, _, _ = await leave_and_miss(stage, "notes", 1)
    _, seq, tag = cursor.split(".")
    async with wire(stage, key, cursor=f"77.{seq}.{tag}") as alice:
        await goes_on_after_reset(alice, "cursor_expired")


async def test_a_cursor_with_a_wrong_tag_is_reset_as_unknown(stage: Stage) -> None:
    key, cursor, _, _ = await leave_and_miss(stage, "notes", 1)
    async with wire(stage, key, cursor=cursor.rpartition(".")[0] + ".abcdef") as alice:
        await goes_on_after_reset(alice, "cursor_unknown")


async def test_another_users_cursor_brings_nothing_of_his(stage: Stage) -> None:
    _, cursor, _, _ = await leave_and_miss(stage, "notes", 1)
    async with wire(stage, await stage.key("carol"), cursor=cursor) as carol:
        assert (await carol.next(type="reset"))["reason"] in ("cursor_unknown", "cursor_expired")
        assert (await carol.do("ping")) == {}
        assert not [frame for frame in carol.frames if frame.get("table") == "notes"]


async def test_more_than_a_feed_keeps_is_reset_as_trimmed(open_stage: Open) -> None:
    async with open_stage(resume_entries=5) as stage:
        key = await stage.key("alice")
        async with wire(stage, key) as alice:
            cursor = alice.welcome["cursor"]
            for n in range(300):
                await alice.send({"action": "put", "table": "notes", "item": {"id": n, "owner": "alice"}})
            for _ in range(300):
                await alice.next(type="change", table="notes")
        async with wire(stage, key, cursor=cursor) as alice:
            await goes_on_after_reset(alice, "feed_trimmed")


@pytest.mark.real
async def test_a_feed_is_bounded_in_bytes_and_resumes_within_its_bound(server: str) -> None:
    max_bytes, sizes = 200_000, [10_000] * 40
    async with testing.run(
        make_app(),
        backend=await connect(server, Keys("bytes", 2)),
        stage="bytes",
        partitions=2,
        resume_bytes=max_bytes,
    ) as stage:
        key = await stage.key("alice")
        async with wire(stage, key) as alice:
            cursors = [alice.welcome["cursor"]]
            for n, size in enumerate(sizes):
                await alice.do("put", table="notes", item={"id": f"n{n}", "owner": "alice", "text": "x" * size})
                cursors.append((await alice.next(type="change", table="notes"))["cursor"])
        feed = stage.backend.keys.user_feed("alice")
        # The largest entry, and a node of the stream, may stand above.
        assert 0 < int(await stage.backend.commands.memory_usage(feed, samples=0) or 0) < 1.2 * max_bytes
        kept = await stage.backend.commands.xlen(feed)
        assert 5 < kept < len(sizes)
        async with wire(stage, key, cursor=cursors[-4]) as alice:
            assert (alice.welcome["resumed"], alice.welcome["replayed"]) == (True, 3)
        async with wire(stage, key, cursor=cursors[0]) as alice:
            await goes_on_after_reset(alice, "feed_trimmed")


async def test_members_hear_of_their_room_from_their_joining_to_their_leaving(
    stage: Stage, stack: AsyncExitStack
) -> None:
    alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
    members = {"room": "r", "user": "alice"}, {"room": "r", "user": "bob"}
    await alice.do("put", table="members", item=members[0])
    await alice.do("put", table="messages", item={"room": "r", "id": 1})
    await alice.do("put", table="members", item=members[1])
    await alice.do("put", table="messages", item={"room": "r", "id": 2})
    await alice.do("delete", table="members", key=members[1])
    await alice.do("put", table="messages", item={"room": "r", "id": 3})
    # What concerns bob next comes after all of that.
    await alice.do("put", table="members", item={"room": "r", "user": "bob", "again": True})
    heard: list[tuple[str, str, Any]] = []
    expected = [
        ("members", "INSERT", {"room": "r", "user": "bob"}),
        ("members", "ENTER", {"room": "r", "user": "alice"}),
        ("messages", "ENTER", {"room": "r", "id": 1}),
        ("messages", "INSERT", {"room": "r", "id": 2}),
        ("members", "REMOVE", {"room": "r", "user": "bob"}),
        ("members", "LEAVE", {"room": "r"}),
        ("messages", "LEAVE", {"room": "r"}),
        ("members", "INSERT", {"room": "r", "user": "bob"}),
        ("members", "ENTER", {"room": "r", "user": "alice"}),
        ("messages", "ENTER", {"room": "r", "id": 3}),
        ("messages", "ENTER", {"room": "r", "id": 2}),
        ("messages", "ENTER", {"room": "r", "id": 1}),
    ]
    while len(heard) < len(expected):
        frame = await bob.receive()
        if frame.get("table") in ("members", "messages"):
            heard.append((frame["table"], frame["event"], frame["key"]))
    assert heard == expected
