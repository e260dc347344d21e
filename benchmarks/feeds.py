"""Appends to feeds over a link, and beside them the floor; a broadcaster as a whole; what feeds cost in memory.

    python benchmarks/feeds.py [--seconds 3] [--rounds 3]

Starts a server as `tidewire up` has it. An append is one change to so many open feeds of one partition in one function
call: fence, position, seq, chained tag, entry and announcement. The floor is a bare function that does the same XADD
and SPUBLISH, and nothing else; both have the same number of calls under way.

The broadcaster is a process of its own, with 40,000 changes to one user each before it; counted is what it passes on in
a second of its own processor time, and in a second of the clock, while the server takes the rest of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from tidewire import App, user
from tidewire.errors import TidewireError
from tidewire.model.records import Change, FeedBody, Position, pack
from tidewire.process.settings import Settings
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.functions import Append, FeedBounds, Unit
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import Embedded, free_port
from tidewire.services.cli.service import start
from tidewire.services.cli.up import Child

app = App("benchmark")
app.table("mail", key="id", readers=user("to"))

RECIPIENTS = (1, 10, 100, 1000)
CALLS = 16
"""Under way at a time."""
GOAL_RATIO, GOAL_CHANGES_S, GOAL_BYTES = 0.8, 20_000, 300
PARTITIONS = 8
CHANGES = 40_000
USERS = 1000
NODE_BYTES, NODES = "stream-node-max-bytes", (4096, 2048, 1024, 512)
ENTRIES = (1, 10, 100, 1000)
MANY = 100
FLOOR = """#!lua name=tidewire_floor
redis.register_function('floor', function(keys, args)
  for i = 1, #keys do
    redis.call('XADD', keys[i], 'MAXLEN', '~', args[1], args[2], 'e', args[3])
    redis.call('SPUBLISH', keys[i], args[4] .. args[3])
  end
  return #keys
end)
"""
BROADCASTER = [sys.executable, "-m", "tidewire.services.cli.main", "broadcaster", "benchmarks.feeds:app"]


def body() -> bytes:
    """The body of a change of 200 bytes."""
    return pack(FeedBody("change", b'{"new":"%s"}' % (b"x" * 190)))


def unit_of(number: int, body: bytes, feeds: tuple[bytes, ...]) -> Unit:
    """One change to these feeds."""
    position = Position(0, 0, 1_795_409_459_002, number)
    return Unit(position, [Append(position, body, len(body), feeds)])


async def under_way(call: Callable[[], Awaitable[Any]], seconds: float) -> float:
    """Return calls per second, with that many at a time."""
    begun, done = time.perf_counter(), 0

    async def again() -> None:
        nonlocal done
        while time.perf_counter() < begun + seconds:
            await call()
            done += 1

    await asyncio.gather(*(again() for _ in range(CALLS)))
    return done / (time.perf_counter() - begun)


class Appends:
    """One partition with that many open feeds."""

    def __init__(self, backend: Backend, recipients: int, stage: str = "append") -> None:
        self._functions = backend.functions
        keys = Keys(f"{stage}{recipients}", 1)
        self._home = keys.home(0)
        self._feeds = tuple(keys.user_feed(f"user{n}") for n in range(recipients))
        self._bare = [entries + b":floor" for entries in self._feeds]
        self._body = body()
        self._ids = itertools.count(1)
        self._most = FeedBounds(Settings().resume_entries, Settings().resume_bytes)
        self._fcall = backend.functions._redis.fcall

    async def open(self) -> None:
        for feed in self._feeds:
            await self._functions.feed_open(self._home, feed, 3_600_000)

    async def append(self) -> None:
        unit = unit_of(next(self._ids), self._body, self._feeds)
        await self._functions.link_append(self._home, "b:0", 1, self._most, [unit])

    async def floor(self) -> None:
        entry = f"0123456789 0-0-1795409459002-{next(self._ids)}\n".encode() + self._body
        args = (self._most.entries, "1795409459002-*", entry, "1795409459002-1000000 ")
        await self._fcall("floor", len(self._bare), *self._bare, *args)


async def appends(backend: Backend, rounds: int, seconds: float) -> bool:
    await backend.commands.function_load(FLOOR, replace=True)
    print(f"{'recipients':>10} {'calls/s':>9} {'appends/s':>10} {'floor/s':>10} {'ratio':>6}")
    reached = True
    for recipients in RECIPIENTS:
        one = Appends(backend, recipients)
        await one.open()
        ours: list[float] = []
        bare: list[float] = []
        for _ in range(rounds):
            ours.append(await under_way(one.append, seconds) * recipients)
            bare.append(await under_way(one.floor, seconds) * recipients)
        ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
        rate = statistics.median(ours)
        print(f"{recipients:10} {rate / recipients:9,.0f} {rate:10,.0f} {statistics.median(bare):10,.0f} {ratio:6.2f}")
        reached &= ratio >= GOAL_RATIO or recipients < 100
    return reached


async def broadcaster(backend: Backend, process: asyncio.subprocess.Process) -> tuple[float, float]:
    """(changes a second of the clock, changes a second of its processor time), past its start."""
    keys, commands = backend.keys, backend.commands

    async def left() -> int:
        infos: list[Any] = await asyncio.gather(*(commands.xinfo_groups(keys.changes(p)) for p in range(PARTITIONS)))
        return sum(int(group["lag"] or 0) + int(group["pending"]) for groups in infos for group in groups)

    while (before := await left()) > CHANGES * 0.9:
        await asyncio.sleep(0.01)
        if process.returncode is not None:
            raise TidewireError(f"the broadcaster ended with {process.returncode}: see above")
    begun, used = time.perf_counter(), cpu_s(process.pid)
    while (after := await left()) > CHANGES * 0.1:  # noqa: ASYNC110 - what is waited for is in another process
        await asyncio.sleep(0.01)
    done = before - after
    return done / (time.perf_counter() - begun), done / (cpu_s(process.pid) - used)


def cpu_s(pid: int) -> float:
    """Processor time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def write_changes(backend: Backend) -> None:
    keys = backend.keys
    now = int(time.time() * 1000)
    for number in range(USERS):
        feed = keys.user_feed(f"user{number}")
        await backend.functions.feed_open(keys.home_of(feed), feed, 3_600_000)
    for partition in range(PARTITIONS):
        await backend.ensure_group(keys.changes(partition), "broadcaster")
    for first in range(0, CHANGES, 1000):
        calls = []
        for number in range(first, first + 1000):
            item = {"id": f"m{number}", "to": f"user{number % USERS}", "text": "x" * 150}
            change = Change("INSERT", "mail", {"id": item["id"]}, 1, item, None, now, "alice", "c", None)
            stream = keys.changes(keys.partition_of(item["id"]))
            calls.append(("XADD", stream, "*", "r", pack(change)))
        await backend.calls(calls)


async def memory(backend: Backend) -> bool:
    """Measure the memory of feeds and the time of appends, for several sizes of stream nodes."""
    redis = backend.commands
    print(f"memory of a feed's entries of {len(body())} bytes, by {NODE_BYTES}; and appends/s, {MANY} feeds a call")
    print(f"{'':>6}" + "".join(f"{entries:>9,} entries" for entries in ENTRIES) + f"{'appends/s':>12}")
    before = str((await redis.config_get(NODE_BYTES))[NODE_BYTES])
    for node_bytes in NODES:
        await redis.config_set(NODE_BYTES, node_bytes)
        costs = [await _entries_bytes(backend, f"memory{node_bytes}-{entries}", entries) for entries in ENTRIES]
        one = Appends(backend, MANY, f"rate{node_bytes}")
        await one.open()
        rate = await under_way(one.append, 2) * MANY
        print(f"{node_bytes:>6}" + "".join(f"{cost:>17,}" for cost in costs) + f"{rate:>12,.0f}")
    await redis.config_set(NODE_BYTES, before)
    keys = Keys("memory", 1)
    for number in range(USERS * 10):
        await backend.functions.feed_open(keys.home(0), keys.user_feed(f"a-user-of-20-let{number:04}"), 3_600_000)
    state = int(await redis.memory_usage(keys.home(0).feeds, samples=0) or 0) / (USERS * 10)
    print(f"the state of a feed, one of {USERS * 10:,} of its partition: {state:.0f} bytes")
    return state <= GOAL_BYTES


async def _entries_bytes(backend: Backend, stage: str, entries: int) -> int:
    keys = Keys(stage, 1)
    feed = keys.user_feed("a-user-of-20-letters")
    await backend.functions.feed_open(keys.home(0), feed, 3_600_000)
    for number in range(entries):
        unit = unit_of(number, body(), (feed,))
        await backend.functions.link_append(keys.home(0), "b:0", 1, FeedBounds(1000, 1 << 24), [unit])
    return int(await backend.commands.memory_usage(feed, samples=0) or 0)


async def compare(backend: Backend, child: Child, rounds: int, seconds: float) -> None:
    goals = {f"ratio at 100 recipients and more ≥ {GOAL_RATIO}": await appends(backend, rounds, seconds)}
    await write_changes(backend)
    clock_s, own_s = await broadcaster(backend, await child.start())
    print(f"a broadcaster, to one user each: {clock_s:,.0f} changes/s, {own_s:,.0f} in a second of its processor time")
    goals[f"a broadcaster ≥ {GOAL_CHANGES_S:,} changes/s on one core"] = own_s >= GOAL_CHANGES_S
    goals[f"a feed beyond its stream ≤ {GOAL_BYTES} bytes"] = await memory(backend)
    for goal, reached in goals.items():
        print(f"goal {'reached' if reached else 'MISSED '}  {goal}")


@contextlib.asynccontextmanager
async def running(data: Path) -> AsyncIterator[tuple[Backend, Child]]:
    """A server, and a broadcaster that is yet to be started; both are ended with the block."""
    stopping, embedded = asyncio.Event(), Embedded(data)
    keys = Keys("bench", PARTITIONS)
    environment = os.environ | {"TIDEWIRE_STAGE": keys.stage, "TIDEWIRE_PARTITIONS": str(PARTITIONS)}
    environment.setdefault("TIDEWIRE_LOG_LEVEL", "warning")
    command = [*BROADCASTER, "--redis", embedded.url, "--admin-port", str(free_port())]
    server = Child("server", embedded.command(), environment, stopping)
    child = Child("broadcaster", command, environment, stopping)
    try:
        await embedded.wait_until_ready(await server.start())
        async with await connect(embedded.url, keys) as backend:
            yield backend, child
    finally:
        stopping.set()
        await child.stop(5)
        await server.stop(10)


async def main(rounds: int, seconds: float) -> None:
    # Twice what it should take: what hangs must not keep this from ending.
    async with asyncio.timeout(240 + 4 * rounds * len(RECIPIENTS) * (seconds + 1)):
        with tempfile.TemporaryDirectory() as data:
            async with running(Path(data)) as (backend, child):
                await compare(backend, child, rounds, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        start(main(max(args.rounds, 1), max(args.seconds, 0.1)))
    except KeyboardInterrupt:
        sys.exit(130)
    except (TidewireError, TimeoutError) as error:
        sys.exit(f"feeds.py: {error or 'not done in time'}")
