"""Bounds on time and memory: each is kept to, and what goes beyond it is named, unless a fault explains it."""

from __future__ import annotations

import pytest

from .bounds import (
    MAX_ABSENCE_MS,
    MAX_BYTES,
    MAX_PAUSE_MS,
    Worst,
    check_absences,
    check_late,
    check_memory,
    check_pauses,
    check_sockets,
    explained_ms,
    longest_pauses,
)
from .check import Report
from .logs import Absence, Late, Peak, Probe, Reconnect, Span, Window

STALL = Window(10_000, 16_000, "stall_redis")
KILL = Window(20_000, 20_001, "kill store")


@pytest.mark.parametrize(
    ("since", "until", "windows", "expected"),
    [
        (0, 9_000, [STALL], 0),
        (9_000, 12_000, [STALL], 2_000),
        (9_000, 30_000, [STALL, KILL], 6_001),
        (9_000, 30_000, [STALL, Window(12_000, 18_000, "pause gateway")], 8_000),
        (11_000, 12_000, [STALL], 1_000),
    ],
)
def test_faults_explain_the_time_that_they_last_and_overlaps_count_once(
    since: float, until: float, windows: list[Window], expected: float
) -> None:
    assert explained_ms(since, until, windows) == expected
    assert explained_ms(since, until, windows[::-1]) == expected


def pauses(*probes: Probe) -> list[str]:
    report = Report()
    check_pauses(probes, [STALL, KILL], [Span(40_000, 44_000)], 60_000, report)
    return [one.kind for one in report.violations]


def test_a_partition_may_stand_still_for_as_long_as_the_fault_and_five_seconds() -> None:
    assert pauses(Probe(3, 1, 9_000, 16_000 + MAX_PAUSE_MS - 1_000)) == []
    assert pauses(Probe(3, 1, 9_000, 17_500 + MAX_PAUSE_MS)) == ["pause"]
    assert pauses(Probe(3, 1, 30_000, 35_001)) == ["pause"]
    assert pauses(Probe(3, 1, 56_000, None)) == [], "the run ended before it was late"
    assert pauses(Probe(3, 1, 54_000, None)) == ["pause"], "never told"
    assert pauses(Probe(3, 1, 39_000, 48_000)) == [], "the checker itself got no turn"


def test_probes_that_waited_at_the_same_time_are_one_pause() -> None:
    together = [Probe(3, number, 30_000 + 500 * number, 38_000) for number in range(4)]
    assert pauses(*together, Probe(3, 5, 50_000, 56_000)) == ["pause", "pause"]
    assert pauses(together[0], together[1]._replace(partition=4)) == ["pause", "pause"]


def test_the_longest_pause_is_put_down_to_the_last_fault_of_its_time() -> None:
    probes = [
        Probe(3, 1, 1_000, 1_100),
        Probe(3, 2, 9_000, 17_000),
        Probe(4, 1, 9_500, 16_500),
        Probe(4, 2, 20_500, 24_000),
    ]
    assert longest_pauses(probes, [STALL, KILL]) == {
        "no fault": Worst(100, 3),
        "stall_redis": Worst(8_000, 3),
        "kill store": Worst(3_500, 4),
    }


def test_an_open_connection_is_listed_soon_after_a_fault() -> None:
    def kinds(*absences: Absence) -> list[str]:
        report = Report()
        check_absences(absences, [STALL], report)
        return [one.kind for one in report.violations]

    assert kinds(Absence("ann", "c", 11_000, 16_000 + MAX_ABSENCE_MS)) == []
    assert kinds(Absence("ann", "c", 11_000, 16_001 + MAX_ABSENCE_MS)) == ["absence"]
    grows = [Absence("ann", "c", 20_000, 20_000 + 2_000 * looks) for looks in range(10)]
    assert kinds(*grows) == ["absence"], "once for each connection"


def test_an_answer_is_late_only_where_no_fault_is_near() -> None:
    def kinds(since: float, until: float) -> list[str]:
        report = Report()
        check_late([Late("ann", "put", since, until)], [STALL], report)
        return [one.kind for one in report.violations]

    assert kinds(12_000, 22_000) == []
    assert kinds(20_500, 30_500) == [], "within five seconds after it"
    assert kinds(21_500, 31_500) == ["late"]


def test_a_stall_of_a_server_closes_no_socket() -> None:
    def kinds(at_ms: float, *others: Window) -> list[str]:
        report = Report()
        check_sockets([Reconnect("p3-0", at_ms - 1_000, at_ms)], [STALL, *others], report)
        return [one.kind for one in report.violations]

    assert kinds(18_000) == ["socket"]
    assert kinds(9_000) == [], "before the stall"
    assert kinds(40_000) == [], "long after it"
    assert kinds(18_000, Window(17_000, 17_001, "kill gateway")) == [], "another fault may be the reason"


def test_each_kind_of_process_has_a_bound_on_memory() -> None:
    report = Report()
    check_memory([Peak(who, limit) for who, limit in MAX_BYTES.items()], report)
    assert not report.violations
    check_memory([Peak("store", MAX_BYTES["store"] + 1)], report)
    assert [(one.kind, one.who) for one in report.violations] == [("memory", "store")]
