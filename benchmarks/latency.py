"""From a client's write to another client's frame, and beside it the floor: one hop through a Redis Stream.

    python benchmarks/latency.py [--rate 100] [--seconds 20]

Starts `tidewire up` with ports of its own. The way of a change has three such hops (gateway to store, store to
broadcaster, broadcaster to gateway), each with decisions and commits behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis

from tidewire.client import Client
from tidewire.services.cli.embedded import free_port


async def hops(url: str, rate: float, seconds: float) -> list[float]:
    """XADD by one connection, XREAD BLOCK by another: seconds each took."""
    took: list[float] = []
    async with Redis.from_url(url) as writer, Redis.from_url(url, socket_timeout=10) as reader:

        async def read() -> None:
            last: str | bytes = "$"
            while True:
                for _, entries in _pairs(await reader.xread({"benchmark:floor": last}, block=5000)):
                    for id_, fields in entries:
                        last = id_
                        took.append(time.perf_counter() - float(fields[b"t"]))

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.2)
        for _ in range(int(rate * seconds)):
            await writer.xadd("benchmark:floor", {"t": repr(time.perf_counter())})
            await asyncio.sleep(1 / rate)
        await asyncio.sleep(0.2)
        reading.cancel()
        await writer.delete("benchmark:floor")
    return took


def _pairs(found: object) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    if isinstance(found, dict):
        return [(name, part) for name, parts in found.items() for part in parts]
    return list(found) if isinstance(found, list) else []


async def changes(url: str, keys: dict[str, str], rate: float, seconds: float) -> tuple[list[float], list[float]]:
    """(write to delivered, write to reply), in seconds."""
    delivered: list[float] = []
    replied: list[float] = []
    async with Client(url, keys["alice"]) as alice, Client(url, keys["bob"]) as bob:

        async def read() -> None:
            async for event in bob.events():
                if event.get("table") == "messages":
                    delivered.append(time.perf_counter() - event["new"]["sent"])

        async def write(number: int) -> None:
            sent = time.perf_counter()
            item = {"room": "lobby", "id": f"m{number:06}", "author": "alice", "text": "x" * 100, "sent": sent}
            await alice.put("messages", item)
            replied.append(time.perf_counter() - sent)

        reading = asyncio.create_task(read())
        writes, begun = [], time.perf_counter()
        for number in range(int(rate * seconds)):
            writes.append(asyncio.create_task(write(number)))
            await asyncio.sleep(max(0, begun + (number + 1) / rate - time.perf_counter()))
        await asyncio.gather(*writes)
        await asyncio.sleep(1)
        reading.cancel()
    return delivered, replied


def show(name: str, took: list[float], floor_s: float) -> None:
    quantiles = statistics.quantiles(took, n=100)
    p50, p99 = quantiles[49], quantiles[98]
    print(
        f"{name:28} p50 {p50 * 1000:6.2f} ms   p99 {p99 * 1000:6.2f} ms   n {len(took)}   {p50 / floor_s:4.1f} floors"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100, help="writes a second")
    parser.add_argument("--seconds", type=float, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        ports = ["--ws-port", str(ws := free_port()), "--http-port", str(free_port()), "--admin-port", str(free_port())]
        command = [sys.executable, "-m", "tidewire.services.cli.main", "up", "--data", data, *ports]
        up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        try:
            assert up.stdout
            print(up.stdout.readline().strip())
            keys = json.loads((Path(data) / "demo-keys.json").read_text())
            redis = json.loads((Path(data) / "up.json").read_text())["redis"]
            floor = await hops(redis, args.rate, 5)
            delivered, replied = await changes(f"ws://127.0.0.1:{ws}", keys, args.rate, args.seconds)
        finally:
            up.terminate()
            up.wait()
    floor_s = statistics.median(floor)
    show("floor: XADD to XREAD", floor, floor_s)
    show("write to reply", replied, floor_s)
    show("write to delivered", delivered, floor_s)


if __name__ == "__main__":
    asyncio.run(main())
