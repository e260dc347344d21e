"""Who hears of a change, and what: from changes to entries of feeds. Pure: no I/O, no clock.

The members of each group are kept as their changes pass, so that a change goes to who was a member when it was made.
What is not known yet is named (`Missing`), fetched, and the batch is decided again from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import structlog

from tidewire.app import App, Membership, Table
from tidewire.audiences import NO_RECIPIENTS, Recipients, resolve
from tidewire.functions import Append, Operation
from tidewire.keys import Keys, Scalar
from tidewire.records import Change, FeedBody, Item, Position, pack

log = structlog.get_logger(__name__)

CALL_FEEDS = 2000
CALL_BYTES = 1 << 20
"""A call to a destination carries about so much at the most."""


class Group(NamedTuple):
    """A group whose members must be known."""

    membership: str
    group: Scalar


Members = Mapping[str, Item]


class Missing(Exception):
    def __init__(self, group: Group) -> None:
        self.group = group


@dataclass
class Decision:
    operations: list[Operation] = field(default_factory=list)
    links: dict[bytes, list[list[Append]]] = field(default_factory=dict)
    groups: dict[Group, dict[str, Item]] = field(default_factory=dict)
    """The groups that changed, as they are after the batch."""
    failed: int = 0
    """Changes whose audience could not be computed: nobody was told."""


def decide(
    app: App,
    keys: Keys,
    known: Mapping[Group, Members],
    partition: int,
    generation: int,
    changes: Sequence[tuple[tuple[int, int], Change | None]],
) -> Decision | set[Group]:
    """What a batch of (id, change) comes to, or the groups that must be known first."""
    batch = _Batch(app, keys, known)
    missing: set[Group] = set()
    for unit in _units(changes):
        batch.begin()
        for id_, change in unit:
            try:
                batch.one(Position(partition, generation, *id_), change)
            except Missing as need:
                missing.add(need.group)
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

    def keys(self, keys: Keys) -> tuple[bytes, bytes]:
        return keys.topic_feed(self.name) if self.is_topic else keys.user_feed(self.name)


class _Delivery(NamedTuple):
    """One change, and what each feed gets to hear of it."""

    position: Position
    table: Table
    change: Change
    events: dict[Feed, str]


class _Batch:
    def __init__(self, app: App, keys: Keys, known: Mapping[Group, Members]) -> None:
        self.app = app
        self.keys = keys
        self.known = known
        self.decision = Decision()
        self.calls: dict[bytes, _Calls] = {}
        self.deliveries: list[_Delivery] = []

    def begin(self) -> None:
        """A transaction, or a change that is none."""
        self.deliveries = []

    def done(self) -> Decision:
        self.decision.links = {links: calls.all for links, calls in self.calls.items()}
        return self.decision

    def one(self, position: Position, change: Change) -> None:
        table = self.app.tables.get(change.table)
        if table is None:
            log.warning("change_of_unknown_table", table=change.table, position=str(position))
            self.decision.failed += 1
            return
        before = self.audience(table, change.old)
        if isinstance(table, Membership):
            self.learn(table, change)
        after = self.audience(table, change.new)
        self.deliveries.append(_Delivery(position, table, change, _events(change.event, table.name, before, after)))

    def audience(self, table: Table, image: Item | None) -> Recipients:
        if image is None:
            return NO_RECIPIENTS
        try:
            return resolve(table.readers, image).recipients(image, self)
        except Missing:
            raise
        except Exception as error:  # the application's function: it must not stop the partition
            log.warning("readers_failed", table=table.name, error=repr(error))
            self.decision.failed += 1
            return NO_RECIPIENTS

    # ── what is known of groups ─────────────────────────────────────────────────────────────────────────────────────

    def members(self, membership: str, group: Scalar) -> Members:
        name = Group(membership, group)
        if name in self.decision.groups:
            return self.decision.groups[name]
        if name not in self.known:
            raise Missing(name)
        return self.known[name]

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.members(membership, group).get(user)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return not self.members(membership, group)

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
        last_for: dict[Feed, int] = {}
        for number, delivery in enumerate(self.deliveries):
            last_for |= dict.fromkeys(delivery.events, number)
        appends: dict[int, list[Append]] = {}
        for number, delivery in enumerate(self.deliveries):
            # By body, then by destination: a body is encoded once, however many feeds it goes to.
            bodies: dict[tuple[str, bool], dict[int, list[tuple[bytes, bytes]]]] = {}
            for feed, event in delivery.events.items():
                more = number < last_for[feed]
                destinations = bodies.setdefault((event, more), {})
                destinations.setdefault(self.keys.partition_of(feed.name), []).append(feed.keys(self.keys))
            numbers: dict[int, int] = {}
            for (event, more), destinations in sorted(bodies.items()):
                body = pack(frame_body(delivery.position, event, delivery.table, delivery.change, more=more))
                for destination, targets in destinations.items():
                    for start in range(0, len(targets), CALL_FEEDS):
                        some = targets[start : start + CALL_FEEDS]
                        first = numbers.get(destination, 1)
                        append = Append(delivery.position, first, body, tuple(some))
                        appends.setdefault(destination, []).append(append)
                        numbers[destination] = first + len(some)
        for destination, some_appends in appends.items():
            calls = self.calls.setdefault(self.keys.links(destination), _Calls())
            if len(self.deliveries) > 1:
                calls.add(some_appends)
            else:
                for append in some_appends:
                    calls.add([append])


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


def _events(event: str, table: str, before: Recipients, after: Recipients) -> dict[Feed, str]:
    """What each feed gets to hear, in the order of user names: a decision made again numbers them alike."""
    events: dict[Feed, str] = {}
    for user in sorted(before.users | after.users):
        saw, sees = user in before.users or before.everyone, user in after.users or after.everyone
        if heard := event_for(event, saw=saw, sees=sees):
            events[Feed(user)] = heard
    heard = event_for(event, saw=before.everyone, sees=after.everyone)
    if heard and (before.everyone or after.everyone):
        events[Feed(table, is_topic=True)] = heard
    return events


def event_for(event: str, *, saw: bool, sees: bool) -> str | None:
    """The event as one reader knows it: what becomes visible is entered, what ceases to be is left."""
    if event == "INSERT":
        return event if sees else None
    if event == "REMOVE":
        return event if saw else None
    if saw and sees:
        return event
    return "ENTER" if sees else "LEAVE" if saw else None


def frame_body(position: Position, event: str, table: Table, change: Change, *, more: bool = False) -> FeedBody:
    """The frame without its cursor. Never an image that a reader of this event may not see."""
    frame: dict[str, object] = {
        "position": str(position),
        "event": event,
        "table": change.table,
        "key": change.key,
        "version": change.version,
    }
    new = None if change.new is None else table.visible(change.new, "client")
    old = None if change.old is None else table.visible(change.old, "client")
    if event == "ENTER":
        frame["new"] = new
    elif event != "LEAVE":
        if table.stream_view in ("NEW_IMAGE", "NEW_AND_OLD_IMAGES"):
            frame["new"] = new
        if table.stream_view in ("OLD_IMAGE", "NEW_AND_OLD_IMAGES"):
            frame["old"] = old
    frame |= {"at": change.at, "by": change.by}
    if change.transaction is not None:
        frame["transaction"] = change.transaction
        if more:
            frame["more"] = True
    return FeedBody("change", msgspec.json.encode(frame))
