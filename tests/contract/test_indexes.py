"""Indexes where something went wrong: what was lost is noticed, and once quiet the index is the table."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tidewire import App, everyone, testing
from tidewire.app import index_field
from tidewire.model.records import ItemRecord, pack, unpack
from tidewire.model.values import ItemKey
from tidewire.process.partition.loop import PartitionLoop
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import ConsumerGroup, Keys
from tidewire.services.store.indexer import IndexerTenure

from .conftest import eventually


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
            assert await backend.functions.lease_take(lease, home, home.changes, ConsumerGroup.INDEXER, "me", 1000)
        await asyncio.sleep(0.2)


@pytest.mark.real
async def test_an_index_is_repaired_after_changes_were_trimmed_unread(server: str) -> None:
    """The store goes beyond its length cap while no indexer works; then one works again."""
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
    holding = asyncio.create_task(
        hold(backend, [keys.lease(partition, ConsumerGroup.INDEXER) for partition in range(2)])
    )
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

        async def repaired() -> bool:
            of_ann, of_bob = await owned_by(client, "ann"), await owned_by(client, "bob")
            return of_ann == ["new 0", "b5 5", "b7 7", "b3 33"] and of_bob == ["b0 0", "b2 2", "b4 4", "b6 6"]

        await eventually(repaired)
        await client.__aexit__()


@pytest.mark.real
async def test_an_index_is_repaired_after_its_server_fell_back(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several masters loses its newest index writes: an insert and a delete."""
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


def shop(**indexes: tuple[str, str]) -> App:
    app = App("shop")
    app.table("books", key="id", readers=everyone, writers=everyone, indexes=indexes)
    app.table("notes", key="name", readers=everyone, writers=everyone)
    return app


BY_OWNER, BY_COLOR = ("owner", "n"), ("color", "n")


class Quiet(Exception):
    """There is nothing left to do."""


async def indexed(backend: Backend, app: App, *, commits: bool = True) -> None:
    """One owner of partition 0, until there is nothing left to do; or until it is cancelled before its first commit."""
    keys, functions = backend.keys, backend.functions
    home, lease = keys.home(0), keys.lease(0, ConsumerGroup.INDEXER)
    owned = None
    while owned is None:
        owned = await functions.lease_take(lease, home, home.changes, ConsumerGroup.INDEXER, "me", 60_000)
        await asyncio.sleep(0.05)
    await backend.ensure_group(home.changes, ConsumerGroup.INDEXER)

    async def idle(_: tuple[int, int]) -> None:
        raise Quiet

    tenure = IndexerTenure(app, backend, 0, owned)
    loop = PartitionLoop(
        functions, owned, tenure, source="indexer:0", idle=idle, batch=256, link=functions.link_apply
    )  # fmt: skip
    if not commits:
        loop._functions = Cancelled(functions)  # type: ignore[assignment]
    with pytest.raises(Quiet):
        await loop.run()
    await functions.lease_release(owned)


class Cancelled:
    """The functions, where no commit is done."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    async def commit(self, *_: Any, **__: Any) -> None:
        raise Quiet


async def written(
    server: str, keys: Keys, app: App, *items: tuple[str, dict[str, Any]], followed: bool = True, **request: Any
) -> None:
    """Items of a stage of one partition, put by a whole system; it ends once its indexes have followed."""
    backend = await connect(server, keys)
    async with testing.run(app, backend=backend, stage=keys.stage, partitions=1, lease_ms=1000) as stage:
        client = await stage.client("writer")
        await asyncio.gather(*(client.put(table, item, **request) for table, item in items))

        async def have_followed() -> bool:
            groups: Any = await backend.commands.xinfo_groups(keys.changes(0))
            return all(not (group["lag"] or group["pending"]) for group in groups)

        if followed:
            await eventually(have_followed)
        await client.__aexit__()


async def entries(backend: Backend, attributes: tuple[str, str], value: str) -> int:
    items, order = backend.keys.index("books", attributes, value)
    count = await backend.commands.hlen(items)
    assert count == await backend.commands.zcard(order)
    return count


@pytest.mark.real
async def test_an_index_is_filled_behind_late_effects_of_a_predecessor(server: str) -> None:
    """It was cancelled between its links and its commit, as when it hands over: the link takes nothing older."""
    keys, old = Keys("behind", 1), shop(by_owner=BY_OWNER)
    books = [("books", {"id": f"b{n}", "owner": "ann", "color": "red", "n": n}) for n in range(300)]
    await written(server, keys, old, *books)
    async with await connect(server, keys) as backend:
        holding = asyncio.create_task(hold(backend, [keys.lease(0, ConsumerGroup.INDEXER)]))
        await written(server, keys, old, ("books", books[0][1] | {"n": 1000}), followed=False)
        holding.cancel()
        await indexed(backend, old, commits=False)
        await indexed(backend, shop(by_owner=BY_OWNER, by_color=BY_COLOR))
        assert [await entries(backend, BY_OWNER, "ann"), await entries(backend, BY_COLOR, "red")] == [300, 300]


PLANTED = "x}:index:books.owner.n:y"


@pytest.mark.real
@pytest.mark.parametrize("where", ["key", "value", "request"])
async def test_text_in_keys_is_not_taken_for_an_index(server: str, where: str) -> None:
    keys, app = Keys(f"planted-{where}", 1), shop(by_owner=BY_OWNER)
    book = {"id": "b", "owner": PLANTED if where == "value" else "ann", "n": 1}
    request: Any = {"request": PLANTED} if where == "request" else {}
    await written(server, keys, app, ("books", book), **request)
    if where == "key":
        await written(server, keys, app, ("notes", {"name": PLANTED}))
    async with await connect(server, keys) as backend:
        await backend.commands.hset(keys.partition(0), "alone", "1")  # as if it had fallen back
        await indexed(backend, app)
        assert await entries(backend, BY_OWNER, str(book["owner"])) == 1


@pytest.mark.real
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "not declared meanwhile"])
async def test_an_entry_that_no_item_has_is_removed_also_after_another_application(server: str, declared: bool) -> None:
    """Whoever notices that a server has fallen back may be one that does not have the index."""
    keys, app = Keys(f"strays-{declared}".lower(), 1), shop(by_owner=BY_OWNER)
    await written(server, keys, app, ("books", {"id": "b", "owner": "ann", "n": 1}))
    gone = {"id": "gone", "owner": "ann", "n": 0}
    async with await connect(server, keys) as backend:
        items, order = keys.index("books", BY_OWNER, "ann")
        field = index_field(ItemKey("books", "gone", None), gone, BY_OWNER)
        await backend.commands.hset(items, field, pack(ItemRecord(1, 1, "writer", gone)))
        await backend.commands.zadd(order, {field: 0})
        assert await entries(backend, BY_OWNER, "ann") == 2
        await backend.commands.hset(keys.partition(0), "alone", "1")
        if not declared:
            await indexed(backend, shop())
        await indexed(backend, app)
        assert await entries(backend, BY_OWNER, "ann") == 1


@pytest.mark.real
@pytest.mark.parametrize("fallen", [1, 0], ids=["another one", "the source itself"])
async def test_only_entries_in_a_partition_that_fell_back_are_repaired(server: str, fallen: int) -> None:
    """Of a source in partition 0, with entries in both. Where the source fell back itself, all are looked at."""
    keys, app = Keys(f"only-{fallen}", 2), shop(by_owner=BY_OWNER)
    ids = [name for name in (f"b{n}" for n in range(200)) if keys.partition_of(name) == 0][:6]
    owners = [next(f"o{n}" for n in range(99) if keys.partition_of(f"o{n}") == partition) for partition in range(2)]
    async with await connect(server, keys) as backend:
        for n, id_ in enumerate(ids):
            item = {"id": id_, "owner": owners[n % 2], "n": n}
            await backend.commands.hset(keys.items("books", id_), b"", pack(ItemRecord(1, 1, "writer", item)))
            await backend.commands.zadd(keys.values(0, "books"), {b"s" + id_.encode(): 0})
        await indexed(backend, app)
        assert [await entries(backend, BY_OWNER, owner) for owner in owners] == [3, 3]
        for owner in owners:
            # One entry is lost, and one is there that no item has.
            items, order = keys.index("books", BY_OWNER, owner)
            lost = (await backend.commands.hkeys(items))[0]
            await backend.commands.hdel(items, lost)
            await backend.commands.zrem(order, lost)
            gone = {"id": ids[0], "owner": owner, "n": 77}
            field = index_field(ItemKey("books", ids[0], None), gone, BY_OWNER)
            await backend.commands.hset(items, field, pack(ItemRecord(1, 1, "writer", gone)))
            await backend.commands.zadd(order, {field: 0})
        await backend.commands.hset(keys.partition(fallen), "alone", "1")
        await indexed(backend, app)
        numbers = [
            sorted(unpack(raw)[3]["n"] for raw in await backend.commands.hvals(keys.index("books", BY_OWNER, owner)[0]))
            for owner in owners
        ]
        assert numbers[1] == [1, 3, 5]
        assert (numbers[0] == [0, 2, 4]) == (fallen == 0), "else it stays as it was: the test has damaged it, no fall"
