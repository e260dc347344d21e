"""One partition as it stands after what was decided so far: what is known of it, and what will be written to it. Pure.

What is not known is named (`Missing`), fetched, and everything is decided again from the start: so the same code says
what must be fetched and what is to be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import structlog

from tidewire.app import BY_MEMBER, CONNECTIONS, App, Membership, Table
from tidewire.errors import BadRequest, RequestError, TooLarge
from tidewire.model.records import Change, Item, ItemRecord, Opened, pack
from tidewire.model.values import ItemKey, Scalar, name_of
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import Keys
from tidewire.visibility import sight

from .budget import Account
from .facts import CountFact, Fact, ItemFact, KindFact, Page, PageFact, Value

log = structlog.get_logger(__name__)

MAX_PLAUSIBLE_EXPIRY_S = 10**11
"""Largest expiry, in seconds since 1970, that is no mistake: the year 5138. Milliseconds of today are above it."""
_warned_of_ms: set[str] = set()
"""Tables with an expiry beyond it: this process warns once for each."""
MAX_GROUPS = 1000
"""Of one user, as far as who shares a group with whom is asked."""
OPENED_ITEMS = 100
OPENED_BYTES = 65536
"""A membership's change carries at most so much of what its member may gain or lose sight of."""


class Missing(Exception):
    """These facts must be fetched before a command can be decided."""

    def __init__(self, facts: Iterable[Fact], *, expensive: bool = False) -> None:
        self.facts = set(facts)
        self.expensive = expensive
        """Whether the command has proven too expensive for the partition's serial path."""


class Gaps:
    """A context manager for steps that do not depend on each other: collects what they miss, to ask for it at once.

    When a step fails after another one missed a fact, the failure may be due to that: then the facts come first.
    """

    def __init__(self) -> None:
        self._facts: set[Fact] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if isinstance(error, Missing):
            self._facts |= error.facts
            return True
        if isinstance(error, RequestError):
            self.close()
        return False

    def close(self) -> None:
        """Raises Missing if any step missed a fact."""
        if self._facts:
            raise Missing(self._facts) from None


@dataclass(frozen=True)
class Situation:
    """Where and when a batch is decided."""

    partition: int
    generation: int
    now: int  # ms since 1970, the server's
    last: tuple[int, int]  # id of the partition's last change
    item_bytes: int  # most bytes of an item as JSON; 0: no limit
    floor: int = 0  # no item begins with a version at or below it
    kinds: Mapping[str, str] = field(default_factory=dict)  # of sort keys, as far as they are known: "s" or "n"
    asked: Mapping[str, int] = field(default_factory=dict)  # by gateway: its last command, as far as that is known
    expire: bool = False  # it is time to look for expired items
    keep_since: tuple[int, int] | None = None  # it is time to trim what is older than this change id…
    keep_changes: int = 0  # … and what is beyond so many; 0: no limit
    keep_bytes: int = 0  # … and what is beyond this memory, in bytes; 0: no limit
    waited_ms: int = 0  # how long ago `now` was
    full: str | None = None  # why nothing may be written that makes Redis hold more


class Author(NamedTuple):
    """Who writes, as the change tells it."""

    user: str
    connection: str | None = None
    request: str | None = None
    trace: str | None = None


EXPIRY = Author("tidewire:expiry")


@dataclass
class Effects:
    """What one command would do; nothing of it counts until it succeeds."""

    items: dict[ItemKey, ItemRecord] = field(default_factory=dict)
    changes: list[tuple[tuple[int, int], Change]] = field(default_factory=list)
    operations: list[RedisCommand] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)  # of sort keys, by table, where these writes settle them


class View:
    """Facts, over them what earlier commands of the batch wrote, and over that what the present one would write."""

    def __init__(self, app: App, keys: Keys, facts: dict[Fact, Value], situation: Situation) -> None:
        self.app = app
        self.keys = keys
        self.situation = situation
        self.last = situation.last
        self.written: dict[ItemKey, ItemRecord] = {}
        self.effects = Effects()
        self.open_items = True  # whether memberships carry what they open, or tell their members to query
        self._place = f"{situation.partition}-{situation.generation}"  # how each Position of it begins
        self._facts = facts
        self.account = Account()  # of the present command
        self.settled: dict[str, str] = {}  # kinds of sort keys, by table, that this batch settles
        self.appended = 0  # changes of the batch so far
        self._counted: dict[tuple[str, Scalar], int] = {}  # items more or fewer than the facts say

    # ── what is known ───────────────────────────────────────────────────────────────────────────────────────────────

    def know(self, fact: Fact) -> Any:
        try:
            return self._facts[fact]
        except KeyError:
            raise Missing((fact,)) from None

    def need(self, facts: Iterable[Fact]) -> None:
        """Raises Missing with all that is not known yet: one round of fetching instead of several."""
        missing = [
            fact
            for fact in facts
            if fact not in self._facts and not (isinstance(fact, ItemFact) and fact.key in self.written)
        ]
        if missing:
            raise Missing(missing)

    def record(self, key: ItemKey) -> ItemRecord | None:
        if key in self.effects.items:
            return self.effects.items[key]
        if key in self.written:
            return self.written[key]
        record: ItemRecord | None = self.know(ItemFact(key))
        return record

    def alive(self, table: Table, record: ItemRecord | None) -> Item | None:
        """The item, unless it was deleted or its time has come."""
        if record is None or record.item is None:
            return None
        return None if table.expires and table.is_expired(record.item, self.situation.now) else record.item

    def item(self, table: Table, key: ItemKey) -> Item | None:
        return self.alive(table, self.record(key))

    # `Knowledge`, for the audiences: memberships are tables, so that the same facts serve. A group that lies in another
    # partition is seen as it is now.

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.item(self.app[membership], ItemKey(membership, group, user))

    def members(self, membership: str, group: Scalar) -> dict[str, Item]:
        raise NotImplementedError("the store asks of one user at a time")

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> list[dict[str, Item]]:
        raise NotImplementedError("the store asks of one user at a time")

    def any_member(self, membership: str, groups: Iterable[Scalar], user: str) -> bool:
        table = self.app[membership]
        keys = [ItemKey(membership, group, user) for group in groups]
        self.need(ItemFact(key) for key in keys)  # all at once
        return any(self.item(table, key) is not None for key in keys)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return self.count(membership, group) <= 0

    def count(self, table: str, partition: Scalar) -> int:
        """Return the number of live items of a partition-key value in a sorted table, with this batch's writes."""
        count: int = self.know(CountFact(table, partition))
        count += self._counted.get((table, partition), 0)
        for key in self.effects.items:
            if (key.table, key.partition) == (table, partition):
                count += self._grown(key)
        return count

    def groups(self, membership: str, user: str) -> list[Scalar]:
        table = self.app[membership]
        order, items = self.keys.index(membership, table.index(BY_MEMBER), user)[::-1]
        page: Page = self.know(PageFact(order, items, b"-", b"+", MAX_GROUPS, reverse=False))
        return [table.key_of(record.item).partition for record in page.records if record.item is not None]

    def _grown(self, key: ItemKey) -> int:
        before = self.written.get(key) if key in self.written else self.know(ItemFact(key))
        after = self.effects.items[key]
        return int(after.item is not None) - int(before is not None and before.item is not None)

    # ── what will be written ────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, account: Account | None = None) -> None:
        """Forget what the command before would have done; from now on, costs go to this account."""
        self.effects = Effects()
        self.account = account or self.account

    def accept(self) -> Effects:
        """What the present command would do is done: the next ones see it."""
        done = self.effects
        for key in done.items:
            group = (key.table, key.partition)
            self._counted[group] = self._counted.get(group, 0) + self._grown(key)
        self.written |= done.items
        self.settled |= done.kinds
        self.appended += len(done.changes)
        if done.changes:
            self.last = done.changes[-1][0]
        self.effects = Effects()
        return done

    def write(self, author: Author, table: Table, key: ItemKey, new: Item | None) -> tuple[int, str]:
        """One item's change, with all that is kept beside the item; (version, position). Nothing, if nothing changes.

        An item whose time has come has its REMOVE first. Raises TooLarge, or BadRequest for a sort key of a kind that
        the table does not have.
        """
        record = self.record(key)
        if record and record.item is not None and author is not EXPIRY and self.alive(table, record) is None:
            self.write(EXPIRY, table, key, None)
            record = self.record(key)
        old = record.item if record else None
        version = record.version if record else self.situation.floor
        if (new is None and old is None) or (new is not None and old is not None and same(old, new)):
            return version, self.position(self.last_id)
        if new is not None:
            self._check_size(new)
            if old is None and key.sort is not None:
                self._check_kind(table, key.sort)
        version += 1
        event = "REMOVE" if new is None else "INSERT" if old is None else "MODIFY"
        id_, now = self._next_id(), self.situation.now
        change = Change(
            event,
            table.name,
            table.key_object(key),
            version,
            new,
            old,
            now,
            author.user,
            author.connection,
            author.request,
            trace=author.trace,
            generation=self.situation.generation,
            previous=self.last_id,
            opens=self._opens(table, key, old, new) if isinstance(table, Membership) else None,
        )
        written = ItemRecord(version, now, author.user, new)
        packed = pack(written)
        self.account.add_bytes(len(packed))
        self.effects.changes.append((id_, change))
        self.effects.items[key] = written
        self.effects.operations.append(
            RedisCommand("HSET", self.keys.items(key.table, key.partition), (key.field, packed))
        )
        if isinstance(table, Membership):
            self._keep_group(table, key, old, new, id_)
        if event != "MODIFY":
            self._keep_order(table, key, record, id_, live=new is not None)
        if table.expires:
            self._keep_expiry(table, key, old, new)
        if table.name == CONNECTIONS:
            self._keep_connection(key, old, new)
        return version, self.position(id_)

    def send(self, author: Author, user: str, body: Any) -> None:
        """A message to a user: a change of no table, which has that user as its audience."""
        id_, now = self._next_id(), self.situation.now
        change = Change(
            "SEND",
            "",
            {"user": user},
            0,
            {"body": body},
            None,
            now,
            *author[:3],
            trace=author.trace,
            generation=self.situation.generation,
            previous=self.last_id,
        )
        self.effects.changes.append((id_, change))

    def _opens(self, membership: Membership, key: ItemKey, old: Item | None, new: Item | None) -> list[Opened] | None:
        """The items that the member may gain or lose sight of, as they are now."""
        found: list[Opened] = []
        gaps = Gaps()
        for table in sight(self.app, membership, old, new).look:
            with gaps:
                found.append(self._opened(table, key))
        gaps.close()
        return found or None

    def _opened(self, table: Table, membership: ItemKey) -> Opened:
        group = membership.partition
        if not self.open_items:
            return Opened(table.name, [], whole=False)
        records: dict[ItemKey, ItemRecord | None] = {}
        more = False
        if table.sorted:
            order, items = self.keys.order(table.name, group), self.keys.items(table.name, group)
            page: Page = self.know(
                PageFact(order, items, b"-", b"+", OPENED_ITEMS, reverse=True, size_bytes=OPENED_BYTES)
            )
            records = {table.key_of(record.item): record for record in page.records if record.item is not None}
            more = page.more
            for written in (self.written, self.effects.items):
                records |= {
                    key: record for key, record in written.items() if (key.table, key.partition) == (table.name, group)
                }
        else:
            only = ItemKey(table.name, group, None)
            records = {only: self.record(only)}
        records.pop(membership, None)
        alive = [(key, record) for key, record in records.items() if record and self.alive(table, record) is not None]
        alive.sort(key=lambda one: one[0].field, reverse=True)
        kept: list[ItemRecord] = []
        size_bytes = 0
        for _, record in alive:
            size_bytes += len(pack(record))
            if len(kept) == OPENED_ITEMS or size_bytes > OPENED_BYTES:
                more = True
                break
            kept.append(record)
        return Opened(table.name, kept, whole=not more)

    def _keep_order(
        self, table: Table, key: ItemKey, record: ItemRecord | None, id_: tuple[int, int], *, live: bool
    ) -> None:
        """Which items there are, in order; which values; and which versions are remembered."""
        operations, partition = self.effects.operations, self.situation.partition
        if table.sorted:
            order = self.keys.order(key.table, key.partition)
            operations.append(
                RedisCommand("ZADD", order, ("0", key.field)) if live else RedisCommand("ZREM", order, (key.field,))
            )
        if not live:
            # A connection's id never comes again: nobody will ask for its version.
            since = 0 if table.name == CONNECTIONS else id_[0]
            operations.append(RedisCommand("ZADD", self.keys.tombstones(partition), (since, member_of(key))))
        elif record is None:
            operations.append(
                RedisCommand("ZADD", self.keys.values(partition, table.name), ("0", name_of(key.partition)))
            )
        else:
            operations.append(RedisCommand("ZREM", self.keys.tombstones(partition), (member_of(key),)))

    def _keep_group(
        self, table: Membership, key: ItemKey, old: Item | None, new: Item | None, id_: tuple[int, int]
    ) -> None:
        """Note the group's version, and have gateways look at once at what the member may no longer follow."""
        situation, keys = self.situation, self.keys
        version = b"%d-%d-%d" % (situation.generation, *id_)
        field = keys.group_field(table.name, key.partition)
        self.effects.operations.append(RedisCommand("HSET", keys.group_versions(situation.partition), (field, version)))
        if sight(self.app, table, old, new).topics:
            channel = keys.rechecks(situation.partition)
            self.effects.operations.append(RedisCommand("SPUBLISH", channel, (str(key.sort),)))

    def _keep_expiry(self, table: Table, key: ItemKey, old: Item | None, new: Item | None) -> None:
        before, after = (expiry_of(table, image) for image in (old, new))
        if before == after:
            return
        self.effects.operations.append(keep_expiry(self.keys.expiries(self.situation.partition), key, after))

    def _keep_connection(self, key: ItemKey, old: Item | None, new: Item | None) -> None:
        """Beside a connection's item, by gateway: what must be removed when the gateway dies."""
        if old is not None:
            self.forget_connection(str(old.get("gateway")), key)
        if new is not None:
            connected = self.keys.connected(self.situation.partition, str(new.get("gateway")))
            self.effects.operations.append(RedisCommand("SADD", connected, (pack((key.partition, key.sort)),)))

    def forget_connection(self, gateway: str, key: ItemKey) -> None:
        connected = self.keys.connected(self.situation.partition, gateway)
        self.effects.operations.append(RedisCommand("SREM", connected, (pack((key.partition, key.sort)),)))

    def _check_size(self, item: Item) -> None:
        limit = self.situation.item_bytes
        size = len(msgspec.json.encode(item)) if limit else 0
        if size > limit:
            raise TooLarge(f"the item has {size} bytes as JSON; at most {limit} are allowed", limit=limit, size=size)

    def _check_kind(self, table: Table, sort: Scalar) -> None:
        """Within a table, sort keys are of one kind: that of the first one."""
        kind = "s" if isinstance(sort, str) else "n"
        known: str | None = (
            self.effects.kinds.get(table.name)
            or self.settled.get(table.name)
            or self.situation.kinds.get(table.name)
            or self.know(KindFact(table.name))
        )
        if known is None:
            known = self.effects.kinds[table.name] = kind
        if known != kind:
            names = {"s": "string", "n": "number"}
            raise BadRequest(
                f"key attribute {table.key[1]!r} of table {table.name!r} must be a {names[known]}, "
                f"as that of its first item; this one is a {names[kind]}"
            )

    # ── positions ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def last_id(self) -> tuple[int, int]:
        return self.effects.changes[-1][0] if self.effects.changes else self.last

    def _next_id(self) -> tuple[int, int]:
        ms, seq = self.last_id
        return (self.situation.now, 0) if self.situation.now > ms else (ms, seq + 1)

    def position(self, id_: tuple[int, int]) -> str:
        return f"{self._place}-{id_[0]}-{id_[1]}"


def member_of(key: ItemKey) -> bytes:
    """An item's key in the sets of a partition."""
    return pack([key.table, key.partition, key.sort])


def keep_expiry(expiries: bytes, key: ItemKey, at: float | None) -> RedisCommand:
    """Note among those that expire when this one does."""
    member = member_of(key)
    return (
        RedisCommand("ZREM", expiries, (member,)) if at is None else RedisCommand("ZADD", expiries, (repr(at), member))
    )


def expiry_of(table: Table, item: Item | None) -> float | None:
    """Return when an item expires, in seconds since 1970; None for never."""
    at = item.get(table.expires) if item and table.expires else None
    if not isinstance(at, int | float) or isinstance(at, bool):
        return None
    if at > MAX_PLAUSIBLE_EXPIRY_S and table.name not in _warned_of_ms:
        _warned_of_ms.add(table.name)
        log.warning(
            "expiry_looks_like_ms",
            table=table.name,
            attribute=table.expires,
            value=at,
            advice="the attribute counts seconds since 1970: divide milliseconds by 1000",
        )
    return at


def same(a: Any, b: Any) -> bool:
    """JSON equality: as ==, but true is not 1."""
    # First what costs little for large items: `==` is stricter in nothing but that, and an update shares what it keeps.
    return a is b or (bool(a == b) and _same(a, b))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, bool) or isinstance(b, bool):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
