"""The figures of a run: counts, and tables in Markdown for docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .bounds import MAX_BYTES, Worst
from .check import Report, Violation
from .logs import Peak

SHOWN = 10
"""Violations that are printed in full."""


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
    late: int = 0
    """Requests that were answered with `timeout`."""
    readers_s: dict[str, float] = field(default_factory=dict)
    """The longest silence at a connected reader, by the fault of that time."""
    partitions: dict[str, Worst] = field(default_factory=dict)
    """The longest from a write to its change in any partition, by the fault of that time."""
    lag_s: float = 0.0
    """The longest that the checker's own process got no turn."""
    peaks: Sequence[Peak] = ()
    looks: int = 0
    """Times that `connections` was compared with the connections that were open."""
    sent: Counter[str] = field(default_factory=Counter)
    """Requests of the expensive client."""
    answers: Counter[str] = field(default_factory=Counter)
    """Number of requests by answer."""

    @property
    def violations(self) -> list[Violation]:
        return self.report.violations

    @property
    def kinds(self) -> set[str]:
        return {violation.kind for violation in self.violations}

    def as_markdown(self) -> str:
        """All of it, for a terminal and for the documentation."""
        found = dict(Counter(one.kind for one in self.violations))
        return "\n\n".join(
            (
                f"{self.topology}, seed {self.seed}, {self.seconds:.0f} s",
                self._counts(),
                self._by_fault(),
                *([self._memory()] if self.peaks else []),
                *([self._expensive()] if self.sent else []),
                "\n".join(
                    (
                        f"{len(self.violations)} violations {found}",
                        *(f"  {violation}" for violation in self._shown()),
                    )
                ),
            )
        )

    def _counts(self) -> str:
        report = self.report
        return table(
            ("", self.topology),
            (
                ("faults", self.faults.total()),
                ("writes acknowledged", self.acknowledged),
                ("writes of which nobody knew", self.unknown),
                ("requests answered `timeout`", self.late),
                ("changes", self.changes),
                ("frames delivered", report.delivered),
                ("lost, doubled, out of order, leaked, or beyond a bound", len(self.violations)),
                ("resets of whole feeds", report.resets["whole"]),
                ("resets of a table", report.resets.total() - report.resets["whole"]),
                ("acknowledged and lost by Redis", report.lost_acknowledged),
                ("frames of changes that Redis then lost", report.phantoms),
                ("looks at `connections`", self.looks),
                ("longest lag of the checker itself in s", f"{self.lag_s:.1f}"),
            ),
        )

    def _by_fault(self) -> str:
        kinds = sorted(self.faults.keys() | self.readers_s.keys() | self.partitions.keys())
        return table(
            ("fault", "count", "longest pause of a partition in s", "longest silence at a reader in s"),
            (
                (
                    kind,
                    self.faults[kind] or "–",
                    f"{self.partitions[kind].longest_ms / 1000:.1f}" if kind in self.partitions else "–",
                    f"{self.readers_s[kind]:.1f}" if kind in self.readers_s else "–",
                )
                for kind in kinds
            ),
        )

    def _memory(self) -> str:
        return table(
            ("process", "most memory in MiB", "bound in MiB"),
            ((one.who, one.size_bytes >> 20, MAX_BYTES[one.who] >> 20) for one in self.peaks),
        )

    def _expensive(self) -> str:
        answers: dict[str, list[str]] = {kind: [] for kind in self.sent}
        for name, count in sorted(self.answers.items()):
            kind, _, answer = name.partition(" ")
            answers[kind].append(f"{count} {answer}")
        head = ("request of the expensive client", "sent", "answers")
        return table(head, ((kind, self.sent[kind], ", ".join(found) or "–") for kind, found in answers.items()))

    def _shown(self) -> list[Violation]:
        """Some of each kind."""
        shown: list[Violation] = []
        each = max(1, SHOWN // max(1, len(self.kinds)))
        for kind in sorted(self.kinds):
            shown += [one for one in self.violations if one.kind == kind][:each]
        return shown


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
