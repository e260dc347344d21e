"""One run: the system, its users, the faults of a seed, and the checker's report.

python -m tests.faults.run --minutes 10 --seed 7 --topology cluster --parts probes,large --kinds kill,stall_redis
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import locales
from tests.helpers import wait_until
from tidewire.client import Client
from tidewire.errors import TidewireError
from tidewire.model.records import ItemRecord, unpack
from tidewire.redis.backend import Backend
from tidewire.redis.walk import walk

from .bounds import MAX_BYTES, check_absences, check_late, check_memory, check_pauses, check_sockets, longest_pauses
from .check import (
    LATE_MS,
    ReaderLog,
    check_connections,
    check_follower,
    check_history,
    check_reader,
    check_steps,
)
from .expect import Written, expect
from .figures import Outcome
from .history import Historian
from .load import Load
from .logs import Span, Window
from .pace import ALL, PARTS, Pace, with_parts
from .readers import Viewer
from .schedule import AT, Fault, schedule
from .system import APPS, System
from .watch import Connections, Lag, Memory

SETTLE_S = 16.0
"""Seconds after the last write. By then, gateways have also found entries whose announcement was lost."""
ANSWERED_S = 60.0
"""Maximum seconds until each writer has an answer, or a time-out."""
LAST_S = 5.0
"""Seconds before the end in which no fault begins."""
INDEXED_S = 20.0
"""Maximum seconds until an index has noticed the losses of its server."""


async def run(
    topology: str,
    seed: int,
    seconds: float,
    *,
    pace: Pace = ALL,
    faults: list[Fault] | None = None,
    code: Path | None = None,
    partitions: int = 8,
    settle_s: float = SETTLE_S,
    progress: bool = False,
    locale: Mapping[str, str] | None = None,
    max_bytes: Mapping[str, int] = MAX_BYTES,
    logs: Path | None = None,
) -> Outcome:
    """Do a whole run and return its outcome. `code` is a folder with another Tidewire, `logs` one to keep logs in."""
    planned = schedule(topology, seed, seconds) if faults is None else faults
    outcome = Outcome(seed, topology, seconds)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        system = System(Path(folder), topology, code, partitions, locale)
        load = Load(system.url, f"http://127.0.0.1:{system.http_port}", seed, pace)
        system.next_version = load.next_version
        watched = _Watched(system, load, partitions)
        try:
            await system.start()
            async with system.backend() as backend:
                await load.start(backend)
            await watched.start(pace)
            windows = await _inject(system, load, planned, outcome, seconds, progress=progress)
            watched.stop_looking()
            try:
                await asyncio.wait_for(load.stop_writing(), ANSWERED_S)
            except TimeoutError:
                outcome.report.add("stuck", "writers", f"no answer within {ANSWERED_S:.0f} s after the last fault")
            ended_ms = time.time() * 1000
            await asyncio.sleep(settle_s)
            async with system.backend() as backend:
                await watched.history.read(backend)
                await _index(backend, outcome)
            await _views(system, load, outcome)
        except BaseException:
            for path in sorted(Path(folder).glob("*.log")):
                print(f"── {path.name}\n{path.read_text()[-3000:]}", file=sys.stderr)
            raise
        finally:
            await watched.end()
            with contextlib.suppress(Exception):
                await load.end()
            await system.end()
            if logs:
                _keep(Path(folder), logs)
    if logs:
        lines = (f"{window.since_ms:.0f} to {window.until_ms:.0f} ms: {window.kind}\n" for window in windows)
        (logs / "faults.txt").write_text("".join(lines))
    may_fall_back = topology != "embedded"
    if not may_fall_back:
        watched.history.check_whole(outcome.report)
    check(load, watched.history.history(), outcome, windows, may_fall_back=may_fall_back)
    check_bounds(load, watched, outcome, windows, ended_ms)
    check_memory(outcome.peaks, outcome.report, max_bytes)
    for service, death in system.deaths():
        outcome.report.add("death", service, death)
    return outcome


def _keep(folder: Path, logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.log"):
        shutil.copy(path, logs)


class _Watched:
    """The observers beside the load: they read the history, compare `connections` and measure memory."""

    def __init__(self, system: System, load: Load, partitions: int) -> None:
        self.history = Historian(partitions)
        self.connections: Connections | None = None
        self.memory = Memory(system.pids, lambda: system.redis.clients)
        self.lag = Lag()
        self._system = system
        self._load = load
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._looking: asyncio.Task[None] | None = None

    async def start(self, pace: Pace) -> None:
        backend = await self._stack.enter_async_context(self._system.backend())
        self._tasks.append(asyncio.create_task(self.history.run(backend)))
        self._tasks.append(asyncio.create_task(self.lag.run()))
        if "probes" in pace.parts:
            self._tasks.append(asyncio.create_task(self.memory.run()))
            self.connections = Connections(self._system.url, self._load.service_key, self._online)
            self._looking = asyncio.create_task(self.connections.run())
            self._tasks.append(self._looking)

    def _online(self) -> Iterator[tuple[str, str]]:
        for one in self._load.looking:
            if connection := one.online():
                yield one.user.name, connection
        for prober in self._load.probers:
            if connection := prober.online():
                yield prober.name, connection

    def stop_looking(self) -> None:
        if self._looking:
            self._looking.cancel()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()


def check(
    load: Load, history: list[Written], outcome: Outcome, windows: Sequence[Window], *, may_fall_back: bool
) -> None:
    """Compare the notes of all readers with the history."""
    report = outcome.report
    outcome.changes = len(history)
    outcome.acknowledged, outcome.unknown = len(load.acknowledged), load.unknown
    expected = expect(history)
    # A release that knows more tables begins feeds anew where the one before it could not know whom to tell.
    rolls = [Span(one.since_ms, one.until_ms + LATE_MS) for one in windows if one.kind in APPS]
    logs = [
        ReaderLog(reader.user.name, f"{reader.user.name} ({number})", reader.log, reader.connected_ms)
        for number, reader in enumerate(load.readers)
    ]
    check_history(history, load.acknowledged, report, may_fall_back=may_fall_back)
    for log in logs:
        check_reader(expected, log, report, may_fall_back=may_fall_back, may_reset=rolls)
    check_connections(logs, report)
    for follower in load.followers:
        name = f"{follower.user.name}, following"
        log = ReaderLog(follower.user.name, name, follower.log, follower.connected_ms)
        check_follower(expected, log, follower.flat, report)
    for viewer in load.viewers:
        check_steps(history, _named(viewer), viewer.steps, report)
        for wrong in viewer.wrong:
            report.add("live", _named(viewer), wrong)


def check_bounds(load: Load, watched: _Watched, outcome: Outcome, windows: Sequence[Window], ended_ms: float) -> None:
    """Compare what was measured with the bounds on time and memory."""
    report, probes = outcome.report, [probe for prober in load.probers for probe in prober.probes()]
    # To replace processes one after another is no fault: nothing may stand still over it.
    faults = [one for one in windows if one.kind not in APPS]
    check_pauses(probes, faults, watched.lag.spans, ended_ms, report)
    check_late(load.late, faults, report)
    check_sockets([one for prober in load.probers for one in prober.reconnects], windows, report)
    if watched.connections:
        outcome.looks = watched.connections.looks
        check_absences(watched.connections.absences, faults, report)
    outcome.peaks = watched.memory.peaks()
    outcome.late = len(load.late)
    outcome.lag_s = watched.lag.longest_s
    outcome.partitions = longest_pauses(probes, windows)
    outcome.readers_s = pauses(load, windows)
    if load.expensive:
        outcome.sent, outcome.answers = load.expensive.sent, load.expensive.answers


def _named(viewer: Viewer) -> str:
    return f"{viewer.user.name}'s view of {viewer.table}"


async def _inject(
    system: System, load: Load, planned: list[Fault], outcome: Outcome, seconds: float, *, progress: bool
) -> list[Window]:
    begun, windows = time.monotonic(), list[Window]()
    for fault in planned:
        if time.monotonic() - begun > seconds - LAST_S:
            break  # some last longer than planned
        await _wait(begun, fault.at_s, load, outcome, seconds, progress=progress)
        kind = f"{fault.kind} {fault.service}" if fault.service else fault.kind
        since = time.time() * 1000
        over: list[float] = []
        await system.do(fault, load.fault, lambda over=over: over.append(time.time() * 1000))  # type: ignore[misc]
        outcome.faults[kind] += 1
        windows.append(Window(since, over[0] if over else time.time() * 1000, kind))
    await _wait(begun, seconds, load, outcome, seconds, progress=progress)
    return windows


async def _wait(begun: float, until_s: float, load: Load, outcome: Outcome, seconds: float, *, progress: bool) -> None:
    while True:
        if progress:
            frames = sum(len(reader.log) for reader in load.readers)
            print(
                f"\r{time.monotonic() - begun:6.0f} of {seconds:.0f} s: {outcome.faults.total()} faults, "
                f"{len(load.acknowledged)} writes acknowledged, {frames} frames ",
                end="",
                file=sys.stderr,
                flush=True,
            )
        if (left := begun + until_s - time.monotonic()) <= 0:
            return
        await asyncio.sleep(min(left, 1.0))


async def _views(system: System, load: Load, outcome: Outcome) -> None:
    """Compare live views with the answers of the store."""
    for viewer in load.viewers:
        async with Client(system.url, viewer.user.key, timeout_s=20) as client:
            (value,) = viewer.key.values()

            async def stored(client: Client = client, viewer: Viewer = viewer, value: str = value) -> dict[str, Any]:
                found = await client.query(viewer.table, value, limit=1000)
                return {one["item"]["id"]: one["item"] for one in found["items"]}

            try:
                await wait_until(lambda viewer=viewer, stored=stored: viewer.equals(stored), "it is", 15)  # type: ignore[misc]
            except TidewireError as error:
                outcome.report.add("live", _named(viewer), f"the store cannot be asked: {error}")
            except AssertionError:
                store = await stored()
                differing = sorted(
                    key for key in store.keys() | viewer.view.keys() if store.get(key) != viewer.view.get(key)
                )
                outcome.report.add("live", _named(viewer), f"differs from the store in {differing[:5]}")


async def _index(backend: Backend, outcome: Outcome) -> None:
    """Compare an index with its table."""
    keys, attributes = backend.keys, ("user", "room")
    table: dict[tuple[str, str], int] = {}
    index: dict[tuple[str, str], int] = {}

    def note(where: dict[tuple[str, str], int], record: ItemRecord) -> None:
        assert record.item
        where[record.item["user"], record.item["room"]] = record.version

    async def are_equal() -> bool:
        table.clear()
        index.clear()
        for partition in range(keys.partitions):
            for _, _, record in await walk(backend, partition, "members", None, 1000):
                note(table, record)
        async for name in backend.scan(keys.index_pattern("members", attributes)):
            for raw in await backend.commands.hvals(name):
                note(index, ItemRecord(*unpack(raw)))
        return table == index

    try:
        await wait_until(are_equal, "it is", INDEXED_S)
    except AssertionError:
        differing = [key for key in table.keys() | index.keys() if table.get(key) != index.get(key)]
        outcome.report.add("index", "members by user", f"differs from the table in {sorted(differing)[:5]}")


def pauses(load: Load, windows: Sequence[Window]) -> dict[str, float]:
    """Return the longest silence at a reader by the fault at or just before it. Users write all the time."""
    longest: dict[str, float] = {}
    for reader in load.readers:
        for earlier, later in zip(reader.log, reader.log[1:], strict=False):
            if later.at_ms - earlier.at_ms < 500 or any(a < later.at_ms and earlier.at_ms < b for a, b in reader.away):
                continue
            then = [kind for since, until, kind in windows if since < later.at_ms and earlier.at_ms < until + 1000]
            kind = then[-1] if then else "no fault"
            longest[kind] = max(longest.get(kind, 0.0), (later.at_ms - earlier.at_ms) / 1000)
    return longest


def _listed(given: str) -> list[str]:
    return [name for name in given.split(",") if name]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run everything under faults, and check what readers got.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same faults")
    parser.add_argument("--topology", choices=sorted(AT), default="embedded")
    parser.add_argument("--parts", type=_listed, default=list(PARTS), help=f"parts of the load: {','.join(PARTS)}")
    parser.add_argument("--kinds", type=_listed, default=None, help="kinds of faults, for example kill,pause; or none")
    parser.add_argument("--logs", type=Path, default=None, help="folder to keep the logs and times of faults in")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    try:
        pace = with_parts(given.parts)
        locale = locales.if_possible()
    except (ValueError, locales.NoLocale) as error:
        parser.error(str(error))
    print(f"seed {seed}", flush=True)
    kinds = None if given.kinds is None else frozenset(given.kinds)
    faults = schedule(given.topology, seed, given.minutes * 60, kinds)
    outcome = asyncio.run(
        run(
            given.topology,
            seed,
            given.minutes * 60,
            pace=pace,
            faults=faults,
            progress=sys.stderr.isatty(),
            locale=locale,
            logs=given.logs,
        )
    )
    print(f"\n{outcome.as_markdown()}")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
