"""What benchmarks/isolation.py makes of its samples."""

from __future__ import annotations

from typing import Any

from benchmarks.isolation_crowd import Sample
from benchmarks.isolation_report import KINDS, PLACES, Phase, goals, summary, tables

PHASES = ["calm-0", "attack-0", "calm-1", "attack-1"]


def case(*, attacked_s: float = 0.02, failed_in: str | None = None) -> dict[str, Any]:
    samples = [
        Sample(phase, where, kind, attacked_s if phase.startswith("attack") else 0.01, "ok")
        for phase in PHASES
        for where in PLACES
        for kind in KINDS
        for _ in range(100)
    ]
    if failed_in is not None:
        samples.append(Sample(failed_in, "other", "read", 10.0, "timeout"))
    phases = [Phase(name, {"store": 0.5}, {"gateway": 50.0}) for name in PHASES]
    found = summary(samples, {"calm-0": [0.001], "attack-0": [0.002]}, phases)
    more = {"attack": "an attack", "answers": {"ok": 1}, "recovery_s": [0.0, None], "redis_peak_mb": 10.0}
    return found | more | {"reconnects": 0, "resets": 0}


def test_calm_and_attacked_phases_are_pooled_and_compared() -> None:
    reply = case()["users"]["same"]["reply"]
    assert reply["calm"] == {"count": 200, "p50_ms": 10.0, "p99_ms": 10.0, "failed": {}}
    assert reply["ratio_p99"] == 2.0
    assert reply["p99_ms_of_each_phase"] == {"calm-0": 10.0, "attack-0": 20.0, "calm-1": 10.0, "attack-1": 20.0}


def test_the_goal_is_missed_by_latency_or_by_one_failure() -> None:
    assert list(goals({"L2": case()}).values()) == ["reached"]
    assert list(goals({"L2": case(attacked_s=0.031)}).values()) == ["MISSED"]
    assert list(goals({"L2": case(failed_in="attack-1")}).values()) == ["MISSED"]


def test_a_run_that_fails_without_an_attacker_says_nothing_of_one() -> None:
    assert list(goals({"L2": case(failed_in="calm-0")}).values()) == ["NOISY"]


def test_the_tables_name_failures_and_missing_recoveries() -> None:
    shown = tables({"L2": case(failed_in="attack-1")})
    assert "1 timeout" in shown
    assert "0.0, never" in shown
    assert "10 → 20 (×2.0)" in shown
