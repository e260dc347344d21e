"""Runs under faults end without a violation; and with one line of Tidewire broken, the checker says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import LONG

from .pace import ALL, Pace
from .run import run
from .schedule import Fault
from .system import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LONG, reason="takes minutes: done by make test-long, and by make faults"),
]

SECONDS = 45.0


@pytest.mark.parametrize("topology", ["embedded", "sentinel", "cluster"])
async def test_nothing_is_lost_doubled_out_of_order_or_leaked(topology: str) -> None:
    outcome = await run(topology, 1, SECONDS)
    print(outcome.told())
    assert outcome.faults.total() > 3
    assert outcome.report.delivered > 1000
    assert not outcome.violations, outcome.told()


class Break(NamedTuple):
    """One line that is changed, the faults that show it, and what the checker should find, one of it."""

    file: str
    line: str
    instead: str
    faults: list[Fault]
    finds: set[str]
    pace: Pace = ALL
    partitions: int = 8


def again(kind: str, service: str, count: int, lasts_s: float = 0.0, every_s: float = 3.0) -> list[Fault]:
    """The same fault at the one and the other of two processes."""
    return [Fault(3.0 + number * every_s, kind, service, number % 2, lasts_s) for number in range(count)]


QUIET = Pace({"note": 0.25, "message": 0.1}, reads_s=(60.0, 90.0), notes=10_000, flees=True)
"""Few changes, so that from one partition to another there is nothing for long."""
STAYING = ALL._replace(reads_s=(60.0, 90.0))
"""Nobody gets by a new connection what the old one owed."""

BREAKS = {
    "a link takes again what it has taken": Break(
        "tidewire/lua/feed.lua",
        "    if order < 0 or effect[4] <= after then count = 0 else last = effect end\n",
        "    last, after = effect, ''\n",
        again("swallow_link", "broadcaster", 8),
        {"double"},
    ),
    "a new owner does not stamp its epoch": Break(
        "tidewire/partition/loop.py",
        "self._owned.fell) for to in self._tenure.destinations()",
        "self._owned.fell) for to in self._tenure.destinations()[:0]",
        again("hold_note", "broadcaster", 5, lasts_s=9.5, every_s=22.0),
        {"leak"},
        QUIET,
        partitions=64,
    ),
    "nothing is fenced": Break(
        "tidewire/lua/generation.lua",
        "  return now ~= known or redis.call('HGET', keys[3], 'epoch') ~= epoch\n",
        "  return false\n",
        again("hold_commit", "store", 5, lasts_s=6.0, every_s=8.0),
        {"double", "disorder", "loss", "reset"},  # it depends on whose ids are the greater
    ),
    "what is pending is not read again": Break(
        "tidewire/lua/stream.lua",
        "  for _, id in ipairs({'0', '>'}) do\n",
        "  for _, id in ipairs({'>'}) do\n",
        again("swallow_read", "broadcaster", 6),
        {"reset"},  # the gap is noticed: no reader is left with it
    ),
    "holes are not filled": Break(
        "services/gateway/feeds.py",
        "        MENDED.inc()\n",
        "        return\n",
        again("cut", "gateway", 6, lasts_s=1.0),
        {"loss"},
        STAYING,
    ),
}


@pytest.fixture
def broken(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Break]:
    """A copy of Tidewire with one line changed."""
    one: Break = BREAKS[request.param]
    code = tmp_path / "code"
    for name in ("tidewire", "services", "examples"):
        shutil.copytree(ROOT / name, code / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    path = code / one.file
    text = path.read_text()
    assert text.count(one.line) == 1, f"{one.file} has changed: {one.line!r} is there {text.count(one.line)} times"
    path.write_text(text.replace(one.line, one.instead))
    return code, one


TRIES = 12
"""What is broken shows where things meet in time; that they do is likely, not sure."""


@pytest.mark.parametrize("broken", BREAKS, indirect=True)
async def test_the_checker_finds_what_is_broken(broken: tuple[Path, Break]) -> None:
    code, one = broken
    seconds = one.faults[-1].at_s + one.faults[-1].lasts_s + 5
    for seed in range(TRIES):
        outcome = await run(
            "embedded", seed, seconds, pace=one.pace, faults=one.faults, code=code, partitions=one.partitions
        )
        print(outcome.told())
        if one.finds & outcome.kinds:
            return
    pytest.fail(f"nothing of {one.finds} was found in {TRIES} runs")
