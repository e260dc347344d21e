"""A server that went back, and lost changes: positions, links and feeds notice, and readers get a reset."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tidewire.errors import Fenced
from tidewire.model.records import FeedBody, Position, pack
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.functions import Append, FeedBounds, Owned, RedisCommand, Stamp, Unit
from tidewire.redis.keys import Keys
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user, eventually, wire

NAMES = iter(range(1000))
MOST = FeedBounds(100, 1 << 20)
STREAM_GROUP = "g"


@pytest.fixture(params=["server", "cluster"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """A stage of its own on a real server, or on three."""
    address = request.getfixturevalue(request.param)
    async with await connect(address, Keys(f"gen{next(NAMES)}", 4)) as backend:
        yield backend


async def owned(backend: Backend, partition: int = 0) -> Owned:
    keys, stream = backend.keys, backend.keys.changes(partition)
    await backend.ensure_group(stream, STREAM_GROUP)
    lease = keys.lease(partition, STREAM_GROUP)
    found = await backend.functions.lease_take(lease, keys.home(partition), stream, STREAM_GROUP, "me", 60_000)
    assert found
    return found


async def went_back(backend: Backend, partition: int) -> None:
    """As if the server of the partition were another one now: its replication id is not the one that was noted."""
    await backend.commands.hset(backend.keys.partition(partition), "server", "0" * 40)


def change(partition: int, generation: int, seq: int, feed: bytes) -> Unit:
    body, position = pack(FeedBody("change", b'{"n":%d}' % seq)), Position(partition, generation, 1000, seq)
    return Unit(position, [Append(position, body, len(body), (feed,))])


async def test_a_server_that_is_another_one_has_a_new_generation_and_a_new_fence(backend: Backend) -> None:
    mine = await owned(backend)
    assert mine.fence.generation == 0
    assert mine.losses == ()
    stream = backend.keys.changes(0)
    await backend.commands.xadd(stream, {"r": "x"}, id="1000-7")
    await went_back(backend, 0)
    with pytest.raises(Fenced):  # what was decided before is not committed after
        await backend.functions.commit(mine, 1, [], [RedisCommand("SET", stream + b"x", ("1",))], count=1, size_bytes=1)
    assert not await backend.commands.exists(stream + b"x")
    again = await owned(backend)
    assert again.fence.generation > 1_000_000_000_000
    assert again.losses == (again.fence.generation, 1000, 7), "what was left of the changes is noted"
    await backend.functions.batch(again, 1, 1 << 20)
    await backend.commands.xadd(stream, {"r": "x"}, id="1000-9")
    await went_back(backend, 0)
    last = await owned(backend)
    assert last.fence.generation > again.fence.generation
    assert last.losses == (*again.losses, last.fence.generation, 1000, 9)


async def test_a_destination_that_took_more_than_its_source_has_begins_its_feeds_anew(backend: Backend) -> None:
    functions, keys = backend.functions, backend.keys
    user = next(name for name in map(str, range(100)) if keys.partition_of(name) == 1)
    feed, home = keys.user_feed(user), keys.home(1)
    before = await functions.feed_open(home, feed, 60_000)
    for seq in (1, 2, 3):
        assert await functions.link_append(home, "g:0", 10, MOST, [change(0, 0, seq, feed)]) == 1
    # The source has all of it: nothing happens.
    await functions.link_stamp(home, [Stamp("g:0", 11, (50, 1000, 3))])
    state, entries = await functions.feed_read(home, feed, 0, 100, 1 << 20)
    assert (state.epoch, [entry.seq for entry in entries]) == (before.epoch, [1, 2, 3])
    # It fell back to the second change: the third never was.
    await functions.link_stamp(home, [Stamp("g:0", 12, (60, 1000, 2))])
    state, entries = await functions.feed_read(home, feed, 0, 100, 1 << 20)
    assert (int(state.epoch) > int(before.epoch), state.seq, entries) == (True, 0, [])
    assert (await functions.feed_open(home, feed, 60_000)).epoch == state.epoch, "once"
    await functions.link_stamp(home, [Stamp("g:0", 13, (60, 1000, 2))])
    assert (await functions.feed_open(home, feed, 60_000)).epoch == state.epoch, "also when it is said again"
    # What it sends again, of before, was taken; what is new has a place in the new order, though its id is an old one.
    units = [change(0, 0, 2, feed), change(0, 60, 3, feed)]
    assert await functions.link_append(home, "g:0", 13, MOST, units) == 1
    state, entries = await functions.feed_read(home, feed, 0, 100, 1 << 20)
    assert [(entry.seq, entry.position) for entry in entries] == [(1, "0-60-1000-3")]


async def test_a_destination_that_went_back_begins_its_feeds_anew_only_among_several_masters(backend: Backend) -> None:
    functions, keys = backend.functions, backend.keys
    feed, home = keys.user_feed("alice"), keys.home_of(keys.user_feed("alice"))
    partition = keys.partition_of("alice")
    before = await functions.feed_open(home, feed, 60_000)
    await functions.link_append(home, "g:0", 10, MOST, [change(0, 0, 1, feed)])
    await went_back(backend, partition)
    state = await functions.feed_open(home, feed, 60_000)
    on_a_cluster = int((await backend.node_of(home.partition).info("cluster"))["cluster_enabled"])
    assert (state.epoch == before.epoch, state.seq) == ((False, 0) if on_a_cluster else (True, 1))
    assert await functions.feed_open(home, feed, 60_000) == state


async def joined(stage: Stage, alice: Wire) -> None:
    """Two rooms in one partition each, with alice in both."""
    for room in ("r1", "r2", "r3"):
        await alice.do("put", table="members", item={"room": room, "user": "alice"})
        await alice.next(type="change", table="members")


async def test_changes_trimmed_unread_reset_every_feed_and_the_members_are_those_of_the_items(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    # Each feed is looked at twice a second.
    async with open_stage(lease_ms=1500, resume_window_s=1.5) as stage:
        alice = await as_user(stage, stack, "alice")
        await joined(stage, alice)
        keys, commands = stage.backend.keys, stage.backend.commands
        partition = keys.partition_of("r1")
        stream, lease = keys.changes(partition), keys.lease(partition, "broadcaster")
        later = int(await commands.hget(lease, "epoch") or 0) + 10**6

        async def stopped() -> Any:
            # Held by somebody who does nothing: the broadcaster is fenced.
            await commands.hset(
                lease, mapping={"owner": "nobody", "epoch": later, "expires": int(time.time() * 1000) + 500}
            )
            length = await commands.xlen(stream)
            await alice.do("put", table="messages", item={"room": "r1", "id": 1})
            groups: Any = await commands.xinfo_groups(stream)
            unread = [one["lag"] for one in groups if one["name"] == b"broadcaster"]
            return unread[0] and await commands.xlen(stream) > length

        await alice.do("put", table="messages", item={"room": "r1", "id": 0})
        await eventually(stopped)
        await alice.do("put", table="members", item={"room": "r1", "user": "bob"})
        await commands.xtrim(stream, maxlen=0, approximate=False)
        await commands.hset(lease, "expires", "0")  # and is free again
        await alice.do("put", table="messages", item={"room": "r1", "id": 2})
        reset = await alice.next(type="reset", reason="cursor_expired", topic=None)
        assert "table" not in reset
        await alice.next(type="reset", reason="cursor_expired", topic="scores")
        bob = await stack.enter_async_context(wire(stage, await stage.key("bob")))
        await alice.do("put", table="messages", item={"room": "r1", "id": 3})
        assert (await bob.next(type="change", table="messages"))["key"]["id"] == 3, "who joined in the gap is a member"
        assert (await alice.next(type="change", table="messages", event="INSERT"))["key"]["room"] == "r1"


async def test_an_open_connection_whose_feed_went_back_is_reset(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(resume_window_s=1.5) as stage:  # each feed is looked at twice a second
        alice = await as_user(stage, stack, "alice")
        for n in range(3):
            await alice.do("put", table="notes", item={"id": f"n{n}", "owner": "alice"})
            await alice.next(type="change", table="notes")
        entries = stage.backend.keys.user_feed("alice")
        feeds = stage.backend.keys.home_of(entries).feeds
        cut: Any = await stage.backend.commands.xrange(entries)
        id_, fields = cut[0]
        tag = fields[b"e"].partition(b" ")[0]
        await stage.backend.commands.delete(entries)
        await stage.backend.commands.xadd(entries, fields, id=id_)
        state: Any = await stage.backend.commands.hget(feeds, entries)
        await stage.backend.commands.hset(feeds, entries, state[:26] + tag + state[36:])
        reset = await alice.next(type="reset")
        assert reset["reason"] == "cursor_unknown"
        assert reset["cursor"].split(".")[1:] == ["1", tag.decode()]
        await alice.do("put", table="notes", item={"id": "n9", "owner": "alice"})
        assert (await alice.next(type="change", table="notes"))["key"]["id"] == "n9"
