"""Runs under faults end without a violation. With one line of Tidewire broken, the checker finds violations."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import locales
from tests.helpers import LONG

from .breaks import BREAKS, Break
from .pace import EVERYTHING
from .run import run
from .system import ROOT

long = pytest.mark.skipif(not LONG, reason="takes minutes: done by make test-long, and by make faults")
breaks = pytest.mark.skipif(
    not os.environ.get("TIDEWIRE_TEST_BREAKS"), reason="takes half an hour and more: done by make breaks"
)

SECONDS = 90.0
TIMED = {"pause", "late", "absence"}
"""Violations that depend on the speed of the machine. `make faults` reports them; this test does not judge them."""
TRIES = 12
"""Number of runs. A missing guard shows only when events coincide, which is likely but not certain."""


@pytest.mark.slow
@long
@pytest.mark.parametrize("topology", ["embedded", "sentinel", "cluster"])
async def test_nothing_is_lost_doubled_out_of_order_or_leaked(topology: str) -> None:
    outcome = await run(topology, 1, SECONDS, pace=EVERYTHING, locale=locales.if_possible())
    print(outcome.as_markdown())
    assert outcome.faults.total() > 3
    assert outcome.report.delivered > 1000
    assert not [one for one in outcome.violations if one.kind not in TIMED], outcome.as_markdown()


@pytest.mark.parametrize("name", BREAKS)
def test_each_break_is_about_a_line_that_is_there_once(name: str) -> None:
    for file, line, _ in BREAKS[name].changes:
        count = (ROOT / file).read_text().count(line)
        assert count == 1, f"{file} has changed: {line!r} is there {count} times"


@pytest.fixture
def broken(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Break]:
    """A copy of Tidewire with one line changed."""
    one: Break = BREAKS[request.param]
    code = tmp_path / "code"
    for name in ("tidewire", "services", "examples"):
        shutil.copytree(ROOT / name, code / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file, line, instead in one.changes:
        path = code / file
        path.write_text(path.read_text().replace(line, instead))
    return code, one


@pytest.mark.slow
@breaks
@pytest.mark.parametrize("broken", BREAKS, indirect=True)
async def test_the_checker_notices_a_missing_guard(broken: tuple[Path, Break], monkeypatch: pytest.MonkeyPatch) -> None:
    code, one = broken
    for name, value in one.environment:
        monkeypatch.setenv(name, value)
    for seed in range(TRIES):
        outcome = await run(
            one.topology,
            seed,
            one.lasts_s,
            pace=one.pace,
            faults=one.faults,
            code=code,
            partitions=one.partitions,
            max_bytes=one.max_bytes,
        )
        print(outcome.as_markdown())
        if one.finds & outcome.kinds:
            return
    pytest.fail(f"nothing of {one.finds} was found in {TRIES} runs")
