"""Bounds on time and memory: what stood still, was missing or late for longer than a fault explains. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .check import Report
from .logs import Absence, Late, Peak, Probe, Reconnect, Span, Window

MAX_PAUSE_MS = 5_000
"""Maximum ms that a partition may stand still, beyond the faults of that time."""
MAX_ABSENCE_MS = 10_000
"""Maximum ms that an open connection may be missing from `connections`, beyond the faults of that time."""
AFTER_MS = 5_000
"""Maximum ms after a fault during which an answer may be late because of it."""
MAX_BYTES = {
    "gateway": 600 << 20,
    "store": 500 << 20,
    "broadcaster": 500 << 20,
    "authorizer": 200 << 20,
    "redis": 1200 << 20,
}
"""The most memory that a process of each kind may have: resident for services, `used_memory_peak` for Redis."""
BEFORE_MS = 1_000
"""A pause that begins so shortly after a fault is put down to it, in ms."""


KEEPS_SOCKETS = frozenset(("stall_redis", "kill_redis", "hang_master", "fail_over", "change_places"))
"""Faults of servers, over which gateways keep their sockets."""
NEAR_MS = 15_000
"""Other faults that ended less than this before a connection was closed may be the reason, in ms."""


class Worst(NamedTuple):
    """The longest pause of a kind of fault."""

    longest_ms: float
    partition: int


class _Pause(NamedTuple):
    """Probes that waited at the same time: how long the worst of them did beside faults, and until when they did."""

    more_ms: float
    until_ms: float
    probe: Probe


def explained_ms(since_ms: float, until_ms: float, windows: Iterable[Span | Window], after_ms: float = 0.0) -> float:
    """Return how much of a span lies within faults, or shortly after one. Overlaps count once."""
    cut = sorted(
        (max(since_ms, window.since_ms), min(until_ms, window.until_ms + after_ms))
        for window in windows
        if window.since_ms < until_ms and window.until_ms + after_ms > since_ms
    )
    total, reached = 0.0, since_ms
    for a, b in cut:
        total += max(0.0, b - max(a, reached))
        reached = max(reached, b)
    return total


def check_pauses(
    probes: Iterable[Probe], windows: Sequence[Window], lags: Sequence[Span], ended_ms: float, report: Report
) -> None:
    """No partition stands still for longer than MAX_PAUSE_MS more than the faults of that time last.

    `lags`: when the checker's own process got no turn, so that nothing it saw then says anything. Probes that waited at
    the same time are one violation.
    """
    pauses: dict[int, list[_Pause]] = {}
    for one in probes:
        until = ended_ms if one.delivered_ms is None else one.delivered_ms
        more = until - one.since_ms - explained_ms(one.since_ms, until, [*windows, *lags])
        if more > MAX_PAUSE_MS:
            found = pauses.setdefault(one.partition, [])
            if found and one.since_ms < found[-1].until_ms:
                worst = max(_Pause(more, until, one), found[-1], key=lambda pause: pause.more_ms)
                found[-1] = worst._replace(until_ms=max(until, found[-1].until_ms))
            else:
                found.append(_Pause(more, until, one))
    for partition, found in pauses.items():
        for pause in found:
            how = "was not told, which is" if pause.probe.delivered_ms is None else "was told"
            since = pause.probe.since_ms
            what = f"write {pause.probe.number} {how} late, {pause.more_ms / 1000:.1f} s of it outside of faults"
            kind = kind_at(since, pause.until_ms, windows)
            report.add("pause", f"partition {partition}", f"{what} ({kind}, at {since:.0f})")


def longest_pauses(probes: Iterable[Probe], windows: Sequence[Window]) -> dict[str, Worst]:
    """The longest time from a probe's write to its delivery, by the last fault of that time."""
    found: dict[str, Worst] = {}
    for one in probes:
        if one.delivered_ms is None:
            continue
        kind, took = kind_at(one.since_ms, one.delivered_ms, windows), one.delivered_ms - one.since_ms
        if took > found.get(kind, Worst(0.0, 0)).longest_ms:
            found[kind] = Worst(took, one.partition)
    return found


def kind_at(since_ms: float, until_ms: float, windows: Iterable[Window]) -> str:
    """The kind of the last fault that a stretch of time touches, or follows on."""
    then = [one.kind for one in windows if one.since_ms < until_ms and since_ms < one.until_ms + BEFORE_MS]
    return then[-1] if then else "no fault"


def check_absences(absences: Iterable[Absence], windows: Sequence[Window], report: Report) -> None:
    """No open connection is missing from `connections` for longer than MAX_ABSENCE_MS beside faults."""
    worst: dict[tuple[str, str], Absence] = {}
    for one in absences:
        worst[one.user, one.connection] = max(one, worst.get((one.user, one.connection), one), key=_length)
    for one in worst.values():
        more = _length(one) - explained_ms(one.since_ms, one.until_ms, windows)
        if more > MAX_ABSENCE_MS:
            what = f"connection {one.connection} was open, and not in `connections` for {_length(one) / 1000:.1f} s"
            kind = kind_at(one.since_ms, one.until_ms, windows)
            report.add("absence", one.user, f"{what} ({more / 1000:.1f} s outside of faults, {kind})")


def _length(one: Absence) -> float:
    return one.until_ms - one.since_ms


def check_late(late: Iterable[Late], windows: Sequence[Window], report: Report) -> None:
    """Every request is answered within its deadline, unless a fault, or the AFTER_MS after one, is in that time."""
    for one in late:
        if not explained_ms(one.since_ms, one.until_ms, windows, AFTER_MS):
            took = (one.until_ms - one.since_ms) / 1000
            report.add("late", one.user, f"{one.action} was answered `timeout` after {took:.1f} s, without a fault")


def check_sockets(reconnects: Iterable[Reconnect], windows: Sequence[Window], report: Report) -> None:
    """A server that stalls or restarts costs no user the connection: gateways keep their sockets.

    Looked at where nothing else happened at that time.
    """
    for one in reconnects:
        near = {
            window.kind
            for window in windows
            if window.since_ms < one.at_ms and one.since_ms - NEAR_MS < window.until_ms
        }
        if near and near <= KEEPS_SOCKETS:
            report.add("socket", one.user, f"the connection was closed over {', '.join(near)} (at {one.at_ms:.0f})")


def check_memory(peaks: Iterable[Peak], report: Report, limits: Mapping[str, int] = MAX_BYTES) -> None:
    """No process has more memory than is allowed its kind."""
    for one in peaks:
        limit = limits[one.who]
        if one.size_bytes > limit:
            report.add("memory", one.who, f"had {one.size_bytes >> 20} MiB; at most {limit >> 20} MiB are expected")
