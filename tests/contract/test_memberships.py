"""Memberships that end and flap while their broadcaster is late: no leak, and no long wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from tidewire import App, everyone
from tidewire.redis.backend import Backend
from tidewire.tasks import end
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user

LEASE_MS = 1500


def make_app() -> App:
    app = App("memberships")
    rooms = app.membership("members", group="room", member="user", writers=everyone)
    topic = app.topic("room:{room}", followers=rooms.of("room"))
    app.table("plates", key="id", readers=topic.of("room"), writers=everyone)
    app.table("messages", key=("room", "id"), readers=rooms.of("room"), writers=everyone)
    app.table("faces", key="user", readers=rooms.peers("user"), writers=everyone)
    return app


@contextlib.asynccontextmanager
async def held(backend: Backend, group: str, partition: int) -> AsyncIterator[None]:
    """The partition belongs to an owner that does nothing."""
    lease = backend.keys.lease(partition, group)
    epoch = int(await backend.commands.hget(lease, "epoch") or 0) + 10**6

    async def hold() -> None:
        while True:
            expires = await backend.now_ms() + LEASE_MS
            await backend.commands.hset(lease, mapping={"owner": "nobody", "epoch": epoch, "expires": expires})
            await asyncio.sleep(0.1)

    await backend.commands.hset(lease, mapping={"owner": "nobody", "epoch": epoch, "expires": 0})
    holding = asyncio.create_task(hold())
    try:
        yield
    finally:
        await end([holding], ask_again_s=0.5)  # a cancellation may get lost in redis-py
        await backend.commands.hset(lease, "expires", "0")


async def joined(stage: Stage, stack: AsyncExitStack, room: str, *names: str) -> list[Wire]:
    """Connections of members of a room."""
    wires = [await as_user(stage, stack, name) for name in names]
    for name, one in zip(names, wires, strict=True):
        await one.do("put", table="members", item={"room": room, "user": name})
        await one.next(type="change", table="members")
    return wires


async def test_a_removed_member_hears_no_more_of_a_topic_though_the_broadcaster_is_late(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    """The membership's broadcaster is held, the plates' is not. Of 20 writes after the removal, 20 came."""
    async with open_stage(make_app(), lease_ms=LEASE_MS) as stage:
        keys = stage.backend.keys
        partition = keys.partition_of("r")
        elsewhere = [f"p{n}" for n in range(200) if keys.partition_of(f"p{n}") != partition][:20]
        alice, bob = await joined(stage, stack, "r", "alice", "bob")
        for one in (alice, bob):
            await one.do("follow", topic="room:r")
        async with held(stage.backend, "broadcaster", partition):
            await bob.do("delete", table="members", key={"room": "r", "user": "alice"})
            for id_ in elsewhere:
                await bob.do("put", table="plates", item={"id": id_, "room": "r"})
            for id_ in elsewhere:
                assert (await bob.next(type="change", topic="room:r"))["key"]["id"] == id_
            await alice.next(type="reset", topic="room:r")
            assert (await alice.next(type="error", id=None))["details"]["topic"] == "room:r"
            await alice.do("ping")
            # One may have been under way: announcements and entries are heard on two connections.
            assert len([frame for frame in alice.frames if frame.get("table") == "plates"]) <= 1
        await stack.aclose()


async def test_a_member_who_stays_misses_nothing_while_its_rights_are_looked_at(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage(make_app(), lease_ms=LEASE_MS) as stage:
        (alice,) = await joined(stage, stack, "r", "alice")
        writer = await as_user(stage, stack, "writer")
        await alice.do("put", table="members", item={"room": "other", "user": "alice"})
        await alice.do("follow", topic="room:r")
        for n in range(20):
            await writer.do("put", table="plates", item={"id": f"p{n}", "room": "r"})
            await alice.do("delete", table="members", key={"room": "other", "user": "alice"})
            await alice.do("put", table="members", item={"room": "other", "user": "alice"})
        received = [await alice.next(type="change", topic="room:r") for _ in range(20)]
        assert sorted(frame["key"]["id"] for frame in received) == sorted(f"p{n}" for n in range(20))
        await stack.aclose()


async def test_a_membership_that_flaps_does_not_keep_other_changes_waiting(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    """For each leave and join the broadcaster waited up to 2 s for a state of the index that had passed: 38.6 s."""
    async with open_stage(make_app(), lease_ms=LEASE_MS) as stage:
        (alice,) = await joined(stage, stack, "r", "alice")
        async with held(stage.backend, "broadcaster", stage.backend.keys.partition_of("r")):
            for _ in range(15):
                await alice.do("put", table="members", item={"room": "r", "user": "bob"})
                await alice.do("delete", table="members", key={"room": "r", "user": "bob"})
            await alice.do("put", table="messages", item={"room": "r", "id": "m"})
        begun = time.monotonic()
        await alice.next(type="change", table="messages")
        assert time.monotonic() - begun < 10, "a new owner takes the partition within a lease, and waits once"
        await stack.aclose()
