"""What each reader should have received, computed from the store's history independently. Pure.

The rules here come from the declarations in `app` and `app_next`, and from nothing of Tidewire's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tidewire.model.records import Change

from .images import digest
from .pace import is_watched, tenant_of

HIDDEN = "secret"

Place = tuple[int, int, int]
"""The position of a change within its partition: generation, ms, seq."""
Frame = tuple[str, str | None, str | None, tuple[tuple[str, Any], ...], int | None, int | None]
"""(type, event, table, key, digest of new, digest of old)"""
Feed = tuple[str, str]
"""("user", name) or ("topic", name)"""
Key = tuple[tuple[str, Any], ...]


class Written(NamedTuple):
    """A change as the store's stream has it."""

    partition: int
    place: Place
    change: Change


class Rules(NamedTuple):
    """The tables and topics that a membership opens to its members."""

    group: str
    """The attribute that names the group."""
    shows: tuple[str, ...]
    """Tables in the group's partition that its members read, itself among them when they do."""

    def tells_members(self, table: str) -> bool:
        return table in self.shows


MEMBERSHIPS: dict[str, Rules] = {
    "members": Rules("room", ("members", "messages", "posts", "files", "rows")),
    "crowd": Rules("hall", ("talks",)),
    "flats": Rules("flat", ("flats",)),
    "clubs": Rules("club", ("clubs", "minutes")),
}
SHOWN = {table: name for name, rules in MEMBERSHIPS.items() for table in rules.shows if table not in MEMBERSHIPS}
"""The membership behind each table that the members of a group read exactly."""
OWNED = ("things", "scans")
"""Tables that name their readers in the item."""
TOPICS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "units": lambda item: f"cell:{item['cell']}",
    "notices": lambda item: f"tenant:{item['tenant']}",
    "boards": lambda item: f"flat:{item['flat']}",
}
"""The topic that carries the changes of an item, by table."""
EVENTUAL = ("notes", "drafts", "faces")
"""Tables whose readers depend on groups in other partitions."""


class Memberships:
    """The members of groups over time, for audiences in other partitions."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, str, str], list[list[float]]] = {}
        self._groups: dict[tuple[str, str], set[str]] = {}

    def note(self, membership: str, group: str, user: str, at_ms: int, *, inside: bool) -> None:
        spans = self._spans.setdefault((membership, group, user), [])
        self._groups.setdefault((membership, user), set()).add(group)
        if inside and (not spans or spans[-1][1] < float("inf")):
            spans.append([at_ms, float("inf")])
        elif not inside and spans:
            spans[-1][1] = min(spans[-1][1], at_ms)

    def throughout(self, membership: str, group: str, user: str, since: float, until: float) -> bool:
        return any(a <= since and until <= b for a, b in self._spans.get((membership, group, user), ()))

    def at_all(self, membership: str, group: str, user: str, since: float, until: float) -> bool:
        return any(a <= until and since <= b for a, b in self._spans.get((membership, group, user), ()))

    def shared(self, membership: str, one: str, other: str) -> set[str]:
        """The groups that both have been in, at whatever time."""
        return self._groups.get((membership, one), set()) & self._groups.get((membership, other), set())

    def may_hear(self, change: Change, user: str, since: float, until: float) -> bool:
        """Return whether the user was entitled to a change of an eventual table at any time in the span."""
        return self._entitled(self.at_all, change, (change.old, change.new), user, since, until)

    def must_hear(self, change: Change, user: str, since: float, until: float) -> bool:
        """Return whether the user was entitled to it throughout the span."""
        return self._entitled(self.throughout, change, (change.new,), user, since, until)

    def _entitled(
        self, test: Callable[..., bool], change: Change, images: Iterable[Any], user: str, since: float, until: float
    ) -> bool:
        if change.table != "faces":
            return any(test("members", image["room"], user, since, until) for image in images if image)
        of = change.key["user"]
        return any(
            test("flats", flat, user, since, until) and test("flats", flat, of, since, until)
            for flat in self.shared("flats", user, of)
        )


@dataclass
class Expected:
    """The expected positions in order, by feed and partition, and the frames of each."""

    feeds: dict[Feed, dict[int, dict[Place, Counter[Frame]]]] = field(default_factory=dict)
    written: dict[tuple[int, Place], Written] = field(default_factory=dict)
    memberships: Memberships = field(default_factory=Memberships)

    def put(self, feed: Feed, one: Written, *frames: Frame) -> None:
        places = self.feeds.setdefault(feed, {}).setdefault(one.partition, {})
        places.setdefault(one.place, Counter()).update(frames)


def visible(image: Mapping[str, Any] | None) -> int | None:
    return None if image is None else digest({name: value for name, value in image.items() if name != HIDDEN})


def key_of(key: Mapping[str, Any]) -> Key:
    return tuple(sorted(key.items()))


def expect(history: Iterable[Written]) -> Expected:
    """Return the expected contents of each feed of the watched users."""
    one_by_one = _History()
    for one in history:
        one_by_one.take(one)
    return one_by_one.expected


class _History:
    """The groups and their items as they are after each change."""

    def __init__(self) -> None:
        self.expected = Expected()
        self._members: dict[tuple[str, str], set[str]] = {}
        self._in_group: dict[tuple[str, str], dict[tuple[str, Key], Any]] = {}

    def take(self, one: Written) -> None:
        change = one.change
        self.expected.written[one.partition, one.place] = one
        if change.event == "SEND":
            frame: Frame = ("message", None, None, (), digest(change.new and change.new["body"]), None)
            self.expected.put(("user", change.key["user"]), one, frame)
        elif change.table in MEMBERSHIPS:
            self._membership(one, MEMBERSHIPS[change.table])
        elif change.table in SHOWN:
            self._shown(one, SHOWN[change.table])
        elif change.table in OWNED:
            self._tell(one, *_both(change, _named))
        elif change.table in TOPICS:
            topic = TOPICS[change.table]
            self._tell(one, *_both(change, lambda item: {("topic", topic(item))}))

    def _shown(self, one: Written, membership: str) -> None:
        group = one.change.key[MEMBERSHIPS[membership].group]
        inside = self._members.get((membership, group), set())
        if one.change.table == "posts":
            self._tell(one, *_both(one.change, lambda item: _of_tenant(inside, item)))
        else:
            feeds: set[Feed] = {("user", user) for user in inside}
            self._tell(one, feeds, feeds)
        self._keep(membership, group, one.change)

    def _tell(self, one: Written, before: set[Feed], after: set[Feed]) -> None:
        change = one.change
        if change.old is None:
            before = after
        if change.new is None:
            after = before
        key, new, old = key_of(change.key), visible(change.new), visible(change.old)
        for feed in before | after:
            if feed in before and feed in after:
                self.expected.put(feed, one, ("change", change.event, change.table, key, new, old))
            elif feed in after:
                self.expected.put(feed, one, ("change", "ENTER", change.table, key, new, None))
            else:
                self.expected.put(feed, one, ("change", "LEAVE", change.table, key, None, None))

    def _keep(self, membership: str, group: str, change: Change) -> None:
        items, name = self._in_group.setdefault((membership, group), {}), (change.table, key_of(change.key))
        if change.new is None:
            items.pop(name, None)
        else:
            items[name] = change.new

    def _membership(self, one: Written, rules: Rules) -> None:
        change = one.change
        group, user = change.key[rules.group], change.key["user"]
        if not is_watched(user):
            return
        before = set(self._members.get((change.table, group), ()))
        after = before | {user} if change.new is not None else before - {user}
        self._members[change.table, group] = after
        self.expected.memberships.note(change.table, group, user, change.at, inside=change.new is not None)
        feeds: set[Feed] = {("user", user)}
        if rules.tells_members(change.table):
            feeds = {("user", name) for name in (before if change.new is None else after)}
        self._tell(one, feeds, feeds)
        if user in after and user not in before:
            for (table, key), image in self._in_group.get((change.table, group), {}).items():
                if table == "posts" and not _of_tenant([user], image):
                    continue
                if (table, key) != (change.table, key_of(change.key)):
                    self.expected.put(("user", user), one, ("change", "ENTER", table, key, visible(image), None))
        elif user in before and user not in after:
            for table in rules.shows:
                gone: Frame = ("change", "LEAVE", table, ((rules.group, group),), None, None)
                self.expected.put(("user", user), one, gone)
        if rules.tells_members(change.table):
            self._keep(change.table, group, change)


def _named(item: Mapping[str, Any]) -> set[Feed]:
    return {("user", item[who]) for who in ("owner", "guest") if who in item}


def _of_tenant(users: Iterable[str], item: Mapping[str, Any]) -> set[Feed]:
    return {("user", user) for user in users if tenant_of(user) == item["tenant"]}


def _both(change: Change, audience: Callable[[Mapping[str, Any]], set[Feed]]) -> tuple[set[Feed], set[Feed]]:
    """The audience before a change, and after it."""
    before, after = (set[Feed]() if image is None else audience(image) for image in (change.old, change.new))
    return before, after
