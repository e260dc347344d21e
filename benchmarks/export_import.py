"""`tidewire import` and `export` of items of 200 bytes with a running `tidewire up`, and beside them the floor.

    python benchmarks/export_import.py [--items 50000] [--rounds 3]

The floor of an import writes the same bytes to the same server (the change with XADD, the item with HSET) in redis-py
pipelines of 512, ready made; that of an export reads the items' hashes with HGETALL in pipelines of 100, and does
nothing with them. All take turns; what is printed are the medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from redis.asyncio import Redis

from benchmarks.store import PARTITIONS, bare_writes, clear, floor, item
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import free_port

COMMAND = [sys.executable, "-m", "tidewire.services.cli.main"]
DEPTH = 512
HASHES_BATCH = 100
FIGURES = ("import", "its floor", "same again", "export", "its floor ")


@contextlib.contextmanager
def running_up(data: Path) -> Iterator[str]:
    """The address of its server."""
    ports = [word for name in ("ws", "http", "admin") for word in (f"--{name}-port", str(free_port()))]
    command = [*COMMAND, "up", "benchmarks.store:app", "--data", str(data), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as up:
        try:
            assert up.stdout
            if not up.stdout.readline().startswith(b"ready"):
                sys.exit("export_import.py: `tidewire up` did not become ready")
            yield json.loads((data / "up.json").read_text())["redis"]
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(30)


def timed(items: int, work: Callable[[], object]) -> float:
    """Items a second."""
    begun = time.perf_counter()
    work()
    return items / (time.perf_counter() - begun)


def command(*args: str) -> None:
    subprocess.run([*COMMAND, *args], check=True, stderr=subprocess.DEVNULL)


async def bare_import(url: str, items: int) -> float:
    async with Redis.from_url(url) as redis:
        found = await floor(redis, DEPTH, items / 25_000)
        await clear(redis)
        return found


async def bare_export(url: str, items: int) -> float:
    """Hashes as the store has them, read in pipelines."""
    hashes: dict[bytes, dict[bytes, bytes]] = {}
    for _, _, hash_, field, record in itertools.islice(bare_writes(Keys("floor", PARTITIONS)), items):
        hashes.setdefault(hash_, {})[field] = record
    async with Redis.from_url(url) as redis:
        for hash_, fields in hashes.items():
            await redis.hset(hash_, mapping=fields)  # type: ignore[arg-type]
        names, begun = list(hashes), time.perf_counter()
        for first in range(0, len(names), HASHES_BATCH):
            async with redis.pipeline(transaction=False) as pipeline:
                for name in names[first : first + HASHES_BATCH]:
                    pipeline.hgetall(name)
                await pipeline.execute()
        took_s = time.perf_counter() - begun
        await redis.unlink(*names)
    return items / took_s


def main(items: int, rounds: int) -> None:
    figures: dict[str, list[float]] = {
        name: [] for name in ("import", "its floor", "same again", "export", "its floor ")
    }
    with tempfile.TemporaryDirectory() as folder, running_up(Path(folder)) as url:
        file, out, data = str(Path(folder) / "in.jsonl"), str(Path(folder) / "out.jsonl"), ["--data", folder]
        for _ in range(rounds):
            lines = (json.dumps({"table": "items", "item": item()}) + "\n" for _ in range(items))
            Path(file).write_text("".join(lines))
            figures["its floor"].append(asyncio.run(bare_import(url, items)))
            figures["import"].append(timed(items, lambda: command("import", file, *data)))
            time.sleep(3)  # the readers of the changes catch up
            figures["same again"].append(timed(items, lambda: command("import", file, *data)))
            figures["its floor "].append(asyncio.run(bare_export(url, items)))
            figures["export"].append(timed(items, lambda: command("export", "--output", out, *data)))
            asyncio.run(_emptied(url))
    for name, values in figures.items():
        print(f"{name:<11}{statistics.median(values):10,.0f} items/s")


async def _emptied(url: str) -> None:
    async with Redis.from_url(url) as redis:
        await clear(redis)
        async for key in redis.scan_iter(match="*:values:*", count=5000):
            await redis.unlink(key)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    main(max(args.items, 1000), max(args.rounds, 1))
