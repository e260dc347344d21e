"""Acknowledged writes through the bus and a store process, and beside them the floor: the bare writes to Redis.

    python benchmarks/store.py [--seconds 5] [--rounds 3]

Starts a server as `tidewire up` has it (append-only file), and one `tidewire store`; this process plays the gateway.
Each write is a put of a new item of 200 bytes, by a client, with a request id, as a gateway passes it on; it counts
when the store's answer is here. The floor writes the same bytes (the change with XADD, the item with HSET) in redis-py
pipelines of the same depth, ready made: no decision, no fence, no idempotency, no reply.

Floor and store take turns, so that a noisy machine hits both; what is printed are the medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from redis.asyncio import Redis

from tidewire import App, everyone, user
from tidewire.errors import TidewireError
from tidewire.model.records import Change, Command, ItemRecord, pack
from tidewire.model.values import sort_bytes
from tidewire.process.bus import Bus
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import Embedded, free_port
from tidewire.services.cli.service import start
from tidewire.services.cli.status import owners
from tidewire.services.cli.up import Child
from tidewire.tasks import end

app = App("benchmark")
app.table("items", key=("list", "id"), readers=everyone, writers=user("author"))

DEPTHS = (1, 8, 64, 512)
RATE = 1000
GOAL_RATIO, GOAL_P99_MS = 0.5, 10.0
LISTS = 1000
PARTITIONS = 8
TIMEOUT_S = 10.0
STORE = [sys.executable, "-m", "tidewire.services.cli.main", "store", "benchmarks.store:app"]

numbers = itertools.count()


class Measured(NamedTuple):
    writes_s: float
    p50_ms: float
    p99_ms: float


def item() -> dict[str, Any]:
    """Return a new item of 200 bytes as JSON."""
    number = next(numbers)
    return {"list": f"list-{number % LISTS:03}", "id": f"i{number:09}", "author": "alice", "text": "x" * 138}


def measured(took_s: list[float], seconds: float) -> Measured:
    quantiles = statistics.quantiles(took_s, n=100)
    return Measured(len(took_s) / seconds, quantiles[49] * 1000, quantiles[98] * 1000)


# ── the floor ───────────────────────────────────────────────────────────────────────────────────────────────────────


def bare_writes(keys: Keys) -> Iterator[tuple[bytes, bytes, bytes, bytes, bytes]]:
    """Return what the store sends for each write: (change stream, change, hash, field, item)."""
    now = int(time.time() * 1000)
    while True:
        new = item()
        key = {"list": new["list"], "id": new["id"]}
        change = Change("INSERT", "items", key, 1, new, None, now, "alice", "bench", None)
        yield (
            keys.changes(keys.partition_of(new["list"])),
            pack(change),
            keys.items("items", new["list"]),
            sort_bytes(new["id"]),
            pack(ItemRecord(1, now, "alice", new)),
        )


async def floor(redis: Redis, depth: int, seconds: float) -> float:
    """Writes a second, in pipelines of so many. What is written is made before the clock runs."""
    made = bare_writes(Keys("floor", PARTITIONS))
    done, spent = 0, 0.0
    while spent < seconds:
        writes = list(itertools.islice(made, 2048))
        begun = time.perf_counter()
        for first in range(0, len(writes), depth):
            async with redis.pipeline(transaction=False) as pipeline:
                for stream, change, hash_, field, record in writes[first : first + depth]:
                    pipeline.xadd(stream, {"r": change})
                    pipeline.hset(hash_, field, record)
                await pipeline.execute()
            done += len(writes[first : first + depth])
            if spent + time.perf_counter() - begun >= seconds:
                break
        spent += time.perf_counter() - begun
    return done / spent


# ── the store ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Gateway:
    """The part of a gateway that passes writes on and takes the answers."""

    def __init__(self, backend: Backend) -> None:
        self.id = secrets.token_hex(6)
        self._keys = backend.keys
        self._bus = Bus(backend, lambda: self.id, timeout_s=TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._bus.send()), asyncio.create_task(self._bus.receive())]
        try:
            yield
        finally:
            await end(tasks)

    def write(self) -> asyncio.Future[Any]:
        new = item()
        body = {"action": "put", "table": "items", "item": new}
        deadline = int(1000 * (time.time() + TIMEOUT_S))

        def record(number: int) -> Command:
            return Command("put", body, "alice", "client", {}, "bench", None, 0, deadline, self.id, number)

        return self._bus.request(self._keys.commands(self._keys.partition_of(new["list"])), record)

    async def closed(self, depth: int, seconds: float) -> Measured:
        """Keep that many writes outstanding: the next one goes out when one is answered."""
        took_s: list[float] = []
        begun = time.perf_counter()

        async def write() -> None:
            while (sent := time.perf_counter()) < begun + seconds:
                await self.write()
                took_s.append(time.perf_counter() - sent)

        await asyncio.gather(*(write() for _ in range(depth)))
        return measured(took_s, time.perf_counter() - begun)

    async def open(self, rate: float, seconds: float) -> Measured:
        """Write at a steady rate, whatever is unanswered. Latency counts from the scheduled time of a write."""
        took_s: list[float] = []
        futures: list[asyncio.Future[Any]] = []
        begun = time.perf_counter()

        def sent(future: asyncio.Future[Any], due: float) -> asyncio.Future[Any]:
            future.add_done_callback(lambda _: took_s.append(time.perf_counter() - due))
            return future

        for number in range(int(rate * seconds)):
            due = begun + number / rate
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            futures.append(sent(self.write(), due))
        await asyncio.gather(*futures)
        return measured(took_s, time.perf_counter() - begun)


# ── both, in turns ──────────────────────────────────────────────────────────────────────────────────────────────────


async def compare(backend: Backend, rounds: int, seconds: float) -> None:
    """Measure and print."""
    gateway, redis = Gateway(backend), backend.commands
    floors: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    stores: dict[int, list[Measured]] = {depth: [] for depth in DEPTHS}
    steady: list[Measured] = []
    async with gateway.running():
        await floor(redis, 64, 0.5)
        await gateway.closed(64, 0.5)
        for _ in range(rounds):
            for depth in DEPTHS:
                await clear(redis)
                floors[depth].append(await floor(redis, depth, seconds))
                await clear(redis)
                stores[depth].append(await gateway.closed(depth, seconds))
            await clear(redis)
            steady.append(await gateway.open(RATE, seconds))
    print(f"{'depth':>5} {'writes/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'floor/s':>10} {'ratio':>6}")
    for depth in DEPTHS:
        writes_s, p50_ms, p99_ms = medians(stores[depth])
        pairs = zip(stores[depth], floors[depth], strict=True)
        ratio = statistics.median(store.writes_s / bare for store, bare in pairs)
        bare_s = statistics.median(floors[depth])
        print(f"{depth:5} {writes_s:10,.0f} {p50_ms:8.2f} {p99_ms:8.2f} {bare_s:10,.0f} {ratio:6.2f}")
    _, p50_ms, p99_ms = medians(steady)
    print(f"at a steady {RATE:,} writes/s: p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms")
    goals = {
        f"ratio at {DEPTHS[-1]} outstanding ≥ {GOAL_RATIO}: {ratio:.2f}": ratio >= GOAL_RATIO,
        f"p99 at {RATE:,} writes/s < {GOAL_P99_MS:.0f} ms: {p99_ms:.2f} ms": p99_ms < GOAL_P99_MS,
    }
    for goal, reached in goals.items():
        print(f"goal {'reached' if reached else 'MISSED '}  {goal}")


def medians(rounds: list[Measured]) -> Measured:
    return Measured(*(statistics.median(values) for values in zip(*rounds, strict=True)))


async def clear(redis: Redis) -> None:
    """Take away what was written before, so that no measurement pays for the memory of another."""
    for pattern in ("floor:*", "*:items:*", "*:order:*", "*:request:*"):
        found: list[bytes] = []
        async for key in redis.scan_iter(match=pattern, count=5000):
            found.append(key)
        for first in range(0, len(found), 5000):
            await redis.unlink(*found[first : first + 5000])
    async for key in redis.scan_iter(match="*:changes", count=5000):
        await redis.xtrim(key, maxlen=0, approximate=False)


@contextlib.asynccontextmanager
async def running(data: Path) -> AsyncIterator[Backend]:
    """A server and a store with all partitions, ended with the block."""
    stopping, embedded = asyncio.Event(), Embedded(data)
    keys = Keys("bench", PARTITIONS)
    environment = os.environ | {"TIDEWIRE_STAGE": keys.stage, "TIDEWIRE_PARTITIONS": str(PARTITIONS)}
    environment.setdefault("TIDEWIRE_LOG_LEVEL", "warning")
    command = [*STORE, "--redis", embedded.url, "--admin-port", str(free_port())]
    server = Child("server", embedded.command(), environment, stopping)
    store = Child("store", command, environment, stopping)
    try:
        await embedded.wait_until_ready(await server.start())
        async with await connect(embedded.url, keys) as backend:
            process = await store.start()
            async with asyncio.timeout(30):
                while not all((await owners(backend, "store")).values()):
                    if process.returncode is not None:
                        raise TidewireError(f"the store ended with {process.returncode}: see above")
                    await asyncio.sleep(0.05)
            yield backend
    finally:
        stopping.set()
        await store.stop(5)
        await server.stop(10)


async def main(rounds: int, seconds: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # Twice what it should take: a store that hangs must not keep this from ending.
    longest_s = 60 + 2 * rounds * (2 * len(DEPTHS) + 1) * (seconds + 1)
    with tempfile.TemporaryDirectory() as data:
        async with running(Path(data)) as backend:
            work = asyncio.create_task(compare(backend, rounds, seconds))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({work, stopped}, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
            await end([work, stopped])
    if stop.is_set():
        raise KeyboardInterrupt
    if work.cancelled():
        raise TidewireError(f"not done after {longest_s:.0f} s")
    work.result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        start(main(max(args.rounds, 1), max(args.seconds, 0.1)))
    except KeyboardInterrupt:
        sys.exit(130)
    except (TidewireError, TimeoutError) as error:
        sys.exit(f"store.py: {error or 'the store took no partitions'}")
