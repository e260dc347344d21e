"""What the store keeps: transactions, indexes, expiry, schemas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tidewire import App, everyone, testing
from tidewire.client import Client
from tidewire.model.records import Change, unpack
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.services.cli.status import collect
from tidewire.testing import Stage

from .conftest import as_user, eventually, post


async def test_a_transaction_is_all_and_its_changes_come_as_one(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob = await as_user(stage, stack, "alice"), await as_user(stage, stack, "bob")
    operations = [
        {"action": "put", "table": "members", "item": {"room": "r", "user": "alice"}},
        {"action": "put", "table": "members", "item": {"room": "r", "user": "bob"}},
        {"action": "put", "table": "messages", "item": {"room": "r", "id": "m1"}},
        {"action": "check", "table": "messages", "key": {"room": "r", "id": "m2"}, "if": {"absent": True}},
        {"action": "put", "table": "messages", "item": {"room": "r", "id": "m3"}},
    ]
    results = (await alice.do("transact", operations=operations))["results"]
    assert [result["version"] for result in results] == [1, 1, 1, 0, 1]
    frames = [await alice.next(type="change", table=table) for table in ("members", "members", "messages", "messages")]
    assert [frame["position"] for frame in frames] == [results[n]["position"] for n in (0, 1, 2, 4)]
    assert len({frame["transaction"] for frame in frames}) == 1
    assert [frame.get("more") for frame in frames] == [True, True, True, None]
    seen = [await bob.next(type="change", table=table) for table in ("members", "messages", "messages")]
    assert [frame.get("more") for frame in seen] == [True, True, None]


async def test_a_transaction_is_nothing_where_one_operation_fails(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    operations: list[dict[str, Any]] = [
        {"action": "put", "table": "scores", "item": {"id": "s"}},
        {"action": "update", "table": "notes", "key": "s", "set": {"x": 1}},
    ]
    error = await alice.refused("transact", operations=operations)
    assert (error["code"], error["details"]) == ("not_found", {"operation": 1})
    assert (await alice.refused("get", table="scores", key="s"))["code"] == "not_found"
    operations[1] = {"action": "put", "table": "scores", "item": {"id": "other"}}
    error = await alice.refused("transact", operations=operations)
    assert error["code"] == "bad_request"
    assert "partition key" in error["message"]


async def test_an_index_follows_its_table(stage: Stage, stack: AsyncExitStack) -> None:
    alice, bob = await as_user(stage, stack, "alice"), await as_user(stage, stack, "bob")
    for n in range(5):
        await alice.do("put", table="orders", item={"id": f"o{n}", "owner": "alice", "at": n // 2})

    async def ids(**bounds: Any) -> list[str]:
        found = await alice.do("query", table="orders", index="by_owner", key="alice", **bounds)
        return [entry["item"]["id"] for entry in found["items"]]

    begun = time.monotonic()
    assert await eventually(lambda: _is(ids(), ["o0", "o1", "o2", "o3", "o4"]))
    print(f"the index followed within {1000 * (time.monotonic() - begun):.0f} ms")
    assert await ids(reverse=True, limit=2) == ["o4", "o3"]
    assert await ids(after=0) == ["o2", "o3", "o4"]
    page = await alice.do("query", table="orders", index="by_owner", key={"owner": "alice"}, limit=1)
    seen = [page["items"][0]["item"]["id"]]
    while page["next"] is not None:
        page = await alice.do("query", table="orders", index="by_owner", key="alice", limit=1, after=page["next"])
        seen.append(page["items"][0]["item"]["id"])
    assert seen == ["o0", "o1", "o2", "o3", "o4"]
    assert (await bob.do("query", table="orders", index="by_owner", key="alice"))["items"] == []
    await alice.do("update", table="orders", key="o1", set={"at": 9})
    await alice.do("delete", table="orders", key="o0")
    assert await eventually(lambda: _is(ids(), ["o2", "o3", "o4", "o1"]))
    error = await alice.refused("query", table="orders", index="by_color", key="alice")
    assert "'by_owner'" in error["message"]


async def _is(found: Any, expected: Any) -> bool:
    return bool(await found == expected)


async def test_the_rooms_of_a_user_are_one_query(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    for room in ("b", "a", "c"):
        await alice.do("put", table="members", item={"room": room, "user": "alice"})

    async def rooms() -> list[str]:
        found = await alice.do("query", table="members", index="by_member", key="alice")
        return [entry["item"]["room"] for entry in found["items"]]

    assert await eventually(lambda: _is(rooms(), ["a", "b", "c"]))
    await alice.do("delete", table="members", key={"room": "b", "user": "alice"})
    assert await eventually(lambda: _is(rooms(), ["a", "c"]))


@pytest.mark.real
async def test_an_index_that_is_new_is_filled_and_one_that_has_gone_is_emptied(server: str) -> None:
    plain, indexed = App("shop"), App("shop")
    plain.table("orders", key="id", writers=everyone, readers=everyone)
    indexed.table("orders", key="id", writers=everyone, readers=everyone, indexes={"by_owner": ("owner", "id")})

    async def entries(stage: Stage) -> int:
        keys = stage.backend.keys
        found = [keys.index("orders", ("owner", "id"), owner) for owner in ("u0", "u1", "u2")]
        counts = [await stage.backend.commands.hlen(items) for items, _ in found]
        ordered = [await stage.backend.commands.zcard(order) for _, order in found]
        return sum(counts) if counts == ordered else -1

    for app, count in ((plain, 0), (indexed, 700), (plain, 0)):
        backend = await connect(server, Keys("filling", 2))
        async with testing.run(app, backend=backend, stage="filling", partitions=2, lease_ms=1000) as stage:
            if app is plain and not count:
                alice = await stage.client("alice", role="service")
                puts = [alice.put("orders", {"id": f"o{n:03}", "owner": f"u{n % 3}"}) for n in range(700)]
                await asyncio.gather(*puts)

            async def filled(stage: Stage = stage, count: int = count) -> bool:
                return await entries(stage) == count and all(
                    index["filled"] == 1 for index in (await collect(stage.backend))["indexes"]
                )

            await eventually(filled)


async def test_an_expired_item_is_gone_and_then_removed(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    now = time.time()
    await alice.do("put", table="orders", item={"id": "o", "owner": "alice", "until": now + 0.5})
    await alice.next(type="change", table="orders", event="INSERT")
    removed = await alice.next(type="change", table="orders", event="REMOVE")
    late_s = time.time() - (now + 0.5)
    print(f"removed {late_s:.2f} s after its time")
    assert 0 <= late_s < 3 * 5
    assert removed["by"] == "tidewire:expiry"
    assert (await alice.refused("get", table="orders", key="o"))["code"] == "not_found"


async def declaring(
    server: str, keys: Keys, expires: str | None, work: Callable[[Stage, Client], Awaitable[None]]
) -> None:
    """Work on a stage whose tables name that expiry, but for one, which always has its own."""
    app = App("expiring")
    app.table("notes", key=("page", "n"), writers=everyone, readers=everyone, expires=expires)
    app.table("signs", key="id", writers=everyone, readers=everyone, expires=expires)
    app.table("others", key="id", writers=everyone, readers=everyone, expires="until")
    backend = await connect(server, keys)
    options: Any = {"stage": keys.stage, "partitions": keys.partitions, "lease_ms": 1000}
    async with testing.run(app, backend=backend, **options) as stage:
        client = await stage.client("alice", role="service")
        await work(stage, client)
        await client.__aexit__()


@pytest.mark.real
async def test_items_that_were_there_before_their_table_named_an_expiry_expire_too(server: str) -> None:
    soon, keys = int(time.time()) + 1, Keys("later", 2)

    async def write(_: Stage, client: Client) -> None:
        puts = [client.put("notes", {"page": f"p{n % 3}", "n": n, "until": soon}) for n in range(450)]
        await asyncio.gather(*puts, client.put("signs", {"id": "s", "ends": soon + 3600, "until": "never"}))

    async def one_is_noted(stage: Stage, _: Client) -> None:
        async def is_noted() -> bool:
            return await stage.backend.commands.zcard(keys.expiries(keys.partition_of("s"))) == 1

        await eventually(is_noted)

    async def all_but_one_expire(stage: Stage, client: Client) -> None:
        async def are_gone() -> bool:
            return not any([await stage.backend.commands.exists(keys.order("notes", f"p{n}")) for n in range(3)])

        await eventually(are_gone)
        assert (await client.get("signs", "s"))["version"] == 1

    await declaring(server, keys, None, write)
    await declaring(server, keys, "ends", one_is_noted)
    await declaring(server, keys, "until", all_but_one_expire)


@pytest.mark.real
async def test_items_that_were_written_while_no_expiry_was_declared_expire_once_it_is_again(server: str) -> None:
    """As in a deployment that was taken back for a while."""
    keys = Keys("again", 1)

    async def first(_: Stage, client: Client) -> None:
        await client.put("signs", {"id": "first", "until": time.time() + 3600})

    async def second(_: Stage, client: Client) -> None:
        await client.put("signs", {"id": "second", "until": time.time() + 1})
        await client.put("signs", {"id": "first", "until": time.time() + 1})

    async def are_removed(stage: Stage, _: Client) -> None:
        async def gone() -> bool:
            entries: Any = await stage.backend.commands.xrange(keys.changes(0))
            changes = [Change(*unpack(fields[b"r"])) for _, fields in entries]
            removed = [change.key["id"] for change in changes if change.event == "REMOVE" and change.table == "signs"]
            return sorted(removed) == ["first", "second"]

        await eventually(gone)

    await declaring(server, keys, "until", first)
    await declaring(server, keys, None, second)
    await declaring(server, keys, "until", are_removed)


async def test_a_write_over_an_expired_item_removes_it_first(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    await alice.do("put", table="orders", item={"id": "o", "owner": "alice", "until": time.time() - 1})
    result = await alice.do("put", table="orders", item={"id": "o", "owner": "alice"}, if_={"absent": True})
    assert result["version"] == 3
    events = [(await alice.next(type="change", table="orders"))["event"] for _ in range(3)]
    assert events == ["INSERT", "REMOVE", "INSERT"]


async def test_an_item_must_fit_its_schema(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    error = await alice.refused("put", table="orders", item={"id": "o", "owner": "alice", "at": "noon"})
    assert error["code"] == "bad_request"
    assert "$.at" in error["message"]


async def test_sort_keys_are_of_one_kind(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice")
    await alice.do("put", table="lines", item={"page": "p", "n": 1})
    error = await alice.refused("put", table="lines", item={"page": "other", "n": "one"})
    assert error["code"] == "bad_request"
    assert "must be a number" in error["message"]


@pytest.mark.parametrize("trace", ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "nonsense"])
async def test_the_trace_of_a_request_is_in_its_change(stage: Stage, trace: str) -> None:
    key = await stage.key("alice", role="service")
    status, _ = await post(stage, "put", {"table": "closed", "item": {"id": "t"}}, auth_key=key, traceparent=trace)
    assert status == 200
    keys = stage.backend.keys
    changes: Any = await stage.backend.commands.xrange(keys.changes(keys.partition_of("t")))
    traces = [Change(*unpack(fields[b"r"])).trace for _, fields in changes]
    assert traces == [trace if trace != "nonsense" else None]
