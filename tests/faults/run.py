"""One run: the system, its users, the faults of a seed, and what the checker says.

python -m tests.faults.run --minutes 10 --seed 7 --topology cluster
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import wait_until
from tidewire.backend import Backend
from tidewire.client import Client
from tidewire.errors import TidewireError
from tidewire.records import Change, ItemRecord, stream_id, unpack
from tidewire.walk import walk

from .check import (
    ReaderLog,
    Report,
    Violation,
    Written,
    check_connections,
    check_history,
    check_reader,
    check_steps,
    expect,
)
from .load import ALL, Load, Pace, Viewer
from .schedule import AT, Fault, schedule
from .system import System

SETTLE_S = 16.0
"""After the last write: also what nobody announced has been looked for by then."""
ANSWERED_S = 60.0
"""By then whoever writes has had an answer, if only that there is none."""
LAST_S = 5.0
"""So long before the end no fault begins any more."""
INDEXED_S = 20.0
"""By then an index has noticed what its server has lost."""
SHOWN = 10


@dataclass
class Outcome:
    seed: int
    topology: str
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    report: Report = field(default_factory=Report)
    changes: int = 0
    acknowledged: int = 0
    unknown: int = 0
    pauses_s: dict[str, float] = field(default_factory=dict)
    """The longest that a connected reader heard nothing, by the fault of that time."""

    @property
    def violations(self) -> list[Violation]:
        return self.report.violations

    @property
    def kinds(self) -> set[str]:
        return {violation.kind for violation in self.violations}

    def told(self) -> str:
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items())) or "none"
        pauses = ", ".join(f"{kind} {pause:.1f}" for kind, pause in sorted(self.pauses_s.items()))
        lines = [
            f"{self.topology}, seed {self.seed}, {self.seconds:.0f} s",
            f"faults: {faults}",
            f"{self.acknowledged} writes acknowledged, {self.unknown} of which nobody knew; {self.changes} changes; "
            f"{self.report.delivered} frames delivered",
            f"resets: {dict(self.report.resets)}; acknowledged and lost: {self.report.lost_acknowledged}; "
            f"told of what was then lost: {self.report.phantoms}",
            f"longest pause of a reader in s: {pauses}",
            f"{len(self.violations)} violations {dict(Counter(one.kind for one in self.violations))}",
            *(f"  {violation}" for violation in self.violations[:SHOWN]),
        ]
        return "\n".join(lines)


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
) -> Outcome:
    """Everything, from the first process to the checker's word. `code` is a folder with another Tidewire in it."""
    planned = schedule(topology, seed, seconds) if faults is None else faults
    outcome = Outcome(seed, topology, seconds)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        system = System(Path(folder), topology, code, partitions)
        load = Load(system.url, f"http://127.0.0.1:{system.http_port}", seed, pace)
        try:
            await system.start()
            async with system.backend() as backend:
                await load.start(backend)
            windows = await _inject(system, load, planned, outcome, seconds, progress=progress)
            try:
                await asyncio.wait_for(load.stop_writing(), ANSWERED_S)
            except TimeoutError:
                outcome.report.add("stuck", "writers", f"no answer within {ANSWERED_S:.0f} s after the last fault")
            await asyncio.sleep(settle_s)
            async with system.backend() as backend:
                history = await read_history(backend)
                await _index(backend, outcome)
            await _views(system, load, outcome)
        except BaseException:
            for path in sorted(Path(folder).glob("*.log")):
                print(f"── {path.name}\n{path.read_text()[-3000:]}", file=sys.stderr)
            raise
        finally:
            with contextlib.suppress(Exception):
                await load.end()
            await system.end()
    check(load, history, outcome, may_fall_back=topology != "embedded")
    outcome.pauses_s = pauses(load, windows)
    return outcome


def check(load: Load, history: list[Written], outcome: Outcome, *, may_fall_back: bool) -> None:
    report = outcome.report
    outcome.changes = len(history)
    outcome.acknowledged, outcome.unknown = len(load.acknowledged), load.unknown
    expected = expect(history)
    logs = [
        ReaderLog(reader.user.name, f"{reader.user.name} ({number})", reader.log, reader.connected_ms)
        for number, reader in enumerate(load.readers)
    ]
    check_history(history, load.acknowledged, report, may_fall_back=may_fall_back)
    for log in logs:
        check_reader(expected, log, report, may_fall_back=may_fall_back)
    check_connections(logs, report)
    for viewer in load.viewers:
        check_steps(history, _named(viewer), viewer.steps, report)
        for wrong in viewer.wrong:
            report.add("live", _named(viewer), wrong)


def _named(viewer: Viewer) -> str:
    return f"{viewer.user.name}'s view of {viewer.table}"


Window = tuple[float, float, str]
"""(from, to, kind) of a fault, in ms since 1970."""


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
        await system.do(fault, load.fault)
        outcome.faults[kind] += 1
        windows.append((since, time.time() * 1000, kind))
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


async def read_history(backend: Backend) -> list[Written]:
    """All changes, in the order of each partition."""
    found: list[Written] = []
    for partition in range(backend.keys.partitions):
        low = "-"
        while True:
            entries: Any = await backend.commands.xrange(backend.keys.changes(partition), low, "+", 1000)
            for id_, fields in entries:
                change = Change(*unpack(fields[b"r"]))
                found.append(Written(partition, (change.generation, *stream_id(id_)), change))
            if len(entries) < 1000:
                break
            low = f"({entries[-1][0].decode()}"
    return found


async def _views(system: System, load: Load, outcome: Outcome) -> None:
    """Live views beside what the store gives who asks."""
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
    """An index beside its table."""
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
        async for name in backend.commands.scan_iter(keys.index_pattern("members", attributes), count=1000):
            for raw in await backend.commands.hvals(name):
                note(index, ItemRecord(*unpack(raw)))
        return table == index

    try:
        await wait_until(are_equal, "it is", INDEXED_S)
    except AssertionError:
        differing = [key for key in table.keys() | index.keys() if table.get(key) != index.get(key)]
        outcome.report.add("index", "members by user", f"differs from the table in {sorted(differing)[:5]}")


def pauses(load: Load, windows: list[Window]) -> dict[str, float]:
    """The longest time without a frame, by the fault that was there, or had just been. Somebody always writes."""
    longest: dict[str, float] = {}
    for reader in load.readers:
        for earlier, later in zip(reader.log, reader.log[1:], strict=False):
            if later.at_ms - earlier.at_ms < 500 or any(a < later.at_ms and earlier.at_ms < b for a, b in reader.away):
                continue
            then = [kind for since, until, kind in windows if since < later.at_ms and earlier.at_ms < until + 1000]
            kind = then[-1] if then else "no fault"
            longest[kind] = max(longest.get(kind, 0.0), (later.at_ms - earlier.at_ms) / 1000)
    return longest


def main() -> int:
    parser = argparse.ArgumentParser(description="Run everything under faults, and check what readers got.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=None, help="the same seed gives the same faults")
    parser.add_argument("--topology", choices=sorted(AT), default="embedded")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    outcome = asyncio.run(run(given.topology, seed, given.minutes * 60, progress=True))
    print(f"\n{outcome.told()}")
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
