"""A master dies, or a slot moves, while messages flow: work goes on, and no reader keeps a wrong view."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import itertools
import re
import signal
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests import topologies
from tests.helpers import LONG, wait_until
from tidewire.client import Client
from tidewire.errors import RequestError
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys

from .conftest import Up

long = pytest.mark.skipif(not LONG, reason="takes half a minute: done by make test-long")

RESET_S = 15
"""Maximum seconds after a failover until a reader of a lost change gets a reset."""


class Traffic:
    """alice writes message after message; bob keeps a live view of the room."""

    def __init__(self, alice: Client, bob: Client) -> None:
        self.alice = alice
        self.view: dict[Any, Any] = {}
        self.acknowledged = 0
        self.failed: list[str] = []
        self.longest_pause_s = 0.0
        self.longest_silence_s = 0.0  # of deliveries
        self.delays_s: list[float] = []  # from the beginning of a write to its delivery, the newest last
        self.bob = bob
        self._begun: dict[Any, float] = {}
        self._stopping = False

    async def write(self) -> None:
        number, last = 0, time.monotonic()
        while not self._stopping:
            self._begun[number] = time.monotonic()
            try:
                await self.alice.put("messages", {"room": "lobby", "id": number, "author": "alice", "text": "x"})
                self.acknowledged += 1
            except RequestError as error:  # after half a minute of trying
                self.failed.append(error.message)
            now = time.monotonic()
            self.longest_pause_s, last = max(self.longest_pause_s, now - last), now
            number += 1
            await asyncio.sleep(0.01)

    async def look(self) -> None:
        last = time.monotonic()
        async for view in self.bob.live("messages", room="lobby"):
            now, arrived = time.monotonic(), view.keys() - self.view.keys()
            self.delays_s += [now - self._begun[number] for number in arrived if number in self._begun]
            self.longest_silence_s, last = max(self.longest_silence_s, now - last), now
            self.view = dict(view)

    async def goes_on(self, count: int = 30) -> None:
        """Wait until that many more writes are acknowledged, and one is seen."""
        before = self.acknowledged
        await wait_until(lambda: self.acknowledged >= before + count, "writes are acknowledged again", 60)
        ids = len(self.view)
        await wait_until(lambda: len(self.view) >= ids + 1, "and seen", 60)

    def stop(self) -> None:
        self._stopping = True


@contextlib.asynccontextmanager
async def traffic(up: Up) -> AsyncIterator[Traffic]:
    keys = up.keys()
    async with up.client("alice", keys["alice"]) as alice, up.client("bob", keys["bob"]) as bob:
        flowing = Traffic(alice, bob)
        tasks = [asyncio.create_task(flowing.write()), asyncio.create_task(flowing.look())]
        try:
            await flowing.goes_on()
            yield flowing
            flowing.stop()
            await asyncio.wait_for(tasks[0], 60)
            stored = await everything(alice)
            await wait_until(lambda: flowing.view == stored, "the view is what the store has", 60)
            assert not tasks[1].done(), "nothing has ended the view"
            resets = [len(client.welcomes) for client in (alice, bob)]
            print(
                f"{flowing.acknowledged} writes acknowledged, {len(stored)} there, {len(flowing.failed)} failed, "
                f"longest pause {flowing.longest_pause_s:.1f} s, connections {resets}"
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def everything(client: Client) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    after: Any = None
    while True:
        bounds = {} if after is None else {"after": after}
        page = await client.query("messages", "lobby", limit=1000, **bounds)
        found |= {one["item"]["id"]: one["item"] for one in page["items"]}
        if (after := page["next"]) is None:
            return found


def slot_of(value: str) -> int:
    """Return the slot of the partition that holds this partition-key value."""
    partition = binascii.crc_hqx(value.encode(), 0) % 8
    return binascii.crc_hqx(f"p{partition}".encode(), 0) % topologies.SLOTS


async def in_a_thread(work: Callable[..., Any], *args: Any) -> float:
    """Do work in a thread. Returns how long it took, in seconds."""
    begun = time.monotonic()
    await asyncio.to_thread(work, *args)
    return time.monotonic() - begun


def _metrics(status: dict[str, Any]) -> str:
    """Return the metrics of all live services."""
    found = []
    for service in status["services"]:
        if service["alive"]:
            with urllib.request.urlopen(f"http://127.0.0.1:{service['admin_port']}/metrics", timeout=10) as answer:
                found.append(answer.read().decode())
    return "\n".join(found)


async def test_sentinels_make_the_replica_the_master(new_up: Any) -> None:
    with topologies.sentinels() as servers:
        up = new_up("--redis", servers.url)
        async with traffic(up) as flowing:
            print(f"failed over after {await in_a_thread(servers.fail_over):.1f} s")
            await flowing.goes_on()
            status = await up.status()
            assert all(service["alive"] for service in status["services"] if service["kind"] == "store")


HANG_S = 15
"""Maximum seconds of a pause when a master hangs: three times the promise, as the machine may be busy."""


async def hangs(flowing: Traffic, server: topologies.Server, what: str) -> None:
    """Stop a master, and wait until work goes on, at its usual pace. Then let it come back."""
    before_s = statistics.median(flowing.delays_s[-30:])
    flowing.longest_pause_s = flowing.longest_silence_s = 0.0
    server.signal(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        await flowing.goes_on(1)
        back_s = time.monotonic() - begun
        await flowing.goes_on(100)
        after_s = statistics.median(flowing.delays_s[-30:])
        print(
            f"{what} hung: writes again after {back_s:.1f} s, pauses of writes {flowing.longest_pause_s:.1f} s and of "
            f"deliveries {flowing.longest_silence_s:.1f} s, delay at the median before {before_s * 1000:.0f} ms, after "
            f"{after_s * 1000:.0f} ms"
        )
    finally:
        server.signal(signal.SIGCONT)
    assert flowing.longest_pause_s < HANG_S
    assert flowing.longest_silence_s < HANG_S
    assert after_s < 10 * before_s + 0.5
    await flowing.goes_on()


async def test_a_master_of_a_cluster_that_hangs_is_replaced_within_seconds(new_up: Any) -> None:
    with topologies.replicated_cluster() as servers:
        up = new_up("--redis", servers.url)
        async with traffic(up) as flowing:
            await hangs(flowing, servers.master_of(slot_of("lobby")), "the master of the room")


@long
@pytest.mark.parametrize("whose", ["bob", "auth", "stage"])
async def test_any_master_of_a_cluster_may_hang(new_up: Any, whose: str) -> None:
    with topologies.replicated_cluster() as servers:
        up = new_up("--redis", servers.url)
        slot = slot_of(whose) if whose == "bob" else binascii.crc_hqx(whose.encode(), 0) % topologies.SLOTS
        async with traffic(up) as flowing:
            await hangs(flowing, servers.master_of(slot), f"the master of {whose}")


@long
@pytest.mark.parametrize("number", range(3))
async def test_a_process_starts_while_a_master_of_a_cluster_hangs(number: int) -> None:
    """A release is rolled at that moment: new processes must not wait until the old master answers."""
    keys = Keys("starting", 8)
    with topologies.replicated_cluster() as servers:
        async with await connect(servers.url, keys):
            pass
        hung = servers.servers[number]
        hung.signal(signal.SIGSTOP)
        begun = time.monotonic()
        try:
            async with await connect(servers.url, keys) as backend:
                for partition in range(keys.partitions):
                    await backend.commands.hget(keys.partition(partition), "floor")
            print(f"master {number} hung: connected after {time.monotonic() - begun:.1f} s")
        finally:
            hung.signal(signal.SIGCONT)
        assert time.monotonic() - begun < HANG_S


@long
async def test_a_master_that_hangs_is_replaced_by_sentinels_within_seconds(new_up: Any) -> None:
    with topologies.sentinels() as servers:
        up = new_up("--redis", servers.url)
        async with traffic(up) as flowing:
            await hangs(flowing, servers.master(), "the master")


@long
async def test_sentinels_let_master_and_replica_change_places(new_up: Any) -> None:
    with topologies.sentinels() as servers:
        up = new_up("--redis", servers.url)
        async with traffic(up) as flowing:
            print(f"changed places after {await in_a_thread(servers.switch):.1f} s")
            await flowing.goes_on()


async def test_a_replica_of_a_cluster_takes_the_place_of_its_master(new_up: Any) -> None:
    with topologies.replicated_cluster() as servers:
        up = new_up("--redis", servers.url)
        async with traffic(up) as flowing:
            killed: list[topologies.Server] = []
            took_s = await in_a_thread(lambda: killed.append(servers.fail_over(slot_of("lobby"))))
            print(f"the master of the room failed over after {took_s:.1f} s")
            await flowing.goes_on()
            partition = binascii.crc_hqx(b"lobby", 0) % 8
            of_partition = (await up.status())["redis"][partition]
            assert of_partition["node"] == f"127.0.0.1:{servers.master_of(slot_of('lobby')).port}"
            assert of_partition["went_back"] > 0, "status tells of it"
            metrics = await asyncio.to_thread(_metrics, await up.status())
            generations = re.findall(rf'tidewire_partition_generation{{partition="{partition}"}} (\S+)', metrics)
            assert of_partition["went_back"] in [int(float(one)) for one in generations], "and so do the metrics"
            await in_a_thread(servers.come_back, killed.pop())
            took_s = await in_a_thread(lambda: killed.append(servers.fail_over(slot_of("bob"))))
            print(f"the master of bob's feed failed over after {took_s:.1f} s")
            await flowing.goes_on()


async def test_slots_of_a_cluster_move_to_another_master(new_up: Any) -> None:
    with topologies.replicated_cluster(replicas=0) as servers:
        up = new_up("--redis", servers.url)
        async with traffic(up) as flowing:
            for value in ("lobby", "bob", "lobby"):
                await in_a_thread(servers.move, slot_of(value))
                await flowing.goes_on()


@long
@pytest.mark.parametrize("which", ["source", "destination"])
async def test_a_loss_on_one_of_three_masters_resets_idle_feeds_too(new_up: Any, which: str) -> None:
    with topologies.replicated_cluster() as servers:
        up = new_up("--redis", servers.url)
        room = servers.master_of(slot_of("lobby"))
        names = (f"user{number}" for number in itertools.count())
        name = next(name for name in names if servers.master_of(slot_of(name)) is not room)
        key = await asyncio.to_thread(up.key, name)
        async with up.client("alice", up.keys()["alice"]) as alice, up.client(name, key) as reader:
            await alice.put("members", {"room": "lobby", "user": name})
            heard: list[Any] = []
            listening = asyncio.create_task(_listen(reader, heard))
            await alice.put("messages", {"room": "lobby", "id": "kept", "author": "alice"})
            await wait_until(lambda: "kept" in _ids(heard), "it is heard")
            slot = slot_of("lobby" if which == "source" else name)
            aside = await asyncio.to_thread(servers.put_aside, slot)
            await alice.put("messages", {"room": "lobby", "id": "lost", "author": "alice"})
            await wait_until(lambda: "lost" in _ids(heard), "it is heard before the master dies")
            await asyncio.to_thread(servers.fail_over, slot, aside)
            begun = time.monotonic()
            await wait_until(lambda: any(map(_is_of_all, heard)), "there is a reset", 3 * RESET_S)
            took_s = time.monotonic() - begun
            print(f"a reset {took_s:.1f} s after the failover of the {which}: promised within {RESET_S} s")
            there = {one["id"] for one in (await everything(alice)).values()}
            assert there == ({"kept"} if which == "source" else {"kept", "lost"})
            await alice.put("messages", {"room": "lobby", "id": "new", "author": "alice"})
            await wait_until(lambda: "new" in _ids(heard), "it goes on", 60)
            listening.cancel()
            await asyncio.wait([listening])


async def _listen(reader: Client, heard: list[Any]) -> None:
    async for event in reader.events():
        heard.append(event)


def _ids(heard: list[Any]) -> list[str]:
    return [event["key"]["id"] for event in heard if event["type"] == "change" and event["table"] == "messages"]


def _is_of_all(event: Any) -> bool:
    return event["type"] == "reset" and "table" not in event and "topic" not in event
