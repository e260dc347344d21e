"""One change to many websockets: what a delivery costs the gateway, beside a loop of send() in C.

    python -m benchmarks.fanout [--connections 1000] [--rates 20,200,1000] [--seconds 10] [--json FILE]

Starts `tidewire up`. The receivers are C (`sockets.c`), and so is the floor, which sends the same bytes to as many
sockets at the same rate. At each rate, the table has: writes that were answered, frames that were delivered a second,
their age from the write on, the CPU time of the gateway for a delivery, and that of the floor. At rates that the system
cannot hold, it shows what becomes of the deliveries and of the writes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.isolation import System, first_line, python, stop
from tidewire.client import Client
from tidewire.errors import TidewireError
from tidewire.redis import keyring
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import free_port, running

SILENCE_S = 3.0
"""Seconds without a frame after which the receivers stop."""
TEXT = "x" * 60
FRAME_BYTES = 330
"""Bytes of a frame with such a text, about."""
COLUMNS = {
    "changes/s": "rate",
    "writes answered": "answered",
    "reply p99 ms": "reply_p99_ms",
    "delivered/s": "delivered_per_s",
    "p50 ms": "p50_ms",
    "p99 ms": "p99_ms",
    "gateway µs": "gateway_us",
    "floor µs": "floor_us",
    "ratio": "ratio",
}


# All receivers are one user.
os.environ["TIDEWIRE_LIMIT_CONNECTIONS"] = "0"


def compiled(folder: Path) -> Path:
    source = Path(__file__).with_name("sockets.c")
    subprocess.run(["gcc", "-O2", "-o", folder / "sockets", source], check=True)
    return folder / "sockets"


@contextlib.asynccontextmanager
async def system(folder: Path) -> AsyncIterator[System]:
    data, log = folder / "data", folder / "up.log"
    ws, http = free_port(), free_port()
    command = ["up", "benchmarks.fanout_app:app", "--data", str(data), "--ws-port", str(ws), "--http-port", str(http)]
    with log.open("w") as file:
        up = await python("tidewire.services.cli.main", *command, "--admin-port", str(free_port()), stderr=file)
    try:
        if not await first_line(up):
            raise TidewireError(f"the system did not start:\n{log.read_text()[-2000:]}")
        async with await connect(running(data)["redis"], Keys("dev", 8)) as stage:
            yield System(up.pid, ws, http, stage, log)
    finally:
        await stop(up)


def gateway_of(system: System) -> int:
    for child in map(int, Path(f"/proc/{system.pid}/task/{system.pid}/children").read_text().split()):
        if "gateway" in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
            return child
    raise TidewireError("there is no gateway")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def write(client: Client, rate: float, seconds: float) -> tuple[int, list[float]]:
    """Write at a rate, whatever the answers. Returns how many were answered, and how long each took."""
    begun, took, open_ = time.monotonic(), list[float](), set[asyncio.Task[None]]()

    async def one(number: int) -> None:
        at = time.monotonic()
        item = {"id": f"n{number % 100}", "n": number, "text": TEXT, "t": time.time_ns()}
        with contextlib.suppress(TidewireError):
            await client.put("news", item)
            took.append(time.monotonic() - at)

    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(begun + number / rate - time.monotonic(), 0))
        task = asyncio.create_task(one(number))
        open_.add(task)
        task.add_done_callback(open_.discard)
    if open_:
        await asyncio.wait(open_, timeout=15)
    return len(took), sorted(took)


async def measured(system: System, sockets: Path, connections: int, rate: float, seconds: float) -> dict[str, Any]:
    key = str(await keyring.create(system.stage, "reader"))
    service = str(await keyring.create(system.stage, "writer", role="service"))
    pipe = asyncio.subprocess.PIPE
    receivers = await asyncio.create_subprocess_exec(
        sockets, "receive", str(system.ws_port), str(connections), str(SILENCE_S), key, stdout=pipe
    )
    assert receivers.stdout
    if (await receivers.stdout.readline()).strip() != b"ready":
        raise TidewireError("the receivers could not connect")
    await asyncio.sleep(2)
    gateway = gateway_of(system)
    before = cpu_s(gateway)
    async with Client(system.url, service, timeout_s=15) as client:
        answered, took = await write(client, rate, seconds)
    frames, first, last, p50, p99 = (await receivers.stdout.readline()).split()
    spent = cpu_s(gateway) - before
    await receivers.wait()
    count, lasted = int(frames), max(float(last) - float(first), 1e-9)
    floor = await asyncio.create_subprocess_exec(
        sockets, "floor", str(connections), str(rate), str(min(seconds, 5)), str(FRAME_BYTES), stdout=pipe
    )
    _, _, floor_us = (await floor.communicate())[0].split()[1:]
    return {
        "rate": rate,
        "answered": f"{answered} of {int(rate * seconds)}",
        "reply_p99_ms": round(1000 * took[len(took) * 99 // 100], 1) if took else None,
        "delivered": count,
        "delivered_per_s": round(count / lasted),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "gateway_us": round(1e6 * spent / max(count, 1), 2),
        "floor_us": float(floor_us),
        "ratio": round(1e6 * spent / max(count, 1) / float(floor_us), 2),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description="One change to many websockets, beside a loop of send() in C.")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--rates", default="20,200,1000")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="fanout-") as name:
        sockets = compiled(Path(name))
        for rate in map(float, given.rates.split(",")):
            folder = Path(name) / f"rate-{rate:g}"
            folder.mkdir()
            async with system(folder) as up:
                found.append(await measured(up, sockets, given.connections, rate, given.seconds))
            print(json.dumps(found[-1]), flush=True)
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for one in found:
        print("| " + " | ".join(str(one[name]) for name in COLUMNS.values()) + " |")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
