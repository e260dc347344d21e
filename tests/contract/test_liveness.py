"""A busy process keeps its word and its leases; one that was taken for dead finds out; no handshake hangs."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis
import structlog
import websockets

from tidewire import testing
from tidewire.process import keeper
from tidewire.redis.connect import connect
from tidewire.redis.functions import Functions
from tidewire.redis.keys import Keys
from tidewire.services.authorizer.service import Authorizer
from tidewire.testing import Stage

from .conftest import Open, as_user, eventually, make_app, wire

LEASE_MS = 1000


# ── the keeper ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Watch(threading.Thread):
    """Looks at a stage from outside its process's event loop: how long words and leases were valid for, at least."""

    def __init__(self, address: str, keys: Keys) -> None:
        super().__init__(daemon=True)
        self._redis: Any = redis.Redis.from_url(address)
        self._keys = keys
        self._over = threading.Event()
        self.least_ms = 10.0**9

    def run(self) -> None:
        while not self._over.wait(0.05):
            seconds, microseconds = self._redis.time()
            now = seconds * 1000 + microseconds // 1000
            leases = [self._keys.lease(partition, "store") for partition in range(self._keys.partitions)]
            until = [int(self._redis.hget(lease, "expires")) for lease in leases]
            until += [int(word.partition(b" ")[0]) for word in self._redis.hvals(self._keys.services())]
            self.least_ms = min(self.least_ms, *(one - now for one in until))

    def end(self) -> float:
        self._over.set()
        self.join()
        self._redis.close()
        return self.least_ms


async def owned(stage: Stage) -> bool:
    keys, redis_ = stage.backend.keys, stage.backend.commands
    expiries = [await redis_.hget(keys.lease(partition, "store"), "expires") for partition in range(keys.partitions)]
    return all(expiries)


@pytest.mark.real
@pytest.mark.parametrize("given_up", [False, True])
async def test_a_blocked_event_loop_keeps_word_and_leases_until_it_is_given_up(
    server: str, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    if given_up:
        monkeypatch.setattr(keeper, "MAX_BLOCKED_S", 1.0)
    keys = Keys(f"blocked{given_up}".lower(), 2)
    # A lease that an overloaded machine keeps, and a block of more than two of them.
    options: Any = {"stage": keys.stage, "partitions": keys.partitions, "lease_ms": 2000, "drain_seconds": 0.1}
    async with testing.run(make_app(), backend=await connect(server, keys), **options) as stage:
        await eventually(lambda: owned(stage))
        watch = Watch(server, keys)
        watch.start()
        time.sleep(5)
        least_ms = watch.end()
    assert (least_ms < 0) == given_up, f"words and leases were valid for {least_ms} ms at least"


async def test_a_service_ends_with_its_keeper(open_stage: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: Any) -> None:
        raise ZeroDivisionError("a fault of the code")

    with pytest.raises(ExceptionGroup):  # noqa: PT012
        async with open_stage(lease_ms=LEASE_MS):
            monkeypatch.setattr(Functions, "service_beat", breaks)
            await asyncio.sleep(LEASE_MS / 1000)
            monkeypatch.undo()


# ── swept, or only away ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_mark_and_a_beat_exclude_each_other(stage: Stage) -> None:
    functions, keys = stage.backend.functions, stage.backend.keys
    where = (keys.services(), keys.swept())
    await functions.service_beat(*where, "living", 60_000, b"\x80")
    assert not await functions.service_sweep(*where, "living", 60_000), "its word is valid"
    await functions.service_forget(keys.services(), "living")
    await functions.service_beat(*where, "silent", 1, b"\x80")
    await asyncio.sleep(0.01)
    assert (await functions.service_beat(*where, "silent", 1, b"\x80")).swept is False, "silent, and back in time"
    await asyncio.sleep(0.01)
    assert await functions.service_sweep(*where, "silent", 60_000)
    assert await functions.service_sweep(*where, "silent", 60_000), "a repeat finds its own mark"
    beat = await functions.service_beat(*where, "silent", 60_000, b"\x80")
    assert beat.swept
    assert beat.services["silent"][0] <= beat.now, "the word is not given back"
    assert beat.services["living"][0] > beat.now, "and the living one was not forgotten"
    assert not await functions.service_sweep(*where, "unknown", 60_000)
    await functions.service_forget(keys.services(), "silent")
    assert "silent" not in (await functions.service_beat(*where, "living", 60_000, b"\x80")).services
    assert 0 < await stage.backend.commands.pttl(keys.swept()) <= 60_000


async def test_a_gateway_that_was_swept_closes_its_sockets_and_goes_on_under_another_id(
    stage: Stage, stack: AsyncExitStack
) -> None:
    alice = await as_user(stage, stack, "alice")
    gateway = alice.welcome["connection"].rpartition("-")[0]
    keys = stage.backend.keys
    await stage.backend.commands.hset(keys.swept(), gateway, await stage.backend.now_ms())
    await stage.backend.commands.pexpire(keys.swept(), 60_000)
    assert await alice.closed() == 1012
    again = await as_user(stage, stack, "alice")
    assert again.welcome["connection"].rpartition("-")[0] != gateway
    assert await again.do("ping") == {}


@pytest.mark.real
async def test_after_redis_was_away_sockets_are_open_and_lost_items_are_back(server: str) -> None:
    keys = Keys("away", 2)
    options: Any = {"stage": keys.stage, "partitions": keys.partitions, "lease_ms": LEASE_MS, "drain_seconds": 0.1}
    async with (
        testing.run(make_app(), backend=await connect(server, keys), **options) as stage,
        AsyncExitStack() as inner,
    ):
        alice, job = await as_user(stage, inner, "alice"), await as_user(stage, inner, "job", role="service")
        connection = alice.welcome["connection"]

        async def there() -> bool:
            found = await job.do("query", table="connections", key="alice")
            return [entry["item"]["connection"] for entry in found["items"]] == [connection]

        await eventually(there)
        # As a failover would lose it.
        lost = [keys.items("connections", "alice"), keys.order("connections", "alice")]
        await stage.backend.commands.delete(*lost)
        assert not await there()
        await stage.backend.commands.client_pause(3 * LEASE_MS, all=True)
        await eventually(there)
        assert await alice.do("whoami") == {"user": "alice", "connection": connection, "claims": {}}


# ── handshakes ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def get(url: str) -> int:
    def ask() -> int:
        try:
            with urllib.request.urlopen(url, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize("step", ["feed_open", "feed_read"])
async def test_a_handshake_whose_partition_does_not_answer_is_refused_and_leaves_nothing(
    open_stage: Open, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with open_stage(welcome_timeout_s=4.0) as stage, AsyncExitStack() as inner:
        job = await as_user(stage, inner, "job", role="service")
        key = await stage.key("alice")
        async with wire(stage, key) as alice:
            cursor = alice.welcome["cursor"]
        call, feed = getattr(Functions, step), stage.backend.keys.user_feed("alice")
        silent = asyncio.Event()

        async def hangs(self: Functions, home: Any, name: bytes, *rest: Any) -> Any:
            if name == feed:
                await silent.wait()
            return await call(self, home, name, *rest)

        monkeypatch.setattr(Functions, step, hangs)

        async def by_websocket() -> int:
            async with wire(stage, key, cursor=cursor, welcome=False) as refused:
                return await refused.closed()

        with structlog.testing.capture_logs() as said:
            feed_url = f"{stage.http_url}/v1/feed?auth_key={key}&cursor={cursor}"
            assert tuple(await asyncio.gather(by_websocket(), get(feed_url))) == (1013, 503)
        late = [entry for entry in said if entry["event"] == "handshake_timed_out"]
        assert len(late) == 2
        assert all(feed.decode() in entry["waited_for"] for entry in late)
        silent.set()

        async def nothing_left() -> bool:
            found = await job.do("query", table="connections", key="alice")
            return not found["items"]

        await eventually(nothing_left)
        async with wire(stage, key, cursor=cursor) as alice:
            assert alice.welcome["resumed"]


async def test_a_handshake_that_no_authorizer_answers_is_503_or_1013(
    open_stage: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(*_: Any) -> None:
        await asyncio.sleep(3600)

    async with open_stage(welcome_timeout_s=4.0) as stage:
        key = await stage.key("alice")
        monkeypatch.setattr(Authorizer, "_turn", silent)
        await asyncio.sleep(1.2)  # the turn under way ends within its second

        async def by_handshake() -> int:
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with wire(stage, key):
                    pass
            return refused.value.response.status_code

        async def by_first_frame() -> int:
            async with wire(stage, welcome=False) as late:
                await late.send({"action": "auth", "auth_key": key})
                return await late.closed()

        with structlog.testing.capture_logs() as said:
            feed_url = f"{stage.http_url}/v1/feed?auth_key={key}"
            assert tuple(await asyncio.gather(by_handshake(), by_first_frame(), get(feed_url))) == (503, 1013, 503)
        steps = [entry["waited_for"] for entry in said if entry["event"] == "handshake_timed_out"]
        assert steps == ["a credential to be authorized"] * 3
