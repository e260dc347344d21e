"""Overload, time-outs and repeats: a refused request is not half done, and a repeated one is done once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from prometheus_client import generate_latest
from redis.exceptions import ConnectionError as RedisConnectionError

from tidewire.services.store.indexer import LAG
from tidewire.services.store.service import StoreTenure
from tidewire.tasks import end
from tidewire.testing import Stage

from .conftest import PATIENCE_S, Open, another_gateway, as_user, eventually, post

LEASE_MS = 1200


@asynccontextmanager
async def withheld(stage: Stage, group: str) -> AsyncIterator[None]:
    """Stop the work of a group: all its leases belong to an owner that does nothing."""
    keys, redis = stage.backend.keys, stage.backend.commands
    leases = [keys.lease(partition, group) for partition in range(keys.partitions)]
    for lease in leases:
        epoch = int(await redis.hget(lease, "epoch") or 0) + 1
        expires = await stage.backend.now_ms() + LEASE_MS
        taken: dict[Any, Any] = {"owner": "nobody", "expires": expires, "epoch": epoch, "call": 0}
        await redis.hset(lease, mapping=taken)

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_MS / 5000)
            for lease in leases:
                await redis.hset(lease, "expires", await stage.backend.now_ms() + LEASE_MS)

    renewing = asyncio.create_task(renew())
    try:
        yield
    finally:
        await end([renewing])
        for lease in leases:
            await redis.hset(lease, "expires", 0)


async def waiting(stage: Stage) -> int:
    """Commands that are not done yet."""
    keys = stage.backend.keys
    lengths = [await stage.backend.commands.xlen(keys.commands(partition)) for partition in range(keys.partitions)]
    return sum(lengths)


async def settled(stage: Stage) -> None:
    """All commands are done, those that tell of new connections too."""

    async def nothing_waits() -> bool:
        return await waiting(stage) == 0

    await eventually(nothing_waits)


async def test_a_full_stream_is_overloaded_and_expired_commands_are_not_done(open_stage: Open) -> None:
    async with (
        open_stage(commands_max=3, request_timeout_s=0.7, lease_ms=LEASE_MS) as stage,
        AsyncExitStack() as inner,
    ):
        alice = await as_user(stage, inner, "alice")
        await alice.do("put", table="scores", item={"id": "before"})
        await settled(stage)
        key = await stage.key("alice")
        await post(stage, "ping", auth_key=key)
        async with withheld(stage, "store"):
            for n in range(3):
                await alice.send({"id": f"w{n}", "action": "put", "table": "scores", "item": {"id": "s", "n": n}})

            async def full() -> bool:
                return await waiting(stage) == 3

            await eventually(full)
            operations = [
                {"action": "put", "table": "scores", "item": {"id": "s"}},
                {"action": "put", "table": "lines", "item": {"page": "s", "n": 1}},
            ]
            for action, fields in (
                ("put", {"table": "scores", "item": {"id": "s", "n": 3}}),
                ("transact", {"operations": operations}),
                ("get", {"table": "scores", "key": "s"}),
            ):
                error = await alice.refused(action, **fields)
                assert (error["code"], error["retry"]) == ("overloaded", True)
                assert "3 commands (TIDEWIRE_COMMANDS_MAX)" in error["message"]
            status, error = await post(stage, "transact", {"operations": operations}, auth_key=key)
            assert (status, error["code"], error["retry"]) == (503, "overloaded", True)
            assert await alice.do("ping") == {}, "the connection lives"
            for n in range(3):
                error = await alice.next(id=f"w{n}")
                assert (error["code"], error["retry"]) == ("timeout", True)
            await asyncio.sleep(0.05)  # their deadlines have passed by the clock of whoever is behind, too
        await settled(stage)
        assert (await alice.refused("get", table="scores", key="s"))["code"] == "not_found"
        assert (await alice.do("query", table="lines", key="s"))["items"] == []
        assert (await alice.do("transact", operations=operations))["results"][0]["version"] == 1
        changes = [await alice.next(type="change", table=table) for table in ("scores", "scores", "lines")]
        assert [frame["key"].get("id") for frame in changes] == ["before", "s", None], "nothing of what was refused"


async def test_one_request_through_two_gateways_is_done_once_and_for_each_user(stage: Stage) -> None:
    async with another_gateway(stage) as (_, other), AsyncExitStack() as inner:
        here, there = await as_user(stage, inner, "alice"), await as_user(other, inner, "alice")
        bob = await as_user(other, inner, "bob")
        await here.do("put", table="scores", item={"id": "s"})
        update: dict[str, Any] = {"table": "scores", "key": "s", "add": {"n": 1}, "request": "r1"}
        first = await here.do("update", **update)
        assert first["item"]["n"] == 1
        assert await there.do("update", **update) == first
        assert await post(other, "update", update, auth_key=await other.key("alice")) == (200, first)
        together = update | {"request": "r2"}
        results = await asyncio.gather(*(wire.do("update", **together) for wire in (here, there)))
        assert [result["item"]["n"] for result in results] == [2, 2]
        theirs = await bob.do("update", **update)
        assert theirs["item"]["n"] == 3, "another user's request of that name is another"
        assert await bob.do("update", **update) == theirs
        assert await here.do("update", **update) == first
        assert (await there.do("get", table="scores", key="s"))["version"] == 4


async def test_a_request_whose_reply_died_with_the_store_gives_the_first_result(
    open_stage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths, committed = 0, StoreTenure.committed

    async def dies(tenure: StoreTenure, *, confirmed: bool) -> None:
        nonlocal deaths
        if deaths == 0 and tenure._decision.replies:
            deaths += 1
            raise RedisConnectionError("the store dies between its commit and its reply")
        await committed(tenure, confirmed=confirmed)

    async with open_stage(request_timeout_s=0.8, lease_ms=600) as stage, AsyncExitStack() as inner:
        alice = await as_user(stage, inner, "alice")
        await alice.do("put", table="scores", item={"id": "s"})
        await settled(stage)
        operations = [
            {"action": "update", "table": "scores", "key": "s", "add": {"n": 1}},
            {"action": "put", "table": "lines", "item": {"page": "s", "n": 1}, "if": {"absent": True}},
        ]
        monkeypatch.setattr(StoreTenure, "committed", dies)
        lost = await alice.refused("transact", operations=operations, request="r1")
        assert (lost["code"], lost["retry"], deaths) == ("timeout", True, 1)

        async def repeated() -> Any:
            reply = await alice.ask("transact", operations=operations, request="r1")
            assert reply["type"] == "reply" or reply["retry"], reply
            return reply.get("result")

        first = (await eventually(repeated))["results"]
        assert first[0]["item"] == {"id": "s", "n": 1}
        assert [result["version"] for result in first] == [2, 1]
        assert await repeated() == {"results": first}
        change = await alice.next(type="change", table="scores", version=2)
        assert change["position"] == first[0]["position"], "the result is that of the write that was done"
        assert (await alice.do("get", table="scores", key="s"))["version"] == 2


async def test_how_far_the_indexes_are_behind_is_in_the_metrics(
    open_stage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_stage(lease_ms=LEASE_MS) as stage, AsyncExitStack() as inner:
        alice = await as_user(stage, inner, "alice")
        partition = stage.backend.keys.partition_of("o")
        gauge, values = LAG.labels(partition), list[float]()
        write = gauge.set

        def record(value: float) -> None:
            values.append(value)
            write(value)

        async with withheld(stage, "indexer"):
            await alice.do("put", table="orders", item={"id": "o", "owner": "alice", "at": 1})
            await asyncio.sleep(0.3)
            monkeypatch.setattr(gauge, "set", record)

        async def caught_up() -> bool:
            found = await alice.do("query", table="orders", index="by_owner", key="alice")
            return bool(found["items"]) and values[-1:] == [0]

        await eventually(caught_up)
        assert 0.25 < max(values) < PATIENCE_S, "so far behind was the change that waited"
        assert f'tidewire_index_lag{{partition="{partition}"}} 0.0' in generate_latest().decode()
