"""Who hears of a change, and what: from changes to entries of feeds. Pure: no I/O, no clock.

The members of each group are kept as their changes pass, so that a change goes to who was a member when it was made.
What is not known yet is named (`Missing`), fetched, and the batch is decided again from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import structlog

from tidewire.app import App, ItemKey, Membership, Table
from tidewire.audiences import NO_RECIPIENTS, Knowledge, Recipients, claim_topic, resolve
from tidewire.claims import Condition, both, either, unless
from tidewire.functions import WHOLE, Append, Operation
from tidewire.keys import Home, Keys, Scalar
from tidewire.records import RECHECK, Change, FeedBody, Item, ItemRecord, Opened, Position, pack
from tidewire.sight import sight

log = structlog.get_logger(__name__)

CALL_FEEDS = 2000
CALL_BYTES = 1 << 20
"""A call to a destination carries about so much at the most."""


# Structs, as named tuples of two kinds are equal when their values are.


class Group(msgspec.Struct, frozen=True, order=True):
    """A group whose members must be known."""

    membership: str
    group: Scalar


class GroupsOf(msgspec.Struct, frozen=True, order=True):
    """A user whose groups must be known."""

    membership: str
    user: str


Members = Mapping[str, Item]
Known = Mapping[Group | GroupsOf, Any]
"""The members of groups, by user, as item; and the groups of users."""


class Missing(Exception):
    def __init__(self, need: Group | GroupsOf) -> None:
        self.need = need


@dataclass
class Decision:
    operations: list[Operation] = field(default_factory=list)
    links: dict[Home, list[list[Append]]] = field(default_factory=dict)
    groups: dict[Group, dict[str, Item]] = field(default_factory=dict)
    """The groups that changed, as they are after the batch."""
    indexed: list[tuple[Membership, ItemKey, bool]] = field(default_factory=list)
    """Membership items that must be in the index of a user's groups, or gone from it, before anybody is told."""
    failed: int = 0
    """Changes whose audience could not be computed: nobody was told."""


def decide(
    app: App,
    keys: Keys,
    known: Known,
    partition: int,
    changes: Sequence[tuple[tuple[int, int], Change | None]],
) -> Decision | set[Group | GroupsOf]:
    """What a batch of (id, change) comes to, or what must be known first."""
    batch = _Batch(app, keys, known)
    missing: set[Group | GroupsOf] = set()
    for unit in _units(changes):
        batch.begin()
        for id_, change in unit:
            try:
                batch.one(Position(partition, change.generation, *id_), change)
            except Missing as need:
                missing.add(need.need)
        batch.send()
    return missing or batch.done()


def _units(changes: Sequence[tuple[tuple[int, int], Change | None]]) -> Iterator[list[tuple[tuple[int, int], Change]]]:
    """The changes of a transaction together, any other alone. One that is not whole is as much as there is of it."""
    unit: list[tuple[tuple[int, int], Change]] = []
    for id_, change in changes:
        if change is None:
            continue
        if unit and change.transaction != unit[-1][1].transaction:
            yield unit
            unit = []
        unit.append((id_, change))
        if not change.more:
            yield unit
            unit = []
    if unit:
        yield unit


def whole(changes: Sequence[tuple[tuple[int, int], Change | None]]) -> int:
    """How many of the changes make whole transactions; the rest waits for what is still to be read of its own."""
    count = len(changes)
    while count and (last := changes[count - 1][1]) is not None and last.more:
        count -= 1
    return count or len(changes)


class Feed(NamedTuple):
    """A user's feed, or a topic's."""

    name: str
    is_topic: bool = False

    def key(self, keys: Keys) -> bytes:
        return keys.topic_feed(self.name) if self.is_topic else keys.user_feed(self.name)


class _Image(NamedTuple):
    """What a frame tells of an item."""

    table: Table
    key: dict[str, Any]
    version: int
    new: Item | None
    old: Item | None
    at: int
    by: str

    def body(self, position: Position, event: str) -> dict[str, Any]:
        """The frame without its cursor. Never an image that a reader of this event may not see."""
        frame: dict[str, Any] = {
            "position": str(position),
            "event": event,
            "table": self.table.name,
            "key": self.key,
            "version": self.version,
        }
        if event == "ENTER":
            frame["new"] = self._visible(self.new)
        elif event != "LEAVE":
            if self.table.stream_view in ("NEW_IMAGE", "NEW_AND_OLD_IMAGES"):
                frame["new"] = self._visible(self.new)
            if self.table.stream_view in ("OLD_IMAGE", "NEW_AND_OLD_IMAGES"):
                frame["old"] = self._visible(self.old)
        frame |= {"at": self.at, "by": self.by}
        return frame

    def _visible(self, image: Item | None) -> Item | None:
        return None if image is None else self.table.visible(image, "client")


class _Plain(NamedTuple):
    """A frame that is about no image; its type is the event it is told as."""

    fields: dict[str, Any]

    def body(self, position: Position, event: str) -> dict[str, Any]:
        return self.fields


Heard = dict[Feed, list[tuple[str, Condition]]]
"""For each feed, as what something is told, and to which connections. No connection meets two of the conditions."""
TYPES = {"message": "message", "reset": "reset", RECHECK: RECHECK}


class _Delivery(NamedTuple):
    """One thing to be told, and to whom."""

    position: Position
    about: _Image | _Plain
    heard: Heard


class _Batch:
    def __init__(self, app: App, keys: Keys, known: Known) -> None:
        self.app = app
        self.keys = keys
        self.known = known
        self.decision = Decision()
        self.calls: dict[Home, _Calls] = {}
        self.deliveries: list[_Delivery] = []
        self.transaction: str | None = None

    def begin(self) -> None:
        """A transaction, or a change that is none."""
        self.deliveries = []
        self.transaction = None

    def done(self) -> Decision:
        self.decision.links = {to: calls.all for to, calls in self.calls.items()}
        return self.decision

    def one(self, position: Position, change: Change) -> None:
        self.transaction = change.transaction
        if change.event == "SEND":
            message = {"from": change.by, "body": change.new and change.new["body"], "at": change.at}
            self.tell(position, _Plain(message), "message", [change.key["user"]])
            return
        table = self.app.tables.get(change.table)
        if table is None:
            log.warning("change_of_unknown_table", table=change.table, position=str(position))
            self.decision.failed += 1
            return
        before = self.audience(table, change.old)
        if isinstance(table, Membership):
            self.learn(table, change)
        after = self.audience(table, change.new)
        image = _Image(table, change.key, change.version, change.new, change.old, change.at, change.by)
        self.deliveries.append(_Delivery(position, image, heard(change.event, table.name, before, after)))
        if isinstance(table, Membership):
            self.show(position, table, change)

    def tell(self, position: Position, about: _Image | _Plain, event: str, users: Iterable[str]) -> None:
        """The same to some users, on all their connections."""
        self.deliveries.append(_Delivery(position, about, {Feed(user): [(event, True)] for user in sorted(users)}))

    def audience(
        self, table: Table, image: Item | None, known: Knowledge | None = None, only: str | None = None
    ) -> Recipients:
        if image is None:
            return NO_RECIPIENTS
        try:
            return resolve(table.readers, image).recipients(image, known or self, only)
        except Missing:
            raise
        except Exception as error:  # the application's function: it must not stop the partition
            log.warning("readers_failed", table=table.name, error=repr(error))
            self.decision.failed += 1
            return NO_RECIPIENTS

    # ── what a membership shows and hides ───────────────────────────────────────────────────────────────────────────

    def show(self, position: Position, membership: Membership, change: Change) -> None:
        """Tell a member what comes into sight with the membership's change, and what goes out of it."""
        group, user = change.key[membership.key[0]], change.key[membership.key[1]]
        if not isinstance(user, str):
            return
        seen = sight(self.app, membership, change.old, change.new)
        opens = {opened[0]: Opened(*opened) for opened in change.opens or ()}
        for table in seen.look:
            self.look(position, table, change, membership, opens.get(table.name, Opened(table.name, [], whole=False)))
        for table in seen.gone:
            image = _Image(table, {table.key[0]: group}, 0, None, None, change.at, change.by)
            self.tell(position, image, "LEAVE", [user])
        for table in seen.anywhere:
            self.tell(position, _Plain({"reason": "too_many", "table": table.name}), "reset", [user])
        others: Iterable[str] = ()
        if seen.peers or seen.peers_topics:
            others = self.members(membership.name, group).keys() - {user}
        for table in seen.peers:
            self.tell(position, _Plain({"reason": "too_many", "table": table.name}), "reset", others)
        if seen.topics:
            self.tell(position, _Plain({}), RECHECK, [user, *(others if seen.peers_topics else ())])
        if seen.peers or seen.peers_topics:
            key = ItemKey(membership.name, group, user)
            self.decision.indexed.append((membership, key, change.new is not None))

    def look(self, position: Position, table: Table, change: Change, membership: Membership, opened: Opened) -> None:
        """Of items that a membership's change may have shown or hidden, tell what it did."""
        group, user = (change.key[name] for name in membership.key)
        was, will = (_AsIf(self, Group(membership.name, group), user, image) for image in (change.old, change.new))
        for raw in opened.records:
            record = ItemRecord(*raw)
            assert record.item is not None
            saw = self.audience(table, record.item, was, user).user(user)
            sees = self.audience(table, record.item, will, user).user(user)
            told = [one for one in variants("MODIFY", saw, sees) if one[0] != "MODIFY"]
            if told:
                key = {name: record.item[name] for name in table.key}
                image = _Image(table, key, record.version, record.item, None, record.at, record.by)
                self.deliveries.append(_Delivery(position, image, {Feed(user): told}))
        if not opened.whole:
            rest = {"reason": "too_many", "table": table.name, "key": {table.key[0]: group}}
            self.tell(position, _Plain(rest), "reset", [user])

    # ── what is known of groups ─────────────────────────────────────────────────────────────────────────────────────

    def members(self, membership: str, group: Scalar) -> Members:
        name = Group(membership, group)
        if name in self.decision.groups:
            return self.decision.groups[name]
        if name not in self.known:
            raise Missing(name)
        members: Members = self.known[name]
        return members

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.members(membership, group).get(user)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return not self.members(membership, group)

    def groups(self, membership: str, user: str) -> Iterable[Scalar]:
        name = GroupsOf(membership, user)
        if name not in self.known:
            raise Missing(name)
        groups: Iterable[Scalar] = self.known[name]
        return groups

    def learn(self, table: Membership, change: Change) -> None:
        """A membership's change: who is in the group from here on."""
        group, user = change.key[table.key[0]], change.key[table.key[1]]
        members = dict(self.members(table.name, group))
        key = self.keys.members(table.name, group)
        if change.new is None:
            members.pop(user, None)
            self.decision.operations.append(Operation("HDEL", key, (pack(user),)))
        else:
            members[user] = change.new
            self.decision.operations.append(Operation("HSET", key, (pack(user), pack(change.new))))
        self.decision.groups[Group(table.name, group)] = members

    # ── where it goes ───────────────────────────────────────────────────────────────────────────────────────────────

    def send(self) -> None:
        """The deliveries since `begin`. A feed gets those of a transaction one after another, all in one call."""
        appends: dict[int, list[Append]] = {}
        to_come = self.to_come()
        for delivery in self.deliveries:
            # By body, then by destination: a body is encoded once, however many feeds it goes to.
            bodies: dict[tuple[str, bool, Condition], dict[int, list[bytes]]] = {}
            for feed, told in delivery.heard.items():
                key = feed.key(self.keys)
                for event, asks in told:
                    for more, some in to_come.split(feed, event, asks):
                        destinations = bodies.setdefault((event, more, some), {})
                        destinations.setdefault(self.keys.partition_of(feed.name), []).append(key)
            for (event, more, asks), destinations in sorted(bodies.items(), key=_written):
                body = pack(self.encoded(delivery, event, asks, more=more))
                for destination, feeds in destinations.items():
                    appends.setdefault(destination, []).append(Append(delivery.position, body, tuple(feeds)))
        for destination, some_appends in appends.items():
            calls = self.calls.setdefault(self.keys.home(destination), _Calls())
            for together in [some_appends] if self.transaction is not None else split(some_appends):
                calls.add(together)

    def to_come(self) -> _ToCome:
        return _ToCome(self.deliveries if self.transaction is not None and len(self.deliveries) > 1 else ())

    def encoded(self, delivery: _Delivery, event: str, asks: Condition, *, more: bool) -> FeedBody:
        kind = TYPES.get(event, "change")
        frame = delivery.about.body(delivery.position, event)
        if self.transaction is not None and kind == "change":
            frame["transaction"] = self.transaction
            if more:
                frame["more"] = True
        return FeedBody(kind, msgspec.json.encode(frame), asks)


def _written(body: tuple[Any, Any]) -> str:
    return repr(body[0])


class _ToCome:
    """What of a transaction each feed has still to hear: only the last frame that a connection gets is without `more`.

    Which one that is may depend on the connection's claims; then there are two entries, of which each gets one.
    """

    def __init__(self, deliveries: Sequence[_Delivery]) -> None:
        self._left: dict[Feed, list[Condition]] = {}
        for delivery in deliveries:
            for feed, told in delivery.heard.items():
                self._left.setdefault(feed, []).extend(asks for event, asks in told if event not in TYPES)

    def split(self, feed: Feed, event: str, asks: Condition) -> list[tuple[bool, Condition]]:
        """The next entry of a feed, as (`more`, condition) of the ones to append."""
        if not self._left or event in TYPES:
            return [(False, asks)]
        left = self._left[feed]
        left.pop(0)
        later = either(*left)
        both_kinds = ((True, both(asks, later)), (False, both(asks, unless(later))))
        return [one for one in both_kinds if one[1] is not False]


class _AsIf:
    """What is known, with one membership item as it was, or will be."""

    def __init__(self, known: Knowledge, group: Group, user: str, item: Item | None) -> None:
        self._known = known
        self._group = group
        self._user = user
        self._item = item

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        if (Group(membership, group), user) == (self._group, self._user):
            return self._item
        return self._known.member(membership, group, user)

    def members(self, membership: str, group: Scalar) -> Members:
        return self._known.members(membership, group)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return self._known.vacant(membership, group)

    def groups(self, membership: str, user: str) -> Iterable[Scalar]:
        return self._known.groups(membership, user)


def split(appends: list[Append]) -> list[list[Append]]:
    """What goes to one destination of one change, for so many feeds at a time, in the order of their keys."""
    if sum(len(append.feeds) for append in appends) <= CALL_FEEDS:
        return [appends]
    feeds = sorted({feed for append in appends for feed in append.feeds})
    found: list[list[Append]] = []
    for start in range(0, len(feeds), CALL_FEEDS):
        some = set(feeds[start : start + CALL_FEEDS])
        upto = WHOLE if start + CALL_FEEDS >= len(feeds) else feeds[start + CALL_FEEDS - 1]
        parts = (append._replace(feeds=tuple(f for f in append.feeds if f in some), upto=upto) for append in appends)
        found.append([part for part in parts if part.feeds])
    return found


class _Calls:
    """Appends for one destination, gathered into calls of about a bounded size. What is added together stays so."""

    def __init__(self) -> None:
        self.all: list[list[Append]] = []
        self.feeds = self.bytes = 0

    def add(self, appends: Sequence[Append]) -> None:
        feeds, size = sum(len(append.feeds) for append in appends), sum(len(append.body) for append in appends)
        self.feeds += feeds
        self.bytes += size
        if not self.all or self.feeds > CALL_FEEDS or self.bytes > CALL_BYTES:
            self.all.append([])
            self.feeds, self.bytes = feeds, size
        self.all[-1] += appends


def heard(event: str, table: str, before: Recipients, after: Recipients) -> Heard:
    """What each feed gets to hear, users by name and then topics."""
    found: Heard = {}
    for user in sorted(before.users.keys() | after.users.keys()):
        if told := variants(event, before.user(user), after.user(user)):
            found[Feed(user)] = told
    topics_before, topics_after = ({**one.topics, **open_topics(table, one.open)} for one in (before, after))
    for topic in sorted(topics_before.keys() | topics_after.keys()):
        # What everybody saw, the followers of a topic saw.
        saw = before.open is True or topics_before.get(topic, False)
        sees = after.open is True or topics_after.get(topic, False)
        if told := variants(event, saw, sees):
            found[Feed(topic, is_topic=True)] = told
    return found


def open_topics(table: str, condition: Condition) -> dict[str, Condition]:
    """The topics that reach every connection that meets the condition, and what they are still to be asked for."""
    if isinstance(condition, bool):
        return {table: True} if condition else {}
    kind, *parts = condition
    if kind == "is":
        return {claim_topic(*parts): True}
    if kind == "all":
        return {topic: both(rest, *parts[1:]) for topic, rest in open_topics(table, parts[0]).items()}
    found: dict[str, Condition] = {}
    for part in parts:
        for topic, rest in open_topics(table, part).items():
            found[topic] = either(found.get(topic, False), rest)
    return found


def variants(event: str, saw: Condition, sees: Condition) -> list[tuple[str, Condition]]:
    """A change as its readers know it: what becomes visible is entered, what ceases to be is left."""
    if saw is True and sees is True:
        return [(event, True)]
    if event == "INSERT":
        told = [(event, sees)]
    elif event == "REMOVE":
        told = [(event, saw)]
    else:
        told = [
            (event, both(saw, sees)),
            ("ENTER", both(sees, unless(saw))),
            ("LEAVE", both(saw, unless(sees))),
        ]
    return [one for one in told if one[1] is not False]
