"""Who hears of a change, and what: from changes to entries of feeds. Pure: no I/O, no clock.

The members of each group are kept as their changes pass, so that a change goes to who was a member when it was made.
What is not known yet is named (`Missing`), fetched, and the batch is decided again from the start.

A decision is cut into steps, as a change to 10,000 members takes tens of milliseconds: `deciding` is a generator that
yields between them. It ends early, with fewer changes consumed, when the batch has grown beyond its bounds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import structlog

from tidewire.app import App, Membership, Table
from tidewire.audiences import NO_RECIPIENTS, Knowledge, Recipients, claim_topic, resolve
from tidewire.model.claims import ClaimCondition, both, either, unless
from tidewire.model.records import RECHECK, Change, FeedBody, Id, Item, ItemRecord, Opened, Position, pack
from tidewire.model.values import Scalar
from tidewire.redis.functions import Append, RedisCommand
from tidewire.redis.keys import Home, Keys
from tidewire.visibility import sight

from .route import STEP_FEEDS, Call, Feed, Feeds, Router

log = structlog.get_logger(__name__)

MAX_BATCH_APPENDS = 20_000
MAX_BATCH_BYTES = 8 << 20
"""A batch ends after the change or transaction with which its appends, or the bytes that they write, reach this."""
MAX_REDONE_APPENDS = 2000
"""Appends that are decided again when something is missing for a later change. Beyond, the batch ends before it."""


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
    def __init__(self, *needs: Group | GroupsOf) -> None:
        self.needs = needs


@dataclass
class Decision:
    consumed: int = 0
    """How many of the changes were decided, from the first on."""
    operations: list[RedisCommand] = field(default_factory=list)
    links: dict[Home, list[Call]] = field(default_factory=dict)
    groups: dict[Group, dict[str, Item]] = field(default_factory=dict)
    """The groups that changed, as they are after the batch."""
    failed: int = 0
    """Changes whose audience could not be computed: nobody was told."""


Steps = Generator[None, bool | None, Decision | set[Group | GroupsOf]]
"""Yields between steps. Sent true, it ends after the change or transaction it is at."""


def deciding(
    app: App,
    keys: Keys,
    known: Known,
    partition: int,
    changes: Sequence[tuple[Id, Change | None]],
    feeds: Feeds | None = None,
) -> Steps:
    """Decide a batch of (id, change) in steps. Returns the decision, or what must be known first."""
    batch = _Batch(app, keys, known, feeds or Feeds(keys))
    time_is_up = False
    for end, unit in _units(changes):
        batch.begin()
        for id_, change in unit:
            try:
                for _ in batch.one(Position(partition, change.generation, *id_), change):
                    time_is_up = (yield) or time_is_up
            except Missing as need:
                if batch.router.appends > MAX_REDONE_APPENDS and not batch.has_learned:
                    return batch.done()
                batch.missing.update(need.needs)
        if batch.missing:
            continue  # only to find out what else is missing
        for _ in batch.send():
            time_is_up = (yield) or time_is_up
        batch.decision.consumed = end
        if time_is_up or batch.is_full():
            return batch.done()
    if not batch.missing:
        batch.decision.consumed = len(changes)
    return batch.missing or batch.done()


def decide(
    app: App, keys: Keys, known: Known, partition: int, changes: Sequence[tuple[Id, Change | None]]
) -> Decision | set[Group | GroupsOf]:
    """As `deciding`, all steps at once."""
    steps = deciding(app, keys, known, partition, changes)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Decision | set[Group | GroupsOf] = end.value
            return found


Unit = list[tuple[Id, Change]]
"""The changes of a transaction, or one change that is in none."""


def _units(changes: Sequence[tuple[Id, Change | None]]) -> Iterator[tuple[int, Unit]]:
    """The units of a batch, each with the number of entries up to its end. One that is cut off is a unit as it is."""
    unit: Unit = []
    for end, (id_, change) in enumerate(changes, 1):
        if change is None:
            continue
        if unit and change.transaction != unit[-1][1].transaction:
            yield end - 1, unit
            unit = []
        unit.append((id_, change))
        if not change.more:
            yield end, unit
            unit = []
    if unit:
        yield len(changes), unit


def member_operation(keys: Keys, table: Membership, change: Change) -> RedisCommand:
    """What a membership's change does to the members of its group, as the broadcaster keeps them."""
    group, user = change.key[table.key[0]], change.key[table.key[1]]
    key = keys.members(table.name, group)
    if change.new is None:
        return RedisCommand("HDEL", key, (pack(user),))
    return RedisCommand("HSET", key, (pack(user), pack(change.new)))


def whole(changes: Sequence[tuple[Id, Change | None]]) -> int:
    """How many of the changes make whole transactions. The others wait for the rest of theirs."""
    count = len(changes)
    while count and (last := changes[count - 1][1]) is not None and last.more:
        count -= 1
    return count


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


Told = Sequence[tuple[str, ClaimCondition]]
"""As which events a feed is told of something, and to which connections. No connection meets two of the conditions."""
Heard = dict[Feed, Told]
TYPES = {"message": "message", "reset": "reset", RECHECK: RECHECK}


class _Delivery(NamedTuple):
    """One thing to be told, and to whom."""

    position: Position
    about: _Image | _Plain
    heard: Heard


class _Batch:
    def __init__(self, app: App, keys: Keys, known: Known, feeds: Feeds) -> None:
        self.app = app
        self.keys = keys
        self.known = known
        self.feeds = feeds
        self.decision = Decision()
        self.router = Router(keys)
        self.missing: set[Group | GroupsOf] = set()
        self.deliveries: list[_Delivery] = []
        self.transaction: str | None = None
        self.position: Position | None = None  # of the last change of the unit
        self.has_learned = False  # whether the unit has changed a group

    def begin(self) -> None:
        """A transaction, or a change that is in none."""
        self.deliveries = []
        self.transaction = None
        self.has_learned = False

    def is_full(self) -> bool:
        return self.router.appends >= MAX_BATCH_APPENDS or self.router.size_bytes >= MAX_BATCH_BYTES

    def done(self) -> Decision:
        self.decision.links = self.router.links()
        return self.decision

    def one(self, position: Position, change: Change) -> Iterator[None]:
        self.transaction, self.position = change.transaction, position
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
        if self.missing:
            return
        yield
        image = _Image(table, change.key, change.version, change.new, change.old, change.at, change.by)
        told: Heard = {}
        yield from heard(self.feeds, change.event, table.name, before, after, told)
        self.deliveries.append(_Delivery(position, image, told))
        if isinstance(table, Membership):
            self.show(position, table, change)

    def tell(self, position: Position, about: _Image | _Plain, event: str, users: Iterable[str]) -> None:
        """The same to some users, on all their connections."""
        told = ((event, True),)
        self.deliveries.append(_Delivery(position, about, {self.feeds.user(user): told for user in users}))

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
                self.deliveries.append(_Delivery(position, image, {self.feeds.user(user): told}))
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

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> list[Members]:
        names = [Group(membership, group) for group in groups]
        if missing := [name for name in names if name not in self.known and name not in self.decision.groups]:
            raise Missing(*missing)
        return [self.members(membership, name.group) for name in names]

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.members(membership, group).get(user)

    def any_member(self, membership: str, groups: Iterable[Scalar], user: str) -> bool:
        return any(self.member(membership, group, user) is not None for group in groups)

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
        name = Group(table.name, group)
        # Copied once a batch: the audiences of changes before this one are lists of their own.
        members = self.decision.groups.get(name) or dict(self.members(table.name, group))
        if change.new is None:
            members.pop(user, None)
        else:
            members[user] = change.new
        self.decision.operations.append(member_operation(self.keys, table, change))
        self.decision.groups[name] = members
        self.has_learned = True

    # ── where it goes ───────────────────────────────────────────────────────────────────────────────────────────────

    def send(self) -> Iterator[None]:
        """Route the deliveries since `begin`. A feed gets those of a transaction one after another, all in one call."""
        appends: dict[int, list[Append]] = {}
        in_transaction = self.transaction is not None and len(self.deliveries) > 1
        told = _ToldInTransaction(self.deliveries) if in_transaction else None
        for number, delivery in enumerate(self.deliveries):
            # By body, then by destination: a body is encoded once, however many feeds it goes to.
            bodies: dict[tuple[str, bool, ClaimCondition], dict[int, list[bytes]]] = {}
            for count, (feed, events) in enumerate(delivery.heard.items(), 1):
                if not count % STEP_FEEDS:
                    yield
                for event, more, asks in told(number, feed, events) if told else _at_once(events):
                    destinations = bodies.setdefault((event, more, asks), {})
                    keys = destinations.get(feed.partition)
                    if keys is None:
                        destinations[feed.partition] = [feed.key]
                    else:
                        keys.append(feed.key)
            for (event, more, asks), destinations in sorted(bodies.items(), key=_written):
                body = pack(self.encoded(delivery, event, asks, more=more))
                for destination, keys in destinations.items():
                    append = Append(delivery.position, body, len(body), keys)
                    appends.setdefault(destination, []).append(append)
        assert self.position
        # Also where the last change has no append at a destination: decided again by a new owner, it may have one.
        yield from self.router.add(self.position, appends)

    def encoded(self, delivery: _Delivery, event: str, asks: ClaimCondition, *, more: bool) -> FeedBody:
        kind = TYPES.get(event, "change")
        frame = delivery.about.body(delivery.position, event)
        if self.transaction is not None and kind == "change":
            frame["transaction"] = self.transaction
            if more:
                frame["more"] = True
        return FeedBody(kind, msgspec.json.encode(frame), asks)


def _written(body: tuple[Any, Any]) -> str:
    return repr(body[0])


def _at_once(told: Told) -> Iterator[tuple[str, bool, ClaimCondition]]:
    for event, asks in told:
        yield event, False, asks


class _ToldInTransaction:
    """What a feed is told of a transaction's changes: only the last frame that a connection gets is without `more`.

    Which one that is may depend on the connection's claims. Then there are two entries, and each connection gets one.
    """

    def __init__(self, deliveries: Sequence[_Delivery]) -> None:
        self._later: list[dict[Feed, list[ClaimCondition]]] = []
        """For each delivery and feed: which connections hear more after it; one condition for each event."""
        after: dict[Feed, ClaimCondition] = {}
        for delivery in reversed(deliveries):
            here: dict[Feed, list[ClaimCondition]] = {}
            for feed, told in delivery.heard.items():
                conditions: list[ClaimCondition] = []
                for event, asks in reversed(told):
                    later = after.get(feed, False)
                    conditions.append(later)
                    if event not in TYPES:
                        after[feed] = asks if later is False else either(asks, later)
                here[feed] = conditions[::-1]
            self._later.append(here)
        self._later.reverse()

    def __call__(self, number: int, feed: Feed, told: Told) -> Iterator[tuple[str, bool, ClaimCondition]]:
        """The entries of a feed for one delivery, as (event, `more`, condition)."""
        for (event, asks), later in zip(told, self._later[number][feed], strict=True):
            if event in TYPES:
                yield event, False, asks
                continue
            for more, some in ((True, both(asks, later)), (False, both(asks, unless(later)))):
                if some is not False:
                    yield event, more, some


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

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> Iterable[Members]:
        return self._known.members_of_all(membership, groups)

    def any_member(self, membership: str, groups: Iterable[Scalar], user: str) -> bool:
        return any(self.member(membership, group, user) is not None for group in groups)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return self._known.vacant(membership, group)

    def groups(self, membership: str, user: str) -> Iterable[Scalar]:
        return self._known.groups(membership, user)


def heard(feeds: Feeds, event: str, table: str, before: Recipients, after: Recipients, found: Heard) -> Iterator[None]:
    """Add to `found` what each feed gets to hear. Yields between steps."""
    if before.open is False and after.open is False:
        yield from _heard_by_users(feeds, event, before.users, after.users, found)
    else:
        for count, user in enumerate({**before.users, **after.users}, 1):
            if not count % STEP_FEEDS:
                yield
            if told := variants(event, before.user(user), after.user(user)):
                found[feeds.user(user)] = told
    topics_before, topics_after = ({**one.topics, **open_topics(table, one.open)} for one in (before, after))
    for topic in {**topics_before, **topics_after}:
        # What everybody saw, the followers of a topic saw.
        saw = before.open is True or topics_before.get(topic, False)
        sees = after.open is True or topics_after.get(topic, False)
        if told := variants(event, saw, sees):
            found[feeds.topic(topic)] = told


def _heard_by_users(
    feeds: Feeds, event: str, before: Mapping[str, ClaimCondition], after: Mapping[str, ClaimCondition], found: Heard
) -> Iterator[None]:
    """The same for named users. The usual case is a large group whose members all saw the item and see it."""
    plain = ((event, True),)
    always = event in ("INSERT", "REMOVE")
    if event == "REMOVE":
        after = before
    for count, (user, sees) in enumerate(after.items(), 1):
        if not count % STEP_FEEDS:
            yield
        if sees is True and (always or before.get(user) is True):
            found[feeds.user(user)] = plain
        elif told := variants(event, before.get(user, False), sees):
            found[feeds.user(user)] = told
    if always:
        return
    for count, (user, saw) in enumerate(before.items(), 1):
        if not count % STEP_FEEDS:
            yield
        if user not in after and (told := variants(event, saw, sees=False)):
            found[feeds.user(user)] = told


def open_topics(table: str, condition: ClaimCondition) -> dict[str, ClaimCondition]:
    """The topics that reach every connection that meets the condition, and what they are still to be asked for."""
    if isinstance(condition, bool):
        return {table: True} if condition else {}
    kind, *parts = condition
    if kind == "is":
        return {claim_topic(*parts): True}
    if kind == "all":
        return {topic: both(rest, *parts[1:]) for topic, rest in open_topics(table, parts[0]).items()}
    found: dict[str, ClaimCondition] = {}
    for part in parts:
        for topic, rest in open_topics(table, part).items():
            found[topic] = either(found.get(topic, False), rest)
    return found


def variants(event: str, saw: ClaimCondition, sees: ClaimCondition) -> list[tuple[str, ClaimCondition]]:
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
