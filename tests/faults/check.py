"""Compare what readers logged with what they should have received: missing, doubled, out of order, or leaked. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .expect import EVENTUAL, Expected, Feed, Frame, Place, Written, key_of, visible
from .images import digest
from .logs import Acknowledged, Got, Span

LATE_MS = 20_000
"""Milliseconds after a reset from which on every change must be among the frames that follow it."""
EVENTUAL_MS = 15_000
"""Milliseconds of membership before and after a change that entitle to it, wherever the group is."""
LEAK_MS = 5_000
"""Milliseconds after which a former member must receive nothing more: a lease, and a margin."""


class Violation(NamedTuple):
    kind: str
    """loss, double, disorder, leak, phantom, reset, unit (a transaction torn apart), live (of a view), index, stuck;
    history (not read whole); of bounds: pause, absence, socket, late, memory"""
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.who}: {self.what}"


@dataclass
class ReaderLog:
    user: str
    name: str
    log: Sequence[Got]
    connected_ms: float = 0.0


@dataclass
class Report:
    violations: list[Violation] = field(default_factory=list)
    delivered: int = 0
    resets: Counter[str] = field(default_factory=Counter)
    lost_acknowledged: int = 0
    phantoms: int = 0
    """Frames of changes that a failover took away; each reader had a reset after it."""

    def add(self, kind: str, who: str, what: str) -> None:
        self.violations.append(Violation(kind, who, what))


# ── what came ───────────────────────────────────────────────────────────────────────────────────────────────────────


def place_of(position: str) -> tuple[int, Place]:
    partition, generation, ms, seq = map(int, position.split("-"))
    return partition, (generation, ms, seq)


def feed_of(reader: ReaderLog, one: Got) -> Feed:
    if one.topic is None:
        return "user", reader.user
    if not one.topic.startswith("claim:"):
        return "topic", one.topic
    # The topic of a claim has a name of Tidewire's own, with the value as JSON in it.
    return "topic", "tenant:" + one.topic.rpartition(":")[2].strip('"')


def frame_of(one: Got) -> Frame:
    if one.type == "message":
        return "message", None, None, (), digest(one.body), None
    return one.type, one.event, one.table, one.key, one.new, one.old


class Segment(NamedTuple):
    """The frames of a feed that a reader received between two resets. `begun_ms` is the time of the first reset."""

    frames: list[Got]
    since_ms: float
    """The time from which on all writes must be in it: until the next reset, or until the end of the run."""
    is_first: bool
    is_last: bool
    begun_ms: float = 0.0


def segments(frames: Sequence[Got], connected_ms: float) -> Iterator[Segment]:
    current: list[Got] = []
    since, is_first, begun_ms = connected_ms, True, connected_ms
    for one in frames:
        if one.type == "reset" and one.table is None:
            yield Segment(current, since, is_first, is_last=False, begun_ms=begun_ms)
            current, since, is_first, begun_ms = [], one.at_ms + LATE_MS, False, one.at_ms
        elif one.type != "reset":
            current.append(one)
    yield Segment(current, since, is_first, is_last=True, begun_ms=begun_ms)


def check_reader(
    expected: Expected,
    reader: ReaderLog,
    report: Report,
    *,
    may_fall_back: bool,
    may_reset: Sequence[Span] = (),
) -> None:
    """Compare one reader's log. `may_reset`: when a whole feed may be reset although nothing has gone back."""
    by_feed: dict[Feed, list[Got]] = {}
    for one in reader.log:
        by_feed.setdefault(feed_of(reader, one), []).append(one)
        if one.type == "reset":
            report.resets[f"of {one.table}" if one.table else "whole"] += 1
        else:
            report.delivered += 1
    by_feed.setdefault(("user", reader.user), [])
    for feed, frames in by_feed.items():
        who = f"{reader.name}, feed {feed[1]}"
        for segment in segments(frames, reader.connected_ms):
            forgiven = any(span.since_ms <= segment.begun_ms <= span.until_ms for span in may_reset)
            if not segment.is_first and not may_fall_back and not forgiven:
                report.add("reset", who, "a whole feed was reset, and nothing had gone back")
            _check_segment(expected, feed, who, segment, report, may_fall_back=may_fall_back)


def _check_segment(
    expected: Expected, feed: Feed, who: str, segment: Segment, report: Report, *, may_fall_back: bool
) -> None:
    partitions: dict[int, list[tuple[Place, Frame]]] = {}
    messages: list[Got] = []
    eventual: list[tuple[Place, int, Got]] = []
    newest_ms = 0
    for one in segment.frames:
        if one.type == "message":
            messages.append(one)
            continue
        assert one.position
        partition, place = place_of(one.position)
        newest_ms = max(newest_ms, place[1])
        if (partition, place) not in expected.written:
            report.phantoms += 1
            if segment.is_last or not may_fall_back:
                report.add("phantom", who, f"{one.event} at {one.position} is no change of the store's")
        elif one.table in EVENTUAL:
            eventual.append((place, newest_ms, one))
        else:
            partitions.setdefault(partition, []).append((place, frame_of(one)))
    _check_eventual(expected, feed, who, segment, eventual, report)
    _check_units(who, segment, report)
    sent = expected.feeds.get(feed, {})
    for partition in sent.keys() | partitions.keys():
        frames = partitions.get(partition, [])
        _check_partition(expected, sent.get(partition, {}), f"{who}, partition {partition}", segment, frames, report)
    _check_messages(sent, who, segment, messages, report, may_fall_back=may_fall_back)


def _is_message(frames: Counter[Frame]) -> bool:
    return any(frame[0] == "message" for frame in frames)


def _check_messages(
    sent: dict[int, dict[Place, Counter[Frame]]],
    who: str,
    segment: Segment,
    messages: list[Got],
    report: Report,
    *,
    may_fall_back: bool,
) -> None:
    """Frames of messages have no position: they come in the order in which they were sent."""
    due = [
        (place, frame) for places in sent.values() for place, frames in places.items() if _is_message(frames)
        for frame in frames
    ]  # fmt: skip
    order = {frame: number for number, (_, frame) in enumerate(due)}
    seen: set[Frame] = set()
    last = -1 if segment.is_first else None  # nobody sends before all are connected
    for one in messages:
        frame = frame_of(one)
        number = order.get(frame)
        if frame in seen:
            report.add("double", who, f"message {one.body}")
        elif number is None:
            report.phantoms += 1
            if segment.is_last or not may_fall_back:
                report.add("phantom", who, f"message {one.body} is no change of the store's")
        else:
            if last is not None and number < last:
                report.add("disorder", who, f"message {one.body}")
            elif last is not None and number > last + 1:
                report.add("loss", who, f"{number - last - 1} messages before {one.body}")
            last = number
        seen.add(frame)
    if segment.is_last:
        start = 0 if last is None else last + 1
        if lost := [place for place, _ in due[start:] if place[1] > segment.since_ms]:
            report.add("loss", who, f"{len(lost)} messages at the end")


def _check_partition(
    expected: Expected,
    due: dict[Place, Counter[Frame]],
    who: str,
    segment: Segment,
    frames: list[tuple[Place, Frame]],
    report: Report,
) -> None:
    groups: list[tuple[Place, Counter[Frame]]] = []
    for place, frame in frames:
        if groups and groups[-1][0] == place:
            groups[-1][1][frame] += 1
        else:
            groups.append((place, Counter({frame: 1})))
    order = [place for place, frames_there in due.items() if not _is_message(frames_there)]
    numbers = {place: number for number, place in enumerate(order)}
    following = next((number for number, place in enumerate(order) if place[1] > segment.since_ms), len(order))
    if groups:
        following = min(following, numbers.get(groups[0][0], following))
    seen: set[Place] = set()
    missing: dict[Place, None] = {}
    for place, found in groups:
        number = numbers.get(place)
        if place in seen:
            report.add("double", who, f"{_shown(found)} at {place}")
        elif number is None:
            report.add("leak", who, f"{_shown(found)} at {place} is not for this reader")
        elif number < following:
            missing.pop(place, None)
            report.add("disorder", who, f"{_shown(found)} at {place} came after {order[following - 1]}")
        else:
            missing |= dict.fromkeys(order[following:number])
            following = number + 1
            _compare(due[place], found, who, place, report)
        seen.add(place)
    if segment.is_last:
        missing |= dict.fromkeys(order[following:])
    if missing:
        first = next(iter(missing))
        report.add("loss", who, f"{len(missing)} changes, the first at {first}: {_shown(due[first])}")


def _compare(due: Counter[Frame], found: Counter[Frame], who: str, place: Place, report: Report) -> None:
    if due == found:
        return
    lacking, extra = due - found, found - due
    about = {(frame[1], frame[2], frame[3]) for frame in lacking}
    for frame in extra:
        if frame in due:
            report.add("double", who, f"{_named(frame)} at {place}")
        elif (frame[1], frame[2], frame[3]) in about:
            report.add("leak", who, f"{_named(frame)} at {place} has another image than it should")
        else:
            report.add("leak", who, f"{_named(frame)} at {place} is not for this reader")
    names = {(frame[1], frame[2], frame[3]) for frame in extra}
    if lost := [frame for frame in lacking if (frame[1], frame[2], frame[3]) not in names]:
        report.add("loss", who, f"{len(lost)} of the frames at {place}, for example {_named(lost[0])}")


def _check_eventual(
    expected: Expected, feed: Feed, who: str, segment: Segment, frames: list[tuple[Place, int, Got]], report: Report
) -> None:
    """Check tables whose groups are in other partitions: the user was a member at about that time."""
    user = feed[1]
    seen: set[tuple[int, Place]] = set()
    last: dict[int, Place] = {}
    for place, newest_ms, one in frames:
        assert one.position
        partition, _ = place_of(one.position)
        change = expected.written[partition, place].change
        what = f"{one.table} {dict(one.key)} at {one.position}"
        if (partition, place) in seen:
            report.add("double", who, what)
        elif place < last.get(partition, place):
            report.add("disorder", who, what)
        seen.add((partition, place))
        last[partition] = place
        if not expected.memberships.may_hear(change, user, newest_ms - LEAK_MS, one.at_ms):
            report.add("leak", who, f"{what}: in none of its groups for long")
        images = {None, visible(change.new), visible(change.old)}
        if one.new not in images or one.old not in images:
            report.add("leak", who, f"{what} has another image than it should")
    if feed[0] != "user" or not segment.is_last:
        return
    for (partition, place), written in expected.written.items():
        change = written.change
        if change.table not in EVENTUAL or place[1] <= segment.since_ms or (partition, place) in seen:
            continue
        span = (place[1] - EVENTUAL_MS, place[1] + EVENTUAL_MS)
        if change.new is not None and expected.memberships.must_hear(change, user, *span):
            report.add("loss", who, f"{change.table} {change.key} at {place}: a member all the while")


def _check_units(who: str, segment: Segment, report: Report) -> None:
    """The frames of a transaction come one after another, `more` on all but the last."""
    ended: set[str] = set()
    open_: str | None = None
    for one in segment.frames:
        if open_ is not None and one.transaction != open_:
            report.add("unit", who, f"{one.event or one.type} of {one.table} came within transaction {open_}")
            ended.add(open_)
        elif one.transaction in ended:
            report.add("unit", who, f"transaction {one.transaction} went on after its last frame")
        open_ = one.transaction if one.more else None
        if one.transaction is not None and not one.more:
            ended.add(one.transaction)
    if open_ is not None and segment.is_last:
        report.add("unit", who, f"transaction {open_} has no last frame")


def check_follower(expected: Expected, reader: ReaderLog, flat: str, report: Report) -> None:
    """A user that comes and goes, and the topic of its group: nothing comes to it for long after it has left."""
    for one in reader.log:
        if one.topic == f"flat:{flat}" and one.type == "change" and one.position:
            _, place = place_of(one.position)
            if not expected.memberships.at_all("flats", flat, reader.user, place[1] - LEAK_MS, one.at_ms):
                report.add("leak", reader.name, f"{one.table} {dict(one.key)} at {one.position}: out of it for long")


def _named(frame: Frame) -> str:
    return f"{frame[1] or frame[0]} of {frame[2]} {dict(frame[3])}"


def _shown(frames: Counter[Frame]) -> str:
    return ", ".join(map(_named, list(frames)[:3]))


# ── the store itself ────────────────────────────────────────────────────────────────────────────────────────────────


def check_history(
    history: Sequence[Written], acknowledged: Sequence[Acknowledged], report: Report, *, may_fall_back: bool
) -> None:
    """Each write once, versions that only go up, and all that was acknowledged."""
    times: Counter[tuple[str, str, Any]] = Counter()
    versions: dict[tuple[str, Any], tuple[int, int]] = {}
    requests: set[str] = set()
    for one in history:
        change = one.change
        if change.request:
            times[change.request, change.table, key_of(change.key)] += 1
            requests.add(change.request)
        name, generation = (change.table, key_of(change.key)), one.place[0]
        known = versions.get(name)
        if change.event != "SEND" and known and known[0] == generation and change.version <= known[1]:
            report.add("disorder", "store", f"version {change.version} of {name} after version {known[1]}")
        versions[name] = (generation, change.version)
    for (request, table, key), count in times.items():
        if count > 1:
            report.add("double", "store", f"{request} was done {count} times to {table} {dict(key)}")
    for one_acknowledged in acknowledged:
        if one_acknowledged.request not in requests:
            if may_fall_back:
                report.lost_acknowledged += 1
            else:
                report.add("loss", "store", f"{one_acknowledged.request} was acknowledged, and is not there")


def check_connections(readers: Sequence[ReaderLog], report: Report) -> None:
    """Two connections of a user receive the same frames under the same cursor."""
    told: dict[tuple[Feed, str], Frame] = {}
    for reader in readers:
        for one in reader.log:
            if one.cursor is None or one.type == "reset":
                continue
            feed, frame = feed_of(reader, one), frame_of(one)
            if told.setdefault((feed, one.cursor), frame) != frame:
                report.add("disorder", reader.name, f"{one.cursor} of {feed[1]} is another frame elsewhere")


def check_steps(history: Sequence[Written], who: str, steps: Sequence[tuple[Any, str]], report: Report) -> None:
    """Check that versions of items of a live view decrease only after it was empty."""
    places = {one.change.request: one.place for one in history if one.change.request}
    last: dict[Any, Place] = {}
    for key, request in steps:
        if key is None:
            last.clear()
        elif request in places:
            place = places[request]
            if place < last.get(key, place):
                report.add("live", who, f"{key} went back to {request}")
            last[key] = place
