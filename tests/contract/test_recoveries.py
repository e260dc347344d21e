"""What goes wrong on the way, and what must be so after it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from tidewire import App, everyone, testing
from tidewire.app import ItemKey, index_field
from tidewire.backend import Backend, connect
from tidewire.functions import Functions
from tidewire.keys import Keys
from tidewire.records import ItemRecord, pack
from tidewire.services.gateway.feeds import Feeds
from tidewire.services.store.indexer import GROUP as INDEXER
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


async def test_who_shares_no_room_any_more_follows_the_other_no_longer(open_stage: Open, stack: AsyncExitStack) -> None:
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

        async def lost(self: Functions, to: Any, source: str, epoch: int, most: Any, appends: Any) -> int:
            """As if Redis had gone back: the entries are not there, and all feeds begin anew."""
            appends = list(appends)
            if any(feed in one.feeds for one in appends):
                await self.link_reset(to, source, epoch, appends[-1].position)
                return 0
            return await append(self, to, source, epoch, most, appends)

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


@pytest.mark.real
async def test_an_index_is_filled_although_all_changes_have_been_trimmed(server: str, stack: AsyncExitStack) -> None:
    def app(**indexes: tuple[str, str]) -> App:
        made = App("late")
        made.table("lines", key=("page", "n"), readers=everyone, writers=everyone, indexes=indexes)
        return made

    keys = Keys("late", 2)
    settings: Any = {"stage": "late", "partitions": 2, "changes_retention_s": 1.0, "lease_ms": 1000}
    backend = await connect(server, keys)
    async with testing.run(app(by_n=("n", "page")), backend=backend, **settings) as stage:
        writer = await stage.client("writer")
        for n in range(6):
            await writer.put("lines", {"page": f"p{n}", "n": n, "owner": "alice"})
        await writer.__aexit__()

        async def trimmed() -> bool:
            lengths = [await backend.commands.xlen(keys.changes(partition)) for partition in range(2)]
            return not any(lengths)

        await eventually(trimmed)
    backend = await connect(server, keys)
    async with testing.run(app(by_n=("n", "page"), by_owner=("owner", "n")), backend=backend, **settings) as stage:
        reader = await stage.client("reader")

        async def filled() -> bool:
            found = await reader.query("lines", "alice", index="by_owner")
            return [one["item"]["n"] for one in found["items"]] == list(range(6))

        await eventually(filled)
        await reader.__aexit__()


def make_shelf() -> App:
    app = App("shelf")
    app.table("books", key="id", readers=everyone, writers=everyone, indexes={"by_owner": ("owner", "n")})
    return app


async def owned_by(client: Any, owner: str) -> list[str]:
    found = await client.query("books", owner, index="by_owner")
    return [f"{one['item']['id']} {one['item']['n']}" for one in found["items"]]


async def hold(backend: Backend, leases: list[bytes]) -> None:
    """Own these leases, of a second, for as long as this runs."""
    while True:
        for lease in leases:
            home = backend.keys.home_of(lease)
            assert await backend.functions.lease_take(lease, home, home.changes, INDEXER, "me", 1000)
        await asyncio.sleep(0.2)


@pytest.mark.real
async def test_an_index_is_mended_where_changes_were_trimmed_before_it_had_read_them(server: str) -> None:
    """The store goes on beyond its length cap while nobody follows the indexes; then somebody does again."""
    keys = Keys("shelf", 2)
    settings: Any = {
        "stage": "shelf", "partitions": 2, "changes_retention_s": 1.0, "changes_max": 1, "lease_ms": 1000
    }  # fmt: skip
    backend = await connect(server, keys)
    async with testing.run(make_shelf(), backend=backend, **settings) as stage:
        client = await stage.client("writer")
        for n in range(8):
            await client.put("books", {"id": f"b{n}", "owner": "ann", "n": n})

        async def followed() -> bool:
            return len(await owned_by(client, "ann")) == 8

        await eventually(followed)
        await client.__aexit__()
    backend = await connect(server, keys)
    holding = asyncio.create_task(hold(backend, [keys.lease(partition, INDEXER) for partition in range(2)]))
    async with testing.run(make_shelf(), backend=backend, **settings) as stage:
        client = await stage.client("writer")
        for n in range(0, 8, 2):
            await client.put("books", {"id": f"b{n}", "owner": "bob", "n": n})
        await client.delete("books", "b1")
        await client.put("books", {"id": "b3", "owner": "ann", "n": 33})
        await client.put("books", {"id": "new", "owner": "ann", "n": 0})

        async def trimmed() -> bool:
            lengths = [await backend.commands.xlen(keys.changes(partition)) for partition in range(2)]
            return max(lengths) <= 1

        await eventually(trimmed)
        assert len(await owned_by(client, "ann")) == 8, "nobody has followed"
        holding.cancel()

        async def mended() -> bool:
            of_ann, of_bob = await owned_by(client, "ann"), await owned_by(client, "bob")
            return of_ann == ["new 0", "b5 5", "b7 7", "b3 33"] and of_bob == ["b0 0", "b2 2", "b4 4", "b6 6"]

        await eventually(mended)
        await client.__aexit__()


@pytest.mark.real
async def test_an_index_is_mended_where_its_server_has_fallen_back(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several masters loses what it had taken last: an entry that came, and that another one went."""
    monkeypatch.setattr("tidewire.services.store.indexer.LOOK_S", 0.2)
    keys = Keys("fallen", 4)
    backend = await connect(cluster, keys)
    async with testing.run(make_shelf(), backend=backend, stage="fallen", partitions=4, lease_ms=1000) as stage:
        client = await stage.client("writer")
        for n in range(3):
            await client.put("books", {"id": f"b{n}", "owner": "ann", "n": n})

        async def is_right() -> bool:
            return await owned_by(client, "ann") == ["b1 1", "b2 2", "b3 3"]

        await client.delete("books", "b0")
        await client.put("books", {"id": "b3", "owner": "ann", "n": 3})
        await eventually(is_right)
        entries, order = keys.index("books", ("owner", "n"), "ann")
        fields: list[Any] = await backend.commands.zrange(order, 0, -1)
        gone = ItemRecord(1, 1, "writer", {"id": "b0", "owner": "ann", "n": 0})
        stray = index_field(ItemKey("books", "b0", None), gone.item or {}, ("owner", "n"))
        await backend.calls(
            [
                ("HDEL", entries, fields[-1]),
                ("ZREM", order, fields[-1]),
                ("HSET", entries, stray, pack(gone)),
                ("ZADD", order, 0, stray),
                ("HSET", keys.partition(keys.partition_of("ann")), "server", "0" * 40),
            ]
        )
        assert await owned_by(client, "ann") == ["b0 0", "b1 1", "b2 2"]
        await eventually(is_right)
        await client.__aexit__()


async def test_what_a_service_key_was_shown_is_not_for_a_client_that_repeats_its_request(
    stage: Stage, stack: AsyncExitStack
) -> None:
    admin = await as_user(stage, stack, "alice", role="service")
    alice = await as_user(stage, stack, "alice")
    await admin.do("put", table="secrets", item={"id": "s", "pin": 1234, "n": 1})
    shown = await admin.do("update", table="secrets", key="s", set={"n": 2}, request="same")
    assert shown["item"]["pin"] == 1234
    again = await alice.do("update", table="secrets", key="s", set={"n": 2}, request="same")
    assert "pin" not in again["item"]
