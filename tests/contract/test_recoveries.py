"""What goes wrong on the way, and what must be so after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from tidewire import App, everyone, testing, user
from tidewire.errors import Fenced
from tidewire.process.partition.loop import PartitionLoop
from tidewire.redis.connect import connect
from tidewire.redis.functions import Functions
from tidewire.redis.keys import Home, Keys
from tidewire.services.gateway.feeds import Feeds
from tidewire.testing import Stage

from .conftest import Open, as_user, eventually, wire


async def test_a_request_that_redis_failed_in_ends_its_connection(
    stage: Stage, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, carol = [await as_user(stage, stack, name) for name in ("alice", "carol")]
    cursor = (await alice.do("follow", topic="cell:1"))["cursor"]
    read = Feeds.read

    async def cut(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(Feeds, "read", read)
        raise ConnectionError("cut")

    monkeypatch.setattr(Feeds, "read", cut)
    await alice.send({"id": 1, "action": "follow", "topic": "cell:1", "cursor": cursor})
    assert await alice.closed() == 1013, "it is not left half done, and deaf"
    topics = f'{{"cell:1": "{cursor}"}}'
    async with wire(stage, await stage.key("alice"), topics=topics) as again:
        await carol.do("put", table="tiles", item={"id": "t", "cell": 1})
        assert (await again.next(type="change", topic="cell:1"))["key"] == {"id": "t"}


async def test_a_broadcaster_that_two_destinations_refuse_gives_up_the_partition_and_goes_on(
    open_stage: Open, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App("pairs")
    app.table("pairs", key="id", readers=user("a") | user("b"), writers=everyone)
    send, refused = PartitionLoop._send, list[tuple[PartitionLoop, Home]]()

    async def refuse(loop: PartitionLoop, to: Home, calls: Sequence[Any]) -> None:
        if not refused or refused[0][0] is loop:
            refused.append((loop, to))
            raise Fenced("a later owner has stamped it")
        await send(loop, to, calls)

    async with open_stage(app) as stage:
        alice, names = await as_user(stage, stack, "alice"), (f"user{number}" for number in itertools.count())
        partition_of = stage.backend.keys.partition_of
        other = next(name for name in names if partition_of(name) != partition_of("alice"))
        bob = await as_user(stage, stack, other)
        monkeypatch.setattr(PartitionLoop, "_send", refuse)
        await alice.do("put", table="pairs", item={"id": "p", "a": "alice", "b": other})
        for reader in (alice, bob):
            assert (await reader.next(type="change", table="pairs"))["key"] == {"id": "p"}
        assert len({to for _, to in refused}) == 2, "both were refused, so the errors came as a group"


async def test_a_user_who_leaves_the_last_common_room_stops_following_the_other(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    app = App("peers")
    rooms = app.membership("members", group="room", member="user", writers=everyone)
    faces = app.topic("face:{user}", followers=rooms.peers("user"))
    app.table("faces", key="user", readers=faces.of("user"), writers=everyone)
    async with open_stage(app) as stage:
        alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
        for name in ("alice", "bob"):
            await bob.do("put", table="members", item={"room": "r", "user": name})

        async def follows() -> bool:
            return bool((await alice.ask("follow", topic="face:bob"))["type"] == "reply")

        await eventually(follows)
        await bob.do("delete", table="members", key={"room": "r", "user": "bob"})
        assert (await alice.next(type="reset", topic="face:bob"))["reason"] == "cursor_expired"
        assert (await alice.next(type="error", id=None))["details"]["topic"] == "face:bob"
        await bob.do("put", table="faces", item={"user": "bob", "smiles": True})
        await alice.do("ping")
        assert not [frame for frame in alice.frames if frame.get("table") == "faces"]
        await stack.aclose()


async def test_topics_are_looked_at_again_after_a_reset_which_may_have_hidden_that_they_must(
    open_stage: Open, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_stage(resume_window_s=1.5) as stage:  # each feed is looked at twice a second
        alice, admin = await as_user(stage, stack, "alice"), await as_user(stage, stack, "admin", role="service")
        await admin.do("put", table="members", item={"room": "r", "user": "alice"})
        await alice.next(type="change", table="members")
        await alice.do("follow", topic="room:r")
        feed, append = stage.backend.keys.user_feed("alice"), Functions.link_append

        async def lost(self: Functions, to: Any, source: str, epoch: int, most: Any, units: Any) -> int:
            """As if Redis had gone back: the entries are not there, and all feeds begin anew."""
            if any(feed in one.feeds for unit in units for one in unit.appends):
                await self.link_reset(to, source, epoch, units[-1].position)
                return 0
            return await append(self, to, source, epoch, most, units)

        monkeypatch.setattr(Functions, "link_append", lost)
        await admin.do("delete", table="members", key={"room": "r", "user": "alice"})
        await alice.next(type="reset", topic=None)
        await alice.next(type="reset", topic="room:r")
        assert (await alice.next(type="error", id=None))["code"] == "forbidden"
        await stack.aclose()


@pytest.mark.real
async def test_a_server_that_has_lost_the_functions_or_its_listeners_goes_on(
    server: str, stack: AsyncExitStack
) -> None:
    app = App("goes")
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone)
    backend = await connect(server, Keys("goes", 2))
    async with testing.run(app, backend=backend, stage="goes", partitions=2) as stage:
        alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
        for n, command in enumerate((("FUNCTION", "FLUSH"), ("CLIENT", "KILL", "TYPE", "pubsub"))):
            await backend.calls([command])
            await alice.do("put", table="lines", item={"page": "p", "n": n})
            assert (await bob.next(type="change", table="lines"))["key"]["n"] == n
        await stack.aclose()


async def test_a_client_that_repeats_a_service_keys_request_gets_no_result_of_it(
    stage: Stage, stack: AsyncExitStack
) -> None:
    admin = await as_user(stage, stack, "alice", role="service")
    alice = await as_user(stage, stack, "alice")
    await admin.do("put", table="secrets", item={"id": "s", "pin": 1234, "n": 1})
    shown = await admin.do("update", table="secrets", key="s", set={"n": 2}, request="same")
    assert shown["item"]["pin"] == 1234
    again = await alice.do("update", table="secrets", key="s", set={"n": 2}, request="same")
    assert "pin" not in again["item"]
