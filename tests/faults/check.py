"""What readers logged, beside the store's own history: what is missing, twice, out of order, or not theirs. Pure.

Who is entitled to what is worked out here a second time, from the declarations in `app` and nothing of Tidewire's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tidewire.records import Change

from .load import Acknowledged, Got, digest, tenant_of

LATE_MS = 20_000
"""A change that is made so long after a reset is in what follows on the reset."""
EVENTUAL_MS = 15_000
"""A member for so long before and after a change is made hears of it, also where the group is in another partition."""
LEAK_MS = 5_000
"""Nobody hears of it who has not been a member for so long: a lease, and some."""
HIDDEN = "secret"

Place = tuple[int, int, int]
"""Where a change stands within its partition: generation, ms, seq."""
Frame = tuple[str, str | None, str | None, tuple[tuple[str, Any], ...], int | None, int | None]
"""(type, event, table, key, digest of new, digest of old)"""
Feed = tuple[str, str]
"""("user", name) or ("topic", name)"""


class Violation(NamedTuple):
    kind: str  # loss, double, disorder, leak, phantom, reset, live (of a view), index, stuck
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.who}: {self.what}"


class Written(NamedTuple):
    """A change as the store's stream has it."""

    partition: int
    place: Place
    change: Change


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


# ── what should have come ───────────────────────────────────────────────────────────────────────────────────────────


class Memberships:
    """Who was in which room, and since when: for audiences in other partitions."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, str], list[list[float]]] = {}

    def note(self, room: str, user: str, at_ms: int, *, inside: bool) -> None:
        spans = self._spans.setdefault((room, user), [])
        if inside and (not spans or spans[-1][1] < float("inf")):
            spans.append([at_ms, float("inf")])
        elif not inside and spans:
            spans[-1][1] = min(spans[-1][1], at_ms)

    def throughout(self, room: str, user: str, since: float, until: float) -> bool:
        return any(a <= since and until <= b for a, b in self._spans.get((room, user), ()))

    def at_all(self, room: str, user: str, since: float, until: float) -> bool:
        return any(a <= until and since <= b for a, b in self._spans.get((room, user), ()))


@dataclass
class Expected:
    """By feed and partition, the places in their order, and the frames of each."""

    feeds: dict[Feed, dict[int, dict[Place, Counter[Frame]]]] = field(default_factory=dict)
    written: dict[tuple[int, Place], Written] = field(default_factory=dict)
    memberships: Memberships = field(default_factory=Memberships)

    def put(self, feed: Feed, one: Written, *frames: Frame) -> None:
        places = self.feeds.setdefault(feed, {}).setdefault(one.partition, {})
        places.setdefault(one.place, Counter()).update(frames)


def visible(image: Mapping[str, Any] | None) -> int | None:
    return None if image is None else digest({name: value for name, value in image.items() if name != HIDDEN})


def key_of(key: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(key.items()))


def expect(history: Iterable[Written]) -> Expected:
    """What each feed should hold."""
    expected = Expected()
    members: dict[str, set[str]] = {}
    in_room: dict[str, dict[tuple[str, tuple[tuple[str, Any], ...]], Any]] = {}
    for one in history:
        change = one.change
        expected.written[one.partition, one.place] = one
        if change.event == "SEND":
            frame: Frame = ("message", None, None, (), digest(change.new and change.new["body"]), None)
            expected.put(("user", change.key["user"]), one, frame)
        elif change.table == "members":
            _membership(expected, members, in_room, one)
        elif change.table == "messages":
            room = change.key["room"]
            _tell(expected, one, {("user", user) for user in members.get(room, ())}, None)
            _keep(in_room, room, change)
        elif change.table == "posts":
            room = change.key["room"]
            inside = members.get(room, ())
            _tell(expected, one, *_both(change, lambda item: _of_tenant(inside, item)))  # noqa: B023 - called here
            _keep(in_room, room, change)
        elif change.table == "things":
            _tell(
                expected,
                one,
                *_both(change, lambda item: {("user", item[who]) for who in ("owner", "guest") if who in item}),
            )
        elif change.table == "units":
            _tell(expected, one, *_both(change, lambda item: {("topic", f"cell:{item['cell']}")}))
        elif change.table == "notices":
            _tell(expected, one, *_both(change, lambda item: {("topic", f"tenant:{item['tenant']}")}))
    return expected


def _of_tenant(users: Iterable[str], item: Mapping[str, Any]) -> set[Feed]:
    return {("user", user) for user in users if tenant_of(user) == item["tenant"]}


def _both(change: Change, audience: Any) -> tuple[set[Feed], set[Feed]]:
    return tuple(set() if image is None else audience(image) for image in (change.old, change.new))


def _tell(expected: Expected, one: Written, before: set[Feed], after: set[Feed] | None) -> None:
    change = one.change
    if after is None:
        after = before
    if change.old is None:
        before = after
    if change.new is None:
        after = before
    key, new, old = key_of(change.key), visible(change.new), visible(change.old)
    for feed in before | after:
        if feed in before and feed in after:
            expected.put(feed, one, ("change", change.event, change.table, key, new, old))
        elif feed in after:
            expected.put(feed, one, ("change", "ENTER", change.table, key, new, None))
        else:
            expected.put(feed, one, ("change", "LEAVE", change.table, key, None, None))


def _keep(in_room: dict[str, dict[Any, Any]], room: str, change: Change) -> None:
    items, name = in_room.setdefault(room, {}), (change.table, key_of(change.key))
    if change.new is None:
        items.pop(name, None)
    else:
        items[name] = change.new


def _membership(
    expected: Expected, members: dict[str, set[str]], in_room: dict[str, dict[Any, Any]], one: Written
) -> None:
    change = one.change
    room, user = change.key["room"], change.key["user"]
    before = set(members.get(room, ()))
    after = before | {user} if change.new is not None else before - {user}
    members[room] = after
    feeds = {("user", name) for name in (before if change.new is None else after)}
    _tell(expected, one, feeds, None)
    expected.memberships.note(room, user, change.at, inside=change.new is not None)
    if user in after and user not in before:
        for (table, key), image in in_room.get(room, {}).items():
            if table == "posts" and not _of_tenant([user], image):
                continue
            if (table, key) != ("members", key_of(change.key)):
                expected.put(("user", user), one, ("change", "ENTER", table, key, visible(image), None))
    elif user in before and user not in after:
        for table in ("members", "messages", "posts"):
            expected.put(("user", user), one, ("change", "LEAVE", table, (("room", room),), None, None))
    _keep(in_room, room, change)


# ── what came ───────────────────────────────────────────────────────────────────────────────────────────────────────


def place_of(position: str) -> tuple[int, Place]:
    partition, generation, ms, seq = map(int, position.split("-"))
    return partition, (generation, ms, seq)


def feed_of(reader: ReaderLog, one: Got) -> Feed:
    if one.topic is None:
        return "user", reader.user
    if one.topic.startswith("cell:"):
        return "topic", one.topic
    # The topic of a claim has a name of Tidewire's own, with the value as JSON in it.
    return "topic", "tenant:" + one.topic.rpartition(":")[2].strip('"')


def frame_of(one: Got) -> Frame:
    if one.type == "message":
        return "message", None, None, (), digest(one.body), None
    return one.type, one.event, one.table, one.key, one.new, one.old


class Segment(NamedTuple):
    """What a reader got of a feed between two resets."""

    frames: list[Got]
    since_ms: float
    """All that was written from then on is in it, if it is the last one; until the reset after it, if it is not."""
    is_first: bool
    is_last: bool


def segments(frames: Sequence[Got], connected_ms: float) -> Iterator[Segment]:
    current: list[Got] = []
    since, is_first = connected_ms, True
    for one in frames:
        if one.type == "reset" and one.table is None:
            yield Segment(current, since, is_first, is_last=False)
            current, since, is_first = [], one.at_ms + LATE_MS, False
        elif one.type != "reset":
            current.append(one)
    yield Segment(current, since, is_first, is_last=True)


def check_reader(expected: Expected, reader: ReaderLog, report: Report, *, may_fall_back: bool) -> None:
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
            if not segment.is_first and not may_fall_back:
                report.add("reset", who, "a whole feed was reset, and nothing had gone back")
            _check_segment(expected, feed, who, segment, report, may_fall_back=may_fall_back)


def _check_segment(
    expected: Expected, feed: Feed, who: str, segment: Segment, report: Report, *, may_fall_back: bool
) -> None:
    partitions: dict[int, list[tuple[Place, Frame]]] = {}
    messages: list[Got] = []
    notes: list[tuple[Place, int, Got]] = []
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
        elif one.table == "notes":
            notes.append((place, newest_ms, one))
        else:
            partitions.setdefault(partition, []).append((place, frame_of(one)))
    _check_notes(expected, feed, who, segment, notes, report)
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


def _check_notes(
    expected: Expected, feed: Feed, who: str, segment: Segment, notes: list[tuple[Place, int, Got]], report: Report
) -> None:
    """Of a table whose groups lie elsewhere: who was a member about then."""
    user = feed[1]
    seen: set[tuple[int, Place]] = set()
    last: dict[int, Place] = {}
    for place, newest_ms, one in notes:
        assert one.position
        partition, _ = place_of(one.position)
        change = expected.written[partition, place].change
        if (partition, place) in seen:
            report.add("double", who, f"note {one.key} at {one.position}")
        elif place < last.get(partition, place):
            report.add("disorder", who, f"note {one.key} at {one.position}")
        seen.add((partition, place))
        last[partition] = place
        rooms = {image["room"] for image in (change.old, change.new) if image}
        if not any(expected.memberships.at_all(room, user, newest_ms - LEAK_MS, one.at_ms) for room in rooms):
            report.add("leak", who, f"note {one.key} of {sorted(rooms)} at {one.position}: out of it for long")
        images = {None, visible(change.new), visible(change.old)}
        if one.new not in images or one.old not in images:
            report.add("leak", who, f"note {one.key} at {one.position} has another image than it should")
    if feed[0] != "user" or not segment.is_last:
        return
    for (partition, place), one_written in expected.written.items():
        change = one_written.change
        if change.table != "notes" or place[1] <= segment.since_ms or (partition, place) in seen or change.new is None:
            continue
        room = change.new["room"]
        if expected.memberships.throughout(room, user, place[1] - EVENTUAL_MS, place[1] + EVENTUAL_MS):
            report.add("loss", who, f"note {change.key} of {room} at {place}: a member all the while")


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
    """Two connections of a user are told the same under the same cursor."""
    told: dict[tuple[Feed, str], Frame] = {}
    for reader in readers:
        for one in reader.log:
            if one.cursor is None or one.type == "reset":
                continue
            feed, frame = feed_of(reader, one), frame_of(one)
            if told.setdefault((feed, one.cursor), frame) != frame:
                report.add("disorder", reader.name, f"{one.cursor} of {feed[1]} is another frame elsewhere")


def check_steps(history: Sequence[Written], who: str, steps: Sequence[tuple[Any, str]], report: Report) -> None:
    """No item of a live view goes back, but after it was empty."""
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
