"""A server without memory or disk, or with evicted keys: what still works, and the error of each client."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets

from tests import topologies
from tests.helpers import free_port
from tidewire import App, everyone, testing
from tidewire.redis import keyring
from tidewire.redis.connect import connect
from tidewire.redis.functions import SOURCE, VERSION, NumberedCall, StreamBounds
from tidewire.redis.keys import Keys
from tidewire.services.cli.status import collect
from tidewire.testing import Stage

from .conftest import as_user, eventually, post, wire

pytestmark = pytest.mark.real


@pytest.fixture
def full(tmp_path: Path) -> Iterator[topologies.Server]:
    """A server of its own, whose limits the test sets."""
    server = topologies.Server(tmp_path / "server", free_port(), topologies.CONFIG)
    server.start()
    topologies._until("it answers", server.redis.ping)
    yield server
    server.close()


@asynccontextmanager
async def stage_on(server: topologies.Server, **settings: Any) -> AsyncIterator[Stage]:
    app = App("full")
    app.table("scores", key="id", readers=everyone, writers=everyone)
    app.table("pages", key=("book", "n"), readers=everyone, writers=everyone)
    settings = {"partitions": 2, "lease_ms": 3000, "drain_seconds": 0.02} | settings
    backend = await connect(f"redis://127.0.0.1:{server.port}", Keys("full", 2))
    async with testing.run(app, backend=backend, stage="full", **settings) as stage:
        yield stage


async def refusal(stage: Stage, key: str) -> int:
    """The status with which a handshake is refused."""
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with wire(stage, key):
            pass
    return refused.value.response.status_code


async def test_sign_in_works_at_maxmemory(full: topologies.Server) -> None:
    async with stage_on(full, auth_cache_s=0) as stage:
        key = await stage.key("alice")
        full.redis.config_set("maxmemory", 1)
        with pytest.raises(Exception, match="maxmemory"):
            full.redis.set("x", "y")
        status, _ = await post(stage, "whoami", {}, auth_key=key)
        assert status == 200
        status, _ = await post(stage, "get", {"table": "scores", "key": "none"}, auth_key=key)
        assert status == 404, "reads are answered"
        async with wire(stage, key) as alice:
            assert await alice.do("ping") == {}
        async with await connect(f"redis://127.0.0.1:{full.port}", Keys("full", 2)):
            pass  # a service that starts again finds what it needs


async def test_services_start_at_maxmemory_and_deletes_are_done(full: topologies.Server) -> None:
    async with stage_on(full) as stage:
        key = await stage.key("alice")
        async with wire(stage, key) as alice:
            await alice.do("put", table="scores", item={"id": "s"})
    full.redis.config_set("maxmemory", 1)
    async with stage_on(full) as stage, wire(stage, key) as alice:
        assert (await alice.refused("put", table="scores", item={"id": "t"}))["code"] == "overloaded"
        await alice.do("delete", table="scores", key="s")
        assert (await alice.refused("get", table="scores", key="s"))["code"] == "not_found"


async def test_a_key_is_revoked_at_maxmemory(full: topologies.Server) -> None:
    async with stage_on(full) as stage:
        key = await stage.key("alice")
        async with wire(stage, key) as alice:
            full.redis.config_set("maxmemory", 1)
            assert await keyring.revoke(stage.backend, key.split("_")[1])
            assert await alice.closed() == 4401
        assert await refusal(stage, key) == 401


async def test_a_server_that_cannot_save_is_reported_at_once(full: topologies.Server, tmp_path: Path) -> None:
    async with stage_on(full, auth_cache_s=0) as stage, AsyncExitStack() as stack:
        key = await stage.key("alice")
        alice = await as_user(stage, stack, "bob")
        full.redis.config_set("save", "3600 1")
        shutil.rmtree(tmp_path / "server")  # no file can be made there any more
        full.redis.bgsave()
        topologies._until("saving fails", lambda: full.redis.info("persistence")["rdb_last_bgsave_status"] == "err")
        async with asyncio.timeout(8):  # sooner than any request times out
            error = await alice.refused("put", table="scores", item={"id": "s"})
            assert (error["code"], error["retry"]) == ("overloaded", True)
            assert "MISCONF" in error["message"]
            assert "nothing was done" in error["message"]
            assert await refusal(stage, key) == 503
        full.redis.config_set("stop-writes-on-bgsave-error", "no")

        async def written() -> bool:
            return bool((await alice.ask("put", table="scores", item={"id": "s"}))["type"] == "reply")

        await eventually(written)


async def test_lost_credentials_are_unavailable_and_not_invalid(full: topologies.Server) -> None:
    async with stage_on(full, auth_cache_s=0) as stage:
        key = await stage.key("alice")
        keys = stage.backend.keys
        assert await refusal(stage, "tw_000000000000_unknown") == 401
        assert full.redis.delete(keys.credentials().decode())
        assert await refusal(stage, key) == 503
        status, error = await post(stage, "whoami", {}, auth_key=key)
        assert (status, error["code"], error["retry"]) == (503, "overloaded", True)
        full.redis.hdel(keys.stage_settings().decode(), "credentials", "partitions")
        assert await refusal(stage, key) == 503, "nor where the settings have vanished"


async def test_a_server_that_may_evict_keys_is_warned_of(
    full: topologies.Server, capsys: pytest.CaptureFixture[str]
) -> None:
    full.redis.config_set("maxmemory-policy", "allkeys-lru")
    url, keys = f"redis://127.0.0.1:{full.port}", Keys("full", 2)
    async with await connect(url, keys) as backend:
        assert (await collect(backend))["warnings"] == [], "without maxmemory nothing is evicted"
        full.redis.config_set("maxmemory", "1gb")
        (warning,) = (await collect(backend))["warnings"]
        assert "allkeys-lru" in warning
        assert "noeviction" in warning
    capsys.readouterr()
    async with await connect(url, keys):
        assert "keys_may_be_evicted" in "".join(capsys.readouterr())


async def test_a_stream_of_commands_is_bounded_in_bytes(full: topologies.Server) -> None:
    async with await connect(f"redis://127.0.0.1:{full.port}", Keys("full", 2)) as backend:
        stream, bounds = backend.keys.commands(0), StreamBounds(10_000, 4 << 20)
        for number in range(1, 100):
            call = NumberedCall(backend.keys.sent(stream, "gateway"), number)
            if not await backend.functions.enqueue(stream, call, bounds, [b"x" * 250_000]):
                break
        used = int(await backend.commands.memory_usage(stream, samples=0) or 0)
        assert 2 << 20 < used < 6 << 20
        answers = backend.keys.replies("gateway")
        for _ in range(60):
            await backend.functions.answer(answers, StreamBounds(10_000, 4 << 20), 60_000, b"x" * 250_000)
        assert int(await backend.commands.memory_usage(answers, samples=0) or 0) < 6 << 20


async def test_large_unread_answers_do_not_disturb_other_users(full: topologies.Server) -> None:
    """Case L3: four sockets of one user, each with 64 pipelined queries of 1 MiB, never read."""
    async with stage_on(full) as stage, AsyncExitStack() as stack:
        bob = await as_user(stage, stack, "bob")
        for number in range(5):
            await bob.do("put", table="pages", item={"book": "b", "n": number, "text": "x" * 240_000})
        key, before = await stage.key("alice"), full.redis.info("memory")["used_memory"]
        greedy = [await stack.enter_async_context(wire(stage, key)) for _ in range(4)]
        for number in range(64):
            for one in greedy:
                await one.send({"id": number, "action": "query", "table": "pages", "key": "b", "limit": 1000})
        answered, peak = 0, 0
        for _ in range(40):
            status, _ = await post(
                stage, "put", {"table": "pages", "item": {"book": "b", "n": 9}}, auth_key=await stage.key("carol")
            )
            answered += status == 200
            peak = max(peak, full.redis.info("memory")["used_memory"] - before)
        assert answered == 40, "the others' writes are answered"
        assert peak < 64 << 20


def test_two_releases_of_the_functions_run_on_one_server(full: topologies.Server) -> None:
    other = "f" * len(VERSION)
    for source in (SOURCE, SOURCE.replace(VERSION, other)):
        full.redis.function_load(source, replace=True)
    for version in (VERSION, other):
        assert full.redis.fcall(f"service_forget_{version}", 1, "services", "nobody") == 0
