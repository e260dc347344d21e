"""Figures of benchmarks/isolation.py: from samples to a summary of a case, and from summaries to tables. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.isolation_crowd import Sample

GOAL_RATIO = 3.0
KINDS, PLACES = ("reply", "delivered", "read"), ("same", "other")


class Phase(NamedTuple):
    """CPU and memory of the system during a phase, by kind of process."""

    name: str  # "calm-0", "attack-0", "calm-1", …
    cpu: Mapping[str, float]  # cores
    peaks_mb: Mapping[str, float]


def quantile(values: Iterable[float], of: float) -> float | None:
    """Return a quantile, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * of), len(ordered) - 1)] if ordered else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)


def figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """The latencies of requests of one kind. A failed request counts with the time until its failure was known."""
    took = [sample.took_s for sample in samples]
    outcomes = Counter(sample.outcome for sample in samples)
    return {
        "count": len(samples),
        "p50_ms": _ms(quantile(took, 0.5)),
        "p99_ms": _ms(quantile(took, 0.99)),
        "failed": {outcome: count for outcome, count in outcomes.items() if outcome != "ok"},
    }


def summary(samples: Sequence[Sample], lags: Mapping[str, list[float]], phases: Sequence[Phase]) -> dict[str, Any]:
    """The rows of one case: for each place and kind, without and with the attacker, and their ratio."""
    places: dict[str, Any] = {}
    for where in PLACES:
        for kind in KINDS:
            some = [sample for sample in samples if (sample.where, sample.kind) == (where, kind)]
            calm, attacked = (
                figures([sample for sample in some if sample.phase.startswith(name)]) for name in ("calm", "attack")
            )
            rounds = {
                name: figures([s for s in some if s.phase == name])["p99_ms"] for name in (p.name for p in phases)
            }
            places.setdefault(where, {})[kind] = {
                "calm": calm,
                "attack": attacked,
                "ratio_p50": ratio(attacked["p50_ms"], calm["p50_ms"]),
                "ratio_p99": ratio(attacked["p99_ms"], calm["p99_ms"]),
                "p99_ms_of_each_phase": rounds,
            }
    lag = {
        name: _ms(quantile((lag for phase, some in lags.items() if phase.startswith(name) for lag in some), 0.99))
        for name in ("calm", "attack")
    }
    return {
        "users": places,
        "loop_lag_p99_ms": lag,
        "phases": [phase._asdict() for phase in phases],
    }


def ratio(attacked: float | None, calm: float | None) -> float | None:
    return round(attacked / calm, 2) if attacked and calm else None


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(one: Mapping[str, Any], name: str) -> str:
    before, after = one["calm"][name], one["attack"][name]
    times = ratio(after, before)
    shown = " → ".join("none" if value is None else f"{value:,.0f}" for value in (before, after))
    return shown if times is None else f"{shown} (×{times:.1f})"


def failures(one: Mapping[str, Any], phase: str) -> Counter[str]:
    """The rows of all kinds of one place."""
    total: Counter[str] = Counter()
    for kind in KINDS:
        total.update(one[kind][phase]["failed"])
    return total


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "0"


def _recovery(seconds: Sequence[float | None]) -> str:
    return ", ".join("never" if one is None else f"{one:.1f}" for one in seconds)


def tables(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Two Markdown tables: what the users met, and what the attacker and the system did."""
    latencies, causes = [], []
    for name, case in found.items():
        for where in PLACES:
            one = case["users"][where]
            columns = (_pair(one[kind], quantile) for kind in KINDS for quantile in ("p50_ms", "p99_ms"))
            failed = (_counts(failures(one, phase)) for phase in ("calm", "attack"))
            latencies.append([name, where, *columns, *failed])
        used = {kind: [p for p in case["phases"] if p["name"].startswith(kind)] for kind in ("calm", "attack")}
        cpu = {
            process: " → ".join(
                f"{sum(p['cpu'].get(process, 0) for p in some) / max(len(some), 1):.2f}" for some in used.values()
            )
            for process in ("gateway", "store", "broadcaster", "redis")
        }
        gateway_mb = max((p["peaks_mb"].get("gateway", 0) for p in used["attack"]), default=0)
        lag = " → ".join(f"{value or 0:,.1f}" for value in case["loop_lag_p99_ms"].values())
        row = [name, case["attack"], _counts(case["answers"]), _recovery(case["recovery_s"]), *cpu.values()]
        causes.append([*row, f"{case['redis_peak_mb']:,.0f}", f"{gateway_mb:,.0f}", str(case["reconnects"]), lag])
    quantiles = [f"{kind} {quantile}" for kind in ("reply", "delivered", "read") for quantile in ("p50", "p99")]
    first = _table(["case", "partition", *quantiles, "failed without", "failed with"], latencies)
    head = ["case", "attack", "attacker's answers", "recovery s", "gateway cores", "store cores", "broadcaster cores"]
    head += ["redis cores", "redis peak MB", "gateway peak MB", "reconnects", "users' loop lag p99 ms"]
    return f"\nUsers, in ms, without → with the attacker:\n\n{first}\n\n{_table(head, causes)}\n"


def goals(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For each case: reached, MISSED, or NOISY where requests failed without an attacker too."""
    verdicts: dict[str, str] = {}
    for name, case in found.items():
        ratios = {
            f"{kind} in the {where} partition": case["users"][where][kind]["ratio_p99"] or 0
            for where in PLACES
            for kind in KINDS
        }
        worst = max(ratios, key=lambda what: ratios[what])
        calm, attacked = (
            sum((failures(case["users"][where], phase) for where in PLACES), Counter[str]())
            for phase in ("calm", "attack")
        )
        said = f"{name}: p99 at most ×{GOAL_RATIO:.0f}, no failure: ×{ratios[worst]:.1f} ({worst}), {_counts(attacked)}"
        reached = ratios[worst] <= GOAL_RATIO and not attacked
        verdicts[said] = "NOISY" if calm else "reached" if reached else "MISSED"
    return verdicts
