"""Decides a batch of changes: which feeds receive which entries. No I/O.

The broadcaster keeps the members of each group up to date as membership changes pass. So a change goes to the users who
were members when it was made. Facts that are missing (`UnknownGroups`) are fetched, and the batch is decided again.

A change to 10,000 members takes tens of milliseconds, so a decision is cut into steps: `deciding` is a generator that
yields between them. It ends early, with fewer changes consumed, when the batch exceeds its bounds.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import structlog

from tidewire.app import App, Membership, Table
from tidewire.audiences import NO_RECIPIENTS, Knowledge, Recipients, resolve
from tidewire.errors import told
from tidewire.model.claims import ClaimCondition
from tidewire.model.records import RECHECK, Change, FeedBody, Id, Item, ItemRecord, Opened, Position, pack
from tidewire.model.values import Scalar
from tidewire.redis.functions import Append, RedisCommand
from tidewire.redis.keys import Home, Keys
from tidewire.visibility import visibility

from .events import PLAIN_TYPES, EventsByFeed, TransactionEvents, events_by_feed, events_of, single_events
from .frames import ItemFrame, PlainFrame
from .route import STEP_FEEDS, Destinations, LinkCall, Router

log = structlog.get_logger(__name__)

MAX_BATCH_APPENDS = 20_000
MAX_BATCH_BYTES = 8 << 20
"""Maximum appends of a batch, and bytes that they write. It ends after the change or transaction that reaches one."""
MAX_REDONE_APPENDS = 2000
"""Maximum appends that are decided again because a later change lacks a fact.

Beyond it, the batch ends before the transaction of that change, unless that has changed a group.
"""


# Structs, because named tuples of two classes are equal if their values are.


class Group(msgspec.Struct, frozen=True, order=True):
    """A group whose members must be known."""

    membership: str
    group: Scalar


class GroupsOf(msgspec.Struct, frozen=True, order=True):
    """A user whose groups must be known."""

    membership: str
    user: str


GroupMembers = Mapping[str, Item]
GroupFacts = Mapping[Group | GroupsOf, Any]
"""The members of groups, by user, as item; and the groups of users."""


class UnknownGroups(Exception):
    """Groups that must be known before a change can be decided."""

    def __init__(self, *needs: Group | GroupsOf) -> None:
        self.needs = needs


@dataclass
class Routing:
    """The effects of a batch: appends to feeds, and commands to commit."""

    consumed: int = 0
    """Number of changes that were decided, from the first on."""
    operations: list[RedisCommand] = field(default_factory=list)
    links: dict[Home, list[LinkCall]] = field(default_factory=dict)
    groups: dict[Group, dict[str, Item]] = field(default_factory=dict)
    """Groups that changed, as they are after the batch."""
    failed: int = 0
    """Evaluations of `readers` that failed. Such an audience counts as empty."""


Steps = Generator[None, bool | None, Routing | set[Group | GroupsOf]]
"""Yields between steps. If it is sent true, it ends after the current change or transaction."""


def deciding(
    app: App,
    keys: Keys,
    known: GroupFacts,
    partition: int,
    changes: Sequence[tuple[Id, Change | None]],
    feeds: Destinations | None = None,
) -> Steps:
    """Decide a batch of (id, change) in steps. Returns the decision, or the facts that it lacks."""
    builder = _RoutingBuilder(app, keys, known, feeds or Destinations(keys))
    time_is_up = False
    for end, unit in _units(changes):
        builder.begin()
        for id_, change in unit:
            try:
                for _ in builder.decide_change(Position(partition, change.generation, *id_), change):
                    time_is_up = (yield) or time_is_up
            except UnknownGroups as need:
                if builder.router.appends > MAX_REDONE_APPENDS and not builder.has_learned:
                    return builder.done()
                builder.missing.update(need.needs)
        if builder.missing:
            continue  # only find out which other facts are missing
        for _ in builder.route():
            time_is_up = (yield) or time_is_up
        builder.decision.consumed = end
        if time_is_up or builder.is_full():
            return builder.done()
    if not builder.missing:
        builder.decision.consumed = len(changes)
    return builder.missing or builder.done()


ChangeUnit = list[tuple[Id, Change]]
"""The changes of one transaction, or one change that belongs to none."""


def _units(changes: Sequence[tuple[Id, Change | None]]) -> Iterator[tuple[int, ChangeUnit]]:
    """Yield the units of a batch, each with the number of entries up to its end. The last one may be incomplete."""
    unit: ChangeUnit = []
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
    """Return the command that applies a membership's change to the members of its group, as the broadcaster keeps
    them."""
    group, user = change.key[table.key[0]], change.key[table.key[1]]
    key = keys.members(table.name, group)
    if change.new is None:
        return RedisCommand("HDEL", key, (pack(user),))
    return RedisCommand("HSET", key, (pack(user), pack(change.new)))


def whole(changes: Sequence[tuple[Id, Change | None]]) -> int:
    """Return how many of the changes form whole transactions. The others wait for the rest of theirs."""
    count = len(changes)
    while count and (last := changes[count - 1][1]) is not None and last.more:
        count -= 1
    return count


class _Delivery(NamedTuple):
    """One frame, and the events by which each feed receives it."""

    position: Position
    frame: ItemFrame | PlainFrame
    events: EventsByFeed


class _RoutingBuilder:
    def __init__(self, app: App, keys: Keys, known: GroupFacts, feeds: Destinations) -> None:
        self.app = app
        self.keys = keys
        self.known = known
        self.feeds = feeds
        self.decision = Routing()
        self.router = Router(keys)
        self.missing: set[Group | GroupsOf] = set()
        self.deliveries: list[_Delivery] = []
        self.transaction: str | None = None
        self.position: Position | None = None  # of the last change of the unit
        self.has_learned = False  # whether the unit has changed a group

    def begin(self) -> None:
        """Begin a unit."""
        self.deliveries = []
        self.transaction = None
        self.has_learned = False

    def is_full(self) -> bool:
        return self.router.appends >= MAX_BATCH_APPENDS or self.router.size_bytes >= MAX_BATCH_BYTES

    def done(self) -> Routing:
        self.decision.links = self.router.links()
        return self.decision

    def decide_change(self, position: Position, change: Change) -> Iterator[None]:
        self.transaction, self.position = change.transaction, position
        if change.event == "SEND":
            message = {"from": change.by, "body": change.new and change.new["body"], "at": change.at}
            self.tell(position, PlainFrame(message), "message", [change.key["user"]])
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
        image = ItemFrame(table, change.key, change.version, change.new, change.old, change.at, change.by)
        events: EventsByFeed = {}
        yield from events_by_feed(self.feeds, change.event, table.name, before, after, events)
        self.deliveries.append(_Delivery(position, image, events))
        if isinstance(table, Membership):
            self.show(position, table, change)

    def tell(self, position: Position, frame: ItemFrame | PlainFrame, event: str, users: Iterable[str]) -> None:
        """Deliver one event to users, on all their connections."""
        events = ((event, True),)
        self.deliveries.append(_Delivery(position, frame, {self.feeds.user(user): events for user in users}))

    def audience(
        self, table: Table, image: Item | None, known: Knowledge | None = None, only: str | None = None
    ) -> Recipients:
        if image is None:
            return NO_RECIPIENTS
        try:
            return resolve(table.readers, image).recipients(image, known or self, only)
        except UnknownGroups:
            raise
        except Exception as error:  # a fault of the application must not stop the partition
            log.warning("readers_failed", table=table.name, error=told(error))
            self.decision.failed += 1
            return NO_RECIPIENTS

    # ── what a membership shows and hides ───────────────────────────────────────────────────────────────────────────

    def show(self, position: Position, membership: Membership, change: Change) -> None:
        """Deliver to a member which items a membership's change shows and hides."""
        group, user = change.key[membership.key[0]], change.key[membership.key[1]]
        if not isinstance(user, str):
            return
        view = visibility(self.app, membership, change.old, change.new)
        opens = {opened[0]: Opened(*opened) for opened in change.opens or ()}
        for table in view.compare:
            self.compare(
                position, table, change, membership, opens.get(table.name, Opened(table.name, [], whole=False))
            )
        for table in view.hidden:
            image = ItemFrame(table, {table.key[0]: group}, 0, None, None, change.at, change.by)
            self.tell(position, image, "LEAVE", [user])
        for table in view.anywhere:
            self.tell(position, PlainFrame({"reason": "too_many", "table": table.name}), "reset", [user])
        others: Iterable[str] = ()
        if view.peers or view.peers_topics:
            others = self.members(membership.name, group).keys() - {user}
        for table in view.peers:
            self.tell(position, PlainFrame({"reason": "too_many", "table": table.name}), "reset", others)
        if view.topics:
            self.tell(position, PlainFrame({}), RECHECK, [user, *(others if view.peers_topics else ())])

    def compare(self, position: Position, table: Table, change: Change, membership: Membership, opened: Opened) -> None:
        """Compare, for items that the change may show or hide, whether the member saw them before and sees them now."""
        group, user = (change.key[name] for name in membership.key)
        was, will = (_AsIf(self, Group(membership.name, group), user, image) for image in (change.old, change.new))
        for raw in opened.records:
            record = ItemRecord(*raw)
            assert record.item is not None
            saw = self.audience(table, record.item, was, user).user(user)
            sees = self.audience(table, record.item, will, user).user(user)
            events = [(event, asks) for event, asks in events_of("MODIFY", saw, sees) if event != "MODIFY"]
            if events:
                key = {name: record.item[name] for name in table.key}
                image = ItemFrame(table, key, record.version, record.item, None, record.at, record.by)
                self.deliveries.append(_Delivery(position, image, {self.feeds.user(user): events}))
        if not opened.whole:
            rest = {"reason": "too_many", "table": table.name, "key": {table.key[0]: group}}
            self.tell(position, PlainFrame(rest), "reset", [user])

    # ── what is known of groups ─────────────────────────────────────────────────────────────────────────────────────

    def members(self, membership: str, group: Scalar) -> GroupMembers:
        name = Group(membership, group)
        if name in self.decision.groups:
            return self.decision.groups[name]
        if name not in self.known:
            raise UnknownGroups(name)
        members: GroupMembers = self.known[name]
        return members

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> list[GroupMembers]:
        names = [Group(membership, group) for group in groups]
        if missing := [name for name in names if name not in self.known and name not in self.decision.groups]:
            raise UnknownGroups(*missing)
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
            raise UnknownGroups(name)
        groups: Iterable[Scalar] = self.known[name]
        return groups

    def learn(self, table: Membership, change: Change) -> None:
        """Apply a membership's change to the members of its group."""
        group, user = change.key[table.key[0]], change.key[table.key[1]]
        name = Group(table.name, group)
        # Copied once a batch. The audiences of earlier changes have been computed, and hold no reference to it.
        members = self.decision.groups.get(name) or dict(self.members(table.name, group))
        if change.new is None:
            members.pop(user, None)
        else:
            members[user] = change.new
        self.decision.operations.append(member_operation(self.keys, table, change))
        self.decision.groups[name] = members
        self.has_learned = True

    # ── where it goes ───────────────────────────────────────────────────────────────────────────────────────────────

    def route(self) -> Iterator[None]:
        """Route the deliveries of the unit. A feed gets those of a transaction one after another, in one call."""
        appends: dict[int, list[Append]] = {}
        in_transaction = self.transaction is not None and len(self.deliveries) > 1
        of_transaction = TransactionEvents([one.events for one in self.deliveries]) if in_transaction else None
        for number, delivery in enumerate(self.deliveries):
            # By body, then by destination partition. A body is encoded once, however many feeds receive it.
            bodies: dict[tuple[str, bool, ClaimCondition], dict[int, list[bytes]]] = {}
            for count, (feed, events) in enumerate(delivery.events.items(), 1):
                if not count % STEP_FEEDS:
                    yield
                for event, more, asks in (
                    of_transaction(number, feed, events) if of_transaction else single_events(events)
                ):
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
        # The unit ends at its last change also at destinations where that change has no append. If a new owner decides
        # the unit again, it may have one there.
        yield from self.router.add(self.position, appends)

    def encoded(self, delivery: _Delivery, event: str, asks: ClaimCondition, *, more: bool) -> FeedBody:
        kind = PLAIN_TYPES.get(event, "change")
        frame = delivery.frame.body(delivery.position, event)
        if self.transaction is not None and kind == "change":
            frame["transaction"] = self.transaction
            if more:
                frame["more"] = True
        return FeedBody(kind, msgspec.json.encode(frame), asks)


def _written(body: tuple[Any, Any]) -> str:
    return repr(body[0])


class _AsIf:
    """Known groups, with one membership item as it was before, or is after, a change."""

    def __init__(self, known: Knowledge, group: Group, user: str, item: Item | None) -> None:
        self._known = known
        self._group = group
        self._user = user
        self._item = item

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        if (Group(membership, group), user) == (self._group, self._user):
            return self._item
        return self._known.member(membership, group, user)

    def members(self, membership: str, group: Scalar) -> GroupMembers:
        return self._known.members(membership, group)

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> Iterable[GroupMembers]:
        return self._known.members_of_all(membership, groups)

    def any_member(self, membership: str, groups: Iterable[Scalar], user: str) -> bool:
        return any(self.member(membership, group, user) is not None for group in groups)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return self._known.vacant(membership, group)

    def groups(self, membership: str, user: str) -> Iterable[Scalar]:
        return self._known.groups(membership, user)
