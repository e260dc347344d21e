"""Processes die and are paused while messages flow: nothing is lost, doubled, or out of order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.helpers import LONG, wait_until
from tidewire.client import Client

from .checker import Reader, differences, written
from .conftest import Up

ROOMS = [f"room{number}" for number in range(4)]
USERS = {f"user{number:02}": ROOMS[number % len(ROOMS)] for number in range(20)}


class Writers:
    """Messages at a steady rate, from all users in turn; each is acknowledged in the end, or the test fails."""

    def __init__(self, clients: dict[str, Client], rate: float) -> None:
        self.clients = clients
        self.rate = rate
        self.acknowledged: set[str] = set()
        self.latencies: list[float] = []
        self._puts: set[asyncio.Task[None]] = set()
        self._failed: list[BaseException] = []
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        begun, number = time.monotonic(), 0
        users = list(self.clients)
        while not self._stop.is_set():
            task = asyncio.create_task(self._put(users[number % len(users)], f"m{number:06}"))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)
            number += 1
            await asyncio.sleep(max(0, begun + number / self.rate - time.monotonic()))

    async def _put(self, user: str, id_: str) -> None:
        item = {"room": USERS[user], "id": id_, "author": user, "text": "x" * 50}
        try:
            await self.clients[user].put("messages", item)
            self.acknowledged.add(id_)
        except BaseException as error:
            self._failed.append(error)
            raise

    async def end(self) -> None:
        self._stop.set()
        await self._task
        if self._puts:
            await asyncio.wait(list(self._puts), timeout=120)
        assert not self._failed, f"{len(self._failed)} writes failed, for example {self._failed[0]!r}"
        assert not self._puts, f"{len(self._puts)} writes were never acknowledged"


@contextlib.asynccontextmanager
async def traffic(up: Up, rate: float) -> AsyncIterator[tuple[list[Reader], Writers]]:
    """All users connected, each in a room, all reading, messages flowing. At the end all is compared."""
    async with contextlib.AsyncExitStack() as stack:
        from tidewire.redis import keyring

        backend = await stack.enter_async_context(await up.backend())
        keys = {user: str(await keyring.create(backend, user)) for user in USERS}
        clients = {user: await stack.enter_async_context(up.client(user, keys[user])) for user in USERS}
        readers = [Reader(clients[user], room) for user, room in USERS.items()]
        for room in ROOMS:
            owner, *members = [user for user, its in USERS.items() if its == room]
            await clients[owner].put("members", {"room": room, "user": owner, "role": "owner"})
            for member in members:
                await clients[owner].put("members", {"room": room, "user": member, "role": "member"})
        writers = Writers(clients, rate)
        yield readers, writers
        await writers.end()
        by_room = await written(backend, "messages", ROOMS)
        ids = [id_ for seen in by_room.values() for _, id_, _ in seen]
        assert sorted(ids) == sorted(writers.acknowledged), "each acknowledged write is in the change stream, once"

        def complete() -> bool:
            return all(len(reader.seen) >= len(by_room[reader.room]) for reader in readers)

        with contextlib.suppress(AssertionError):  # the comparison says more
            await wait_until(complete, "all readers have as many changes as were made", 30)
        wrong = [text for reader in readers if (text := differences(reader, by_room[reader.room]))]
        assert not wrong, "\n".join(wrong)
        print(f"{len(ids)} messages, {sum(len(reader.seen) for reader in readers)} deliveries compared")
        for reader in readers:
            await reader.end()


@pytest.mark.slow
async def test_kills_of_each_service_lose_double_and_reorder_nothing(new_up: Any) -> None:
    # With its gateway killed again and again, a client may be away for longer than 1000 entries take: then it would be
    # told by a reset, rightly, and there would be nothing to compare.
    up = new_up(TIDEWIRE_RESUME_ENTRIES="10000")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    victims = ["gateway", "store", "broadcaster"] * (10 if LONG else 3)
    dice.shuffle(victims)
    async with traffic(up, rate=200):
        for kind in victims:
            await asyncio.sleep(dice.uniform(0.2, 1.5))
            os.kill(await up.pid(kind), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["broadcaster", "store"])
async def test_a_process_paused_for_longer_than_its_lease_does_no_harm(new_up: Any, kind: str) -> None:
    up = new_up(f"--{kind}s", "2")
    async with traffic(up, rate=50):
        await asyncio.sleep(1)
        pid = await up.pid(kind)
        paused = next(service["id"] for service in (await up.status())["services"] if service["pid"] == pid)

        async def owns_some() -> bool:
            return any(one["owner"] == paused for one in (await up.status())["groups"][kind]["partitions"])

        await wait_until(owns_some, f"the {kind} that is paused has a partition to lose")
        os.kill(pid, signal.SIGSTOP)
        try:

            async def taken_over() -> bool:
                partitions = (await up.status())["groups"][kind]["partitions"]
                return all(one["owner"] not in (None, paused) for one in partitions)

            await wait_until(taken_over, f"the other {kind} has taken over all partitions")
            await asyncio.sleep(1)  # it works for a while, the paused one still holding what it had read
        finally:
            os.kill(pid, signal.SIGCONT)
        await wait_until(lambda: "partition_lost" in up.log.read_text(), "the paused one is refused, and says so")
        await asyncio.sleep(1)


async def test_two_of_each_share_the_work_and_losing_one_of_each_loses_nothing(new_up: Any) -> None:
    up = new_up("--gateways", "2", "--stores", "2", "--broadcasters", "2")
    begun = time.monotonic()

    async def shared() -> bool:
        services = (await up.status())["services"]
        workers = [service for service in services if service["kind"] in ("store", "broadcaster")]
        return len(workers) == 4 and all(len(worker["partitions"]) == 4 for worker in workers)

    await wait_until(shared, "each worker has half of the partitions", 18)
    print(f"shared {time.monotonic() - begun:.1f} s after ready (two lease lengths are 6 s)")
    async with traffic(up, rate=100):

        async def all_committed() -> bool:
            services = (await up.status())["services"]
            return all(service["commits"] > 0 for service in services if service["kind"] in ("store", "broadcaster"))

        await wait_until(all_committed, "each worker has committed")
        for kind in ("gateway", "store", "broadcaster"):
            pids = await up.pids(kind)
            assert len(pids) == 2, f"two {kind}s live"
            os.kill(pids[0], signal.SIGKILL)
            await asyncio.sleep(1)
        await asyncio.sleep(3)
