"""The cost of each Lua function on the server, by the server's own clock, in microseconds per call.

    python benchmarks/functions_cost.py [--milliseconds 20] [--rounds 30]

Starts a server as `tidewire up` has it. The time is that of `INFO commandstats`: parsing, network and client are not in
it. Each round calls every function for a moment, and the lowest figure counts: other work on the machine only adds.

To compare two versions of the functions, run this file in a checkout of each.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tidewire.errors import TidewireError
from tidewire.model.records import FeedBody, ItemRecord, Position, pack
from tidewire.model.values import sort_bytes
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.functions import Append, Effect, FeedBounds, Owned, RedisCommand, Stamp, Unit, feed_number
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import Embedded
from tidewire.services.cli.service import start
from tidewire.services.cli.up import Child

CALLS_BATCH = 10
"""Calls under way."""
BOUNDS = FeedBounds(1000, 1 << 22)
GROUP, OWNER = "bench", "owner"
FEEDS = 100
PAGE = 100
SERVICES = 10
LEASE_MS = 3_600_000
BATCH_BYTES = 1 << 20

Call = Callable[[], Awaitable[Any]]


async def cost_us(backend: Backend, call: Call, seconds: float) -> float:
    """Return the microseconds of one call on the server."""
    await backend.commands.config_resetstat()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        await asyncio.gather(*(call() for _ in range(CALLS_BATCH)))
    stats: Any = await backend.commands.info("commandstats")
    return float(stats["cmdstat_fcall"]["usec_per_call"])


async def owned(backend: Backend, partition: int) -> Owned:
    """A partition whose stream has a group, and a lease that no other worker takes."""
    keys = backend.keys
    stream = keys.changes(partition)
    await backend.ensure_group(stream, GROUP)
    found = await backend.functions.lease_take(
        keys.lease(partition, GROUP), keys.home(partition), stream, GROUP, OWNER, LEASE_MS
    )
    assert found
    return found


async def calls(backend: Backend) -> dict[str, Call]:
    """Each function in its plainest use."""
    keys, functions = backend.keys, backend.functions
    home = keys.home(0)
    mine, full = await owned(backend, 0), await owned(backend, 1)
    for number in range(PAGE):
        await backend.commands.xadd(full.stream, {"r": b"x" * 200}, f"1-{number + 1}")
    feeds = tuple(sorted(map(keys.user_feed, (f"user{number}" for number in range(FEEDS))), key=feed_number))
    for feed in feeds:
        await functions.feed_open(home, feed, LEASE_MS)
    record = pack(ItemRecord(1, 0, "alice", {"id": "x", "text": "x" * 150}))
    for number in range(PAGE):
        field = sort_bytes(f"i{number:03}")
        await backend.calls([("ZADD", keys.order("t", "p"), 0, field), ("HSET", keys.items("t", "p"), field, record)])
    for number in range(SERVICES):
        await functions.service_beat(keys.services(), keys.swept(), f"s{number}", LEASE_MS, b"x" * 100)
    body = pack(FeedBody("change", b'{"new":"%s"}' % (b"x" * 190)))
    numbers = itertools.count(1)
    now = int(time.time() * 1000)

    def append(to: tuple[bytes, ...]) -> Awaitable[Any]:
        position = Position(0, 0, now, next(numbers))
        unit = Unit(position, [Append(position, body, len(body), to)])
        return functions.link_append(home, "b:1", 1, BOUNDS, [unit])

    def apply() -> Awaitable[Any]:
        effect = Effect(Position(0, 0, now, next(numbers)), 1, (RedisCommand("HSET", home.partition, ("x", "1")),))
        return functions.link_apply(home, "i:1", 1, [effect])

    def commit() -> Awaitable[Any]:
        write = RedisCommand("HSET", home.partition, ("x", "1"))
        return functions.commit(mine, next(numbers), (), [write], count=256, size_bytes=BATCH_BYTES)

    return {
        "lease_take": lambda: functions.lease_take(mine.lease, home, mine.stream, GROUP, OWNER, LEASE_MS),
        "lease_renew": lambda: functions.lease_renew(full, LEASE_MS),
        "batch, nothing there": lambda: functions.batch(mine, 256, BATCH_BYTES),
        f"batch of {PAGE}": lambda: functions.batch(full, 256, BATCH_BYTES),
        "commit of one write": commit,
        "link_stamp": lambda: functions.link_stamp(home, [Stamp("s:1", 1)]),
        "link_apply of one write": apply,
        "link_append to 1 feed": lambda: append(feeds[:1]),
        f"link_append to {FEEDS} feeds": lambda: append(feeds),
        "feed_open": lambda: functions.feed_open(home, feeds[0], LEASE_MS),
        "feed_read of nothing": lambda: functions.feed_read(home, feeds[1], 10_000_000, 100, BATCH_BYTES),
        f"page of {PAGE}": lambda: functions.page(
            keys.order("t", "p"), keys.items("t", "p"), b"-", b"+", reverse=False, count=PAGE, size_bytes=1 << 20
        ),
        f"service_beat, {SERVICES} services": lambda: functions.service_beat(
            keys.services(), keys.swept(), "s1", LEASE_MS, b"x"
        ),
    }


async def compare(backend: Backend, seconds: float, rounds: int) -> None:
    made = await calls(backend)
    # The lease is taken again by the same owner, which gives it a new epoch: last, or the others are fenced.
    order = sorted(made, key=lambda name: name == "lease_take")
    lowest = dict.fromkeys(made, float("inf"))
    for number in range(rounds):
        for name in order:
            if name != "lease_take" or number == rounds - 1:
                lowest[name] = min(lowest[name], await cost_us(backend, made[name], seconds))
    print("| function | µs a call |\n| --- | --- |")
    for name, cost in lowest.items():
        print(f"| {name} | {cost:.1f} |")


async def main(seconds: float, rounds: int) -> None:
    stopping = asyncio.Event()
    with tempfile.TemporaryDirectory() as data:
        embedded = Embedded(Path(data))
        server = Child("server", embedded.command(), {}, stopping)
        try:
            await embedded.wait_until_ready(await server.start())
            async with await connect(embedded.url, Keys("bench", 2)) as backend:
                async with asyncio.timeout(300):
                    await compare(backend, seconds, rounds)
        finally:
            stopping.set()
            await server.stop(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=20, help="of each function and round")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    try:
        start(main(args.milliseconds / 1000, max(args.rounds, 1)))
    except KeyboardInterrupt:
        sys.exit(130)
    except (TidewireError, TimeoutError) as error:
        sys.exit(f"functions_cost.py: {error or 'not done in time'}")
