"""What one client does to the others: their latency during its attack, beside the same run without it.

    python -m benchmarks.isolation [--cases L2 L3 …] [--seconds 10] [--users 100] [--rounds 2] [--json FILE]

Each case starts `tidewire up` anew. The users are two processes (`isolation_crowd.py`), the attacker is a third one of
low priority (`isolation_attacks.py`). Each user writes twice and reads once a second: half of them in the partition
that has the attacker's data, half in others. Phases without and with the attacker alternate, so that a noisy machine
shows. A request counts in the phase in which it was due, however much later it is answered.

Goal: with the attacker, p99 is at most 3 times as long, and no request fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from redis.exceptions import RedisError
from websockets.exceptions import WebSocketException

from benchmarks.isolation_attacks import ATTACKS, USERS, Order
from benchmarks.isolation_crowd import Member, Plan, Sample
from benchmarks.isolation_report import GOAL_RATIO, Phase, goals, summary, tables
from benchmarks.isolation_socket import ATTACKED, PARTITIONS, STAGE, Frame, connected, names
from tidewire.errors import TidewireError
from tidewire.redis import keyring
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import end_with_parent, free_port, running
from tidewire.services.cli.service import start

CROWDS = 2
"""Processes of users: so many that no event loop distorts the latencies that it measures."""
WARM_UP_S = 2.0
STARTING_S, SETTLE_S, ENDING_S = 90.0, 120.0, 60.0
PROBER = "prober"
RECOVERED_S, RECOVERY_S = 1.0, 30.0
"""Latency of a write that counts as recovery from an attack, and the deadline for it, in seconds."""
PROBES = 3
ATTACKER_ENDS_S = 10.0
LOOK_S = 0.25
LINE_BYTES = 1 << 28
"""Maximum bytes of the last line of a process of users, which has all its notes."""


class System(NamedTuple):
    """All processes of `tidewire up`, and how to reach them."""

    pid: int
    ws_port: int
    http_port: int
    stage: Backend
    log: Path

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.ws_port}"


@contextlib.asynccontextmanager
async def system(folder: Path) -> AsyncIterator[System]:
    data, log = folder / "data", folder / "up.log"
    ws, http, admin = free_port(), free_port(), free_port()
    ports = ["--ws-port", str(ws), "--http-port", str(http), "--admin-port", str(admin)]
    command = ["up", "benchmarks.isolation_app:app", "--data", str(data), "--stage", STAGE, *ports]
    with log.open("w") as file:
        up = await python("tidewire.services.cli.main", *command, "--partitions", str(PARTITIONS), stderr=file)
    try:
        if not await first_line(up):
            raise TidewireError(f"the system did not start:\n{log.read_text()[-2000:]}")
        async with await connect(running(data)["redis"], Keys(STAGE, PARTITIONS)) as stage:
            yield System(up.pid, ws, http, stage, log)
    finally:
        await stop(up)


async def python(*command: str, stderr: Any = None) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *command,
        stdin=pipe,
        stdout=pipe,
        stderr=stderr,
        limit=1 << 28,
        preexec_fn=end_with_parent,
    )


async def first_line(process: asyncio.subprocess.Process) -> bytes:
    """Return the first line of a process; nothing if it ends or prints nothing in time."""
    assert process.stdout
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STARTING_S):
            return await process.stdout.readline()
    return b""


async def stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(ENDING_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# ── the users ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def members(stage: Backend, users: int) -> list[Member]:
    """Place box and feed of half of the users in the attacked partition. Each writes to the next user of its half."""
    found = []
    for where, count in (("same", users // 2), ("other", users - users // 2)):
        attacked = where == "same"
        people, boxes = (names(prefix, count, attacked=attacked) for prefix in (f"{where}-user", f"{where}-box"))
        for number, (name, box) in enumerate(zip(people, boxes, strict=True)):
            key = str(await keyring.create(stage, name))
            neighbour = min(number ^ 1, count - 1)  # within a pair, so that both are in one process
            found.append(Member(name, key, box, boxes[neighbour], people[neighbour], where))
    return found


class Crowds:
    """The processes of users."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def phase(self, name: str | None) -> None:
        await self._tell({"phase": name})

    async def _tell(self, what: Frame) -> None:
        for process in self._processes:
            assert process.stdin
            process.stdin.write(json.dumps(what).encode() + b"\n")
            await process.stdin.drain()

    async def end(self) -> tuple[list[Sample], dict[str, list[float]], Counter[str]]:
        """Return the notes of all: samples, lags by phase, and the numbers of reconnects and resets."""
        await self._tell({"end": True})
        samples: list[Sample] = []
        lags: dict[str, list[float]] = defaultdict(list)
        counts: Counter[str] = Counter()
        for process in self._processes:
            said = json.loads(await first_line(process))
            samples += (Sample(*sample) for sample in said["samples"])
            for phase, some in said["lags"].items():
                lags[phase] += some
            counts.update({name: said[name] for name in ("reconnects", "resets")})
        return samples, lags, counts


@contextlib.asynccontextmanager
async def crowds(system: System, users: int) -> AsyncIterator[Crowds]:
    everybody = await members(system.stage, users)
    pairs = [list(everybody[first : first + 2]) for first in range(0, len(everybody), 2)]
    processes = []
    try:
        for number in range(CROWDS):
            mine = [member for pair in pairs[number::CROWDS] for member in pair]
            processes.append(await python("benchmarks.isolation_crowd"))
            assert processes[-1].stdin
            processes[-1].stdin.write(msgspec.json.encode(Plan(system.url, mine)) + b"\n")
        for process in processes:
            if not await first_line(process):
                raise TidewireError("the users could not connect")
        yield Crowds(processes)
    finally:
        for process in processes:
            await stop(process)


# ── what the system uses ────────────────────────────────────────────────────────────────────────────────────────────


class Usage:
    """Processor time and memory of each process of the system."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._names: dict[int, str] = {}
        self.peaks_mb: dict[str, float] = {}

    def cpu_s(self) -> dict[str, float]:
        """Processor time by kind of process, so far."""
        found: dict[str, float] = {}
        for pid, name in self._processes():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                found[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return found

    async def watch(self) -> None:
        """Note the most memory that each has, until cancelled."""
        self.peaks_mb = {}
        while True:
            for pid, name in self._processes():
                self.peaks_mb[name] = max(_memory_mb(pid), self.peaks_mb.get(name, 0))
            await asyncio.sleep(LOOK_S)

    def _processes(self) -> Iterable[tuple[int, str]]:
        pid = self._system.pid
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            with contextlib.suppress(OSError, IndexError):
                # `python -m tidewire.services.cli.main store …`; what is not is the server.
                arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                yield child, arguments[3] if arguments[1] == "-m" else "redis"


def _memory_mb(pid: int) -> float:
    """Resident memory of a process; 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextlib.asynccontextmanager
async def phase(name: str, crowd: Crowds, usage: Usage, phases: list[Phase]) -> AsyncIterator[None]:
    """Requests that are sent within it count for that phase."""
    watching = asyncio.create_task(usage.watch())
    before, begun = usage.cpu_s(), time.monotonic()
    await crowd.phase(name)
    try:
        yield
    finally:
        await crowd.phase(None)
        watching.cancel()
        lasted_s = time.monotonic() - begun
        cpu = {kind: (used - before.get(kind, 0)) / lasted_s for kind, used in usage.cpu_s().items()}
        phases.append(Phase(name, cpu, usage.peaks_mb))


# ── one case ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Attacking:
    """The attacker's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def ready(cls, order: Order) -> Attacking:
        process = await python("benchmarks.isolation_attacks")
        assert process.stdin
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        await first_line(process)
        return cls(process)

    def begin(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(b"begin\n")

    async def end(self) -> dict[str, int]:
        """Return the number of its answers by kind, when its time is over."""
        try:
            async with asyncio.timeout(ATTACKER_ENDS_S):
                said: dict[str, int] = json.loads(await first_line(self._process) or b"{}")
                return said
        except TimeoutError:
            return {"the attacker did not end": 1}
        finally:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()


async def recovery_s(system: System, auth_key: str, usual_s: float) -> float | None:
    """Return the seconds until a write to the attacked partition is delivered as usual; None if it takes too long."""
    begun = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RECOVERY_S):
            while True:
                sent = time.monotonic()
                if await probe(system, auth_key) and time.monotonic() - sent < max(RECOVERED_S, GOAL_RATIO * usual_s):
                    return round(sent - begun, 2)
                await asyncio.sleep(LOOK_S)
    return None


async def usual_s(system: System, auth_key: str) -> float:
    """Return the longest time of some probes without an attack, in seconds."""
    took = []
    for _ in range(PROBES):
        begun = time.monotonic()
        await probe(system, auth_key)
        took.append(time.monotonic() - begun)
    return max(took)


async def probe(system: System, auth_key: str) -> bool:
    """Connect, write to the attacked partition, and wait for the change; False when something is refused."""
    (box,) = names("probe", 1, attacked=True)
    return await _delivered(system, auth_key, {"box": box, "id": "probe", "to": PROBER, "n": time.time()})


async def _delivered(system: System, auth_key: str, item: Frame) -> bool:
    """Write an item and wait for its change, on a connection made for it; False when it is refused."""
    seen = asyncio.Event()

    def take(frame: Frame) -> None:
        if frame["type"] == "change" and frame["new"] == item:
            seen.set()

    try:
        async with connected(system.url, auth_key, take=take) as socket:
            answer = await socket.ask("put", table="mail", item=item)
            if answer["type"] == "reply":
                await seen.wait()
            return seen.is_set()
    except (OSError, WebSocketException):
        return False


async def settle(stage: Backend) -> None:
    """Wait until every group has passed all changes: what was written before must not be what is measured."""
    async with asyncio.timeout(SETTLE_S):
        while True:
            streams = map(stage.keys.changes, range(PARTITIONS))
            groups: list[Any] = await asyncio.gather(*map(stage.commands.xinfo_groups, streams))
            if not any(int(group["lag"] or 0) + int(group["pending"]) for some in groups for group in some):
                return
            await asyncio.sleep(LOOK_S)


async def one_case(name: str, args: argparse.Namespace) -> Frame:
    with tempfile.TemporaryDirectory() as folder:
        async with system(Path(folder)) as running_system:
            keys = {user: str(await keyring.create(running_system.stage, user)) for user in USERS}
            service = str(await keyring.create(running_system.stage, PROBER, role="service"))
            ports = running_system.ws_port, running_system.http_port
            order = Order(name, running_system.url, *ports, keys, args.seconds)
            async with connected(running_system.url, service) as socket:
                await ATTACKS[name].prepare(socket, running_system.stage)
            await settle(running_system.stage)
            async with crowds(running_system, args.users) as crowd:
                return await measure(running_system, crowd, order, service, args.rounds)


async def measure(system: System, crowd: Crowds, order: Order, service: str, rounds: int) -> Frame:
    """Without and with the attacker, in turn."""
    usage, phases = Usage(system), list[Phase]()
    answers: Counter[str] = Counter()
    recoveries: list[float | None] = []
    await asyncio.sleep(WARM_UP_S)
    usual = await usual_s(system, service)
    for number in range(rounds):
        async with phase(f"calm-{number}", crowd, usage, phases):
            await asyncio.sleep(order.seconds)
        attacking = await Attacking.ready(order)
        async with phase(f"attack-{number}", crowd, usage, phases):
            attacking.begin()
            await asyncio.sleep(order.seconds)
        answers.update(await attacking.end())
        recoveries.append(await recovery_s(system, service, usual))
        if recoveries[-1] is None:
            break
    samples, lags, counts = await crowd.end()
    memory: Any = await system.stage.commands.info("memory")
    return summary(samples, lags, phases) | {
        "attack": ATTACKS[order.case].what,
        "answers": dict(answers),
        "recovery_s": recoveries,
        "redis_peak_mb": memory["used_memory_peak"] / 1e6,
        **counts,
    }


async def main(args: argparse.Namespace) -> None:
    print(f"{args.users} users, {args.seconds:g} s a phase, {args.rounds} rounds; partition {ATTACKED} of {PARTITIONS}")
    found: dict[str, Frame] = {}
    unfinished: dict[str, str] = {}
    for name in args.cases:
        print(f"{name}: {ATTACKS[name].what} …", file=sys.stderr, flush=True)
        try:
            # What hangs must not keep this from ending.
            async with asyncio.timeout(4 * STARTING_S + args.rounds * (2 * args.seconds + RECOVERY_S + 60)):
                found[name] = await one_case(name, args)
        except (TidewireError, RedisError, OSError) as error:  # TimeoutError is an OSError
            unfinished[name] = str(error) or "not done in time"
        if args.json:
            settings = {"seconds": args.seconds, "users": args.users, "rounds": args.rounds}
            args.json.write_text(json.dumps({"settings": settings, "cases": found, "unfinished": unfinished}, indent=1))
    print(tables(found))
    for goal, verdict in goals(found).items():
        print(f"goal {verdict:7}  {goal}")
    for name, why in unfinished.items():
        print(f"goal UNKNOWN  {name}: {why}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="CASE")
    parser.add_argument("--seconds", type=float, default=10, help="of each phase")
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2, help="of a phase without and one with the attacker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        start(main(arguments()))
    except KeyboardInterrupt:
        sys.exit(130)
