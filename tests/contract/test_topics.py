"""Topics and claims: who may follow, from which cursor, and who gets no frame."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest

from tidewire.testing import Stage

from .conftest import Frame, Wire, as_user, eventually, wire


async def tile(writer: Wire, id_: str, cell: Any, **more: Any) -> None:
    await writer.do("put", table="tiles", item={"id": id_, "cell": cell, **more})


async def next_changes(reader: Wire, count: int, **like: Any) -> list[Frame]:
    like = {"table": "tiles"} | like
    return [await reader.next(type="change", **like) for _ in range(count)]


async def silent(reader: Wire, **like: Any) -> bool:
    """Whether no such frame comes before the answer to a ping that is asked after it must have come."""
    await reader.do("ping")
    return not any(all(frame.get(name) == value for name, value in like.items()) for frame in reader.frames)


async def test_only_followers_of_a_topic_get_its_changes(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob, carol = [await as_user(stage, stack, name) for name in ("alice", "bob", "carol")]
    answer = await alice.do("follow", topic="cell:1")
    assert answer["topic"] == "cell:1"
    await bob.do("follow", topic="cell:2")
    await tile(carol, "t", 1)
    (first,) = await next_changes(alice, 1, topic="cell:1")
    assert (first["event"], first["new"], first["topic"]) == ("INSERT", {"id": "t", "cell": 1}, "cell:1")
    await tile(carol, "t", "2")
    (left,), (entered,) = await next_changes(alice, 1, topic="cell:1"), await next_changes(bob, 1, topic="cell:2")
    assert (left["event"], left["key"], left.keys() & {"new", "old"}) == ("LEAVE", {"id": "t"}, set())
    assert (entered["event"], entered["new"]["cell"]) == ("ENTER", "2")
    assert entered["position"] == left["position"]
    assert await silent(carol, table="tiles")


async def test_it_goes_on_from_its_own_cursor_after_a_reconnect_and_is_live_after_the_replay(
    stage: Stage, stack: AsyncExitStack
) -> None:
    writer = await as_user(stage, stack, "carol")
    key = await stage.key("alice")
    async with wire(stage, key) as alice:
        cursor = (await alice.do("follow", topic="cell:1"))["cursor"]
    for n in range(3):
        await tile(writer, f"t{n}", 1)
    async with wire(stage, key, topics=f'{{"cell:1": "{cursor}"}}') as alice:
        assert alice.welcome["topics"]["cell:1"] == cursor
        await tile(writer, "t3", 1)
        frames = await next_changes(alice, 4, topic="cell:1")
        names = [frame["key"]["id"] for frame in frames]
        assert sorted(names) == ["t0", "t1", "t2", "t3"], "they are of several partitions"
        # Rewound while it is followed: the same again, in order, then what is new.
        again = await alice.do("follow", topic="cell:1", cursor=frames[1]["cursor"])
        assert again["cursor"] == frames[1]["cursor"]
        await tile(writer, "t4", 1)
        repeated = await next_changes(alice, 3, topic="cell:1")
        assert [frame["key"]["id"] for frame in repeated] == [*names[2:], "t4"]
        assert repeated[:2] == frames[2:]


async def test_following_a_topic_again_changes_nothing(stage: Stage, stack: AsyncExitStack) -> None:
    alice, writer = [await as_user(stage, stack, name) for name in ("alice", "carol")]
    await alice.do("follow", topic="cell:1")
    await tile(writer, "t", 1)
    (frame,) = await next_changes(alice, 1)
    assert (await alice.do("follow", topic="cell:1"))["cursor"] == frame["cursor"]
    await tile(writer, "u", 1)
    assert [frame["key"]["id"] for frame in await next_changes(alice, 1)] == ["u"]
    assert await silent(alice, table="tiles")


async def test_a_user_may_unfollow_a_topic_and_follow_it_again(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob, writer = [await as_user(stage, stack, name) for name in ("alice", "bob", "carol")]
    for reader in (alice, bob):
        await reader.do("follow", topic="cell:1")
    await tile(writer, "t", 1)
    (frame,) = await next_changes(alice, 1)
    assert await alice.do("unfollow", topic="cell:1") == {"topic": "cell:1", "cursor": frame["cursor"]}
    await tile(writer, "u", 1)
    await next_changes(bob, 2)
    assert await silent(alice, table="tiles")
    assert (await alice.refused("unfollow", topic="cell:1"))["code"] == "not_found"
    await alice.do("follow", topic="cell:1", cursor=frame["cursor"])
    assert [frame["key"]["id"] for frame in await next_changes(alice, 1)] == ["u"]


@pytest.mark.parametrize("cursor", ["nonsense", "1.2.abc", "1795409459002.7.0123456789"])
async def test_a_cursor_that_does_not_fit_gives_a_reset_of_that_topic(
    stage: Stage, stack: AsyncExitStack, cursor: str
) -> None:
    alice, writer = [await as_user(stage, stack, name) for name in ("alice", "carol")]
    await alice.do("follow", topic="cell:1", cursor=cursor)
    reset = await alice.next(type="reset")
    assert (reset["topic"], reset["reason"] in ("cursor_unknown", "cursor_expired")) == ("cell:1", True)
    await tile(writer, "t", 1)
    await next_changes(alice, 1, topic="cell:1")


async def test_topics_that_are_none_and_those_of_others_are_refused(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    assert (await alice.refused("follow", topic="nowhere"))["code"] == "not_found"
    assert (await alice.refused("follow", topic="room:r"))["code"] == "forbidden"
    assert (await alice.refused("follow", topic='claim:tenant:"t1"'))["code"] == "not_found"
    await alice.do("put", table="members", item={"room": "r", "user": "alice"})
    await alice.do("follow", topic="room:r")
    admin = await as_user(stage, stack, "admin", role="service")
    await admin.do("follow", topic="room:elsewhere")


async def test_a_topic_named_at_connect_that_may_not_be_followed_is_refused_and_the_rest_goes_on(
    stage: Stage, stack: AsyncExitStack
) -> None:
    alice = await as_user(stage, stack, "alice", topics='{"room:r": "x", "cell:1": "x"}')
    assert "room:r" not in alice.welcome["topics"]
    assert "cell:1" in alice.welcome["topics"]
    error = await alice.next(type="error")
    assert (error["id"], error["code"], error["details"]) == (None, "forbidden", {"topic": "room:r"})
    assert await alice.do("ping") == {}


async def test_a_user_who_leaves_a_group_stops_following_its_topic(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
    for name in ("alice", "bob"):
        await alice.do("put", table="members", item={"room": "r", "user": name})
    await bob.do("follow", topic="room:r")
    await alice.do("delete", table="members", key={"room": "r", "user": "bob"})
    assert (await bob.next(type="reset", topic="room:r"))["topic"] == "room:r"
    assert (await bob.next(type="error", id=None))["details"] == {"topic": "room:r"}
    assert (await bob.refused("unfollow", topic="room:r"))["code"] == "not_found"


async def test_a_claim_is_a_topic_of_each_value_and_a_narrowing_is_asked_of_each_connection(
    stage: Stage, stack: AsyncExitStack
) -> None:
    readers = {}
    for tenant in ("t1", "t2", None):
        key = await stage.key("alice", claims={} if tenant is None else {"tenant": tenant})
        readers[tenant] = await stack.enter_async_context(wire(stage, key))
    writer = await as_user(stage, stack, "carol")
    await writer.do("put", table="members", item={"room": "r", "user": "alice"})
    await writer.do("put", table="floors", item={"id": "f", "tenant": "t1"})
    await writer.do("put", table="desks", item={"room": "r", "id": "d", "tenant": "t1"})
    await writer.do("put", table="desks", item={"room": "r", "id": "d", "tenant": "t2"})
    await writer.do("put", table="notes", item={"id": "n", "owner": "carol"})
    one, two, none = readers.values()
    assert (await next_changes(one, 1, table="floors"))[0]["topic"] == 'claim:tenant:"t1"'
    assert [frame["event"] for frame in await next_changes(one, 2, table="desks")] == ["INSERT", "LEAVE"]
    (entered,) = await next_changes(two, 1, table="desks")
    assert (entered["event"], entered["new"]["tenant"], "old" in entered) == ("ENTER", "t2", False)
    for reader, table in ((two, "floors"), (none, "floors"), (none, "desks")):
        assert await silent(reader, table=table)
    assert (await one.refused("get", table="desks", key={"room": "r", "id": "d"}))["code"] == "not_found"
    assert (await two.do("get", table="desks", key={"room": "r", "id": "d"}))["item"]["tenant"] == "t2"
    # On resume it is asked again: the same feed, replayed to connections with other claims.
    cursor = two.welcome["cursor"]
    for claims, events in (({"tenant": "t1"}, ["INSERT", "LEAVE"]), ({"tenant": "t2"}, ["ENTER"]), ({}, [])):
        key = await stage.key("alice", claims=claims)
        again = await stack.enter_async_context(wire(stage, key, cursor=cursor))
        frames = [await again.receive() for _ in range(again.welcome["replayed"])]
        assert [frame["event"] for frame in frames if frame.get("table") == "desks"] == events


async def test_a_renewed_credential_with_other_claims_has_other_topics(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await stack.enter_async_context(wire(stage, await stage.key("alice", claims={"tenant": "t1"})))
    writer = await as_user(stage, stack, "carol")
    await alice.do("auth", auth_key=await stage.key("alice", claims={"tenant": "t2"}))

    async def has_received() -> bool:
        # The topic goes live after the answer.
        await writer.do("put", table="floors", item={"id": "f", "tenant": "t2", "n": len(alice.frames)})
        await alice.do("ping")
        return any(frame.get("topic") == 'claim:tenant:"t2"' for frame in alice.frames)

    await eventually(has_received)
    await writer.do("put", table="floors", item={"id": "g", "tenant": "t1"})
    assert await silent(alice, topic='claim:tenant:"t1"')


async def test_peers_see_each_other_once_they_share_a_group(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
    await bob.do("put", table="faces", item={"user": "bob", "smiles": True})
    assert (await alice.refused("get", table="faces", key="bob"))["code"] == "not_found"
    for name in ("alice", "bob"):
        await alice.do("put", table="members", item={"room": "r", "user": name})
    for reader in (alice, alice, bob):  # alice when she comes, and when bob does
        await reader.next(type="reset", table="faces")
    assert (await alice.do("get", table="faces", key="bob"))["item"]["smiles"], "who is told to query finds it"
    await bob.do("put", table="faces", item={"user": "bob", "smiles": False})
    assert (await next_changes(alice, 1, table="faces"))[0]["new"]["smiles"] is False
    await alice.do("delete", table="members", key={"room": "r", "user": "bob"})
    await alice.next(type="reset", table="faces")
    assert (await alice.refused("get", table="faces", key="bob"))["code"] == "not_found"


async def test_a_message_to_a_user_reaches_all_connections_and_is_resumed(stage: Stage, stack: AsyncExitStack) -> None:
    admin = await as_user(stage, stack, "admin", role="service")
    key = await stage.key("alice")
    async with wire(stage, key) as alice:
        cursor = alice.welcome["cursor"]
        assert await admin.do("send", user="alice", body={"hello": [1, None]}) == {
            "delivered": True,
            "connections": 1,
        }
        frame = await alice.next(type="message")
        assert (frame["from"], frame["body"]) == ("admin", {"hello": [1, None]})
        assert set(frame) == {"type", "cursor", "from", "body", "at"}
    again = await admin.do("send", user="alice", body="twice", request="once")
    assert again == await admin.do("send", user="alice", body="twice", request="once")
    async with wire(stage, key, cursor=cursor) as alice:
        bodies: list[Any] = []
        while "end" not in bodies:
            if bodies == [{"hello": [1, None]}, "twice"]:
                await admin.do("send", user="alice", body="end")
            bodies.append((await alice.next(type="message"))["body"])
        assert bodies == [{"hello": [1, None]}, "twice", "end"]


async def test_a_message_to_a_user_without_connections_says_so(stage: Stage, stack: AsyncExitStack) -> None:
    admin = await as_user(stage, stack, "admin", role="service")
    assert await admin.do("send", user="never existed", body="hello?") == {"delivered": True, "connections": 0}


async def test_a_message_to_a_connection_is_there_at_once_or_not_at_all(stage: Stage, stack: AsyncExitStack) -> None:
    admin = await as_user(stage, stack, "admin", role="service")
    key = await stage.key("alice")
    async with wire(stage, key) as alice, wire(stage, key) as other:
        await admin.do("send", connection=alice.welcome["connection"], body="you")
        frame = await alice.next(type="message")
        assert (frame["body"], set(frame)) == ("you", {"type", "from", "body", "at"})
        assert await silent(other, type="message")

    async def refused() -> Any:  # once the gateway has noticed
        answer = await admin.ask("send", connection=alice.welcome["connection"], body="gone")
        return answer.get("code")

    assert await eventually(refused) == "not_found"
    assert (await admin.refused("send", connection="nowhere-1", body=""))["code"] == "not_found"


async def test_sending_is_for_service_keys_and_to_one_of_the_two(stage: Stage, stack: AsyncExitStack) -> None:
    alice, admin = await as_user(stage, stack, "alice"), await as_user(stage, stack, "admin", role="service")
    for to in ({"user": "bob"}, {"connection": alice.welcome["connection"]}):
        assert (await alice.refused("send", body="x", **to))["code"] == "forbidden"
    for to in ({}, {"user": "bob", "connection": "c"}):
        assert (await admin.refused("send", body="x", **to))["code"] == "bad_request"
