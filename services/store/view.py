"""The view of a partition during a decision: fetched facts, and the effects of commands decided so far. No I/O.

A fact that is not known raises `Missing`. It is fetched, and everything is decided again from the beginning. So the
same code says what must be fetched and what happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from tidewire.app import BY_MEMBER, App, Table
from tidewire.errors import RequestError
from tidewire.model.records import Change, Item, ItemRecord, id_text
from tidewire.model.values import ItemKey, Scalar
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import Keys

from .budget import Account
from .facts import CountFact, Fact, ItemFact, Page, PageFact, Value

log = structlog.get_logger(__name__)

MAX_GROUPS = 1000
"""Maximum groups of a user that `peers` audiences look at."""


class Missing(Exception):
    """Facts must be fetched before a command can be decided."""

    def __init__(self, facts: Iterable[Fact], *, expensive: bool = False) -> None:
        self.facts = set(facts)
        self.expensive = expensive
        """Whether the command is too expensive for the serial path of the partition."""


class Gaps:
    """A context manager for independent steps. It collects the facts that they miss, to ask for all at once.

    If a step fails after another one has missed a fact, the failure may be due to that. The facts are then fetched
    first.
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
        """Raise Missing if any step has missed a fact."""
        if self._facts:
            raise Missing(self._facts) from None


@dataclass(frozen=True)
class Situation:
    """The circumstances of a batch: the partition, its state, and the time."""

    partition: int
    generation: int
    now: int  # ms since 1970, the server's
    last: tuple[int, int]  # id of the partition's last change
    item_bytes: int  # maximum bytes of an item as JSON; 0: no limit
    floor: int = 0  # versions of new items begin above it
    kinds: Mapping[str, str] = field(default_factory=dict)  # known kinds of sort keys, by table: "s" or "n"
    last_numbers: Mapping[str, int] = field(default_factory=dict)  # by gateway: number of its last command, if known
    expire: bool = False  # whether expired items are due to be removed
    keep_since: tuple[int, int] | None = None  # changes before this id are due to be trimmed…
    keep_changes: int = 0  # … and those beyond this number; 0: no limit
    keep_bytes: int = 0  # … and those beyond this memory, in bytes; 0: no limit
    waited_ms: int = 0  # milliseconds since `now`
    full: str | None = None  # why growing writes are refused


class Author(NamedTuple):
    """The author of a write, as its change names it."""

    user: str
    connection: str | None = None
    request: str | None = None
    trace: str | None = None


@dataclass
class Effects:
    """The effects of one command. They count only if it succeeds."""

    items: dict[ItemKey, ItemRecord] = field(default_factory=dict)
    changes: list[tuple[tuple[int, int], Change]] = field(default_factory=list)
    operations: list[RedisCommand] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)  # kinds of sort keys, by table, that these writes settle


class View:
    """Facts, overlaid by the writes of earlier commands of the batch, overlaid by those of the current command."""

    def __init__(self, app: App, keys: Keys, facts: dict[Fact, Value], situation: Situation) -> None:
        self.app = app
        self.keys = keys
        self.situation = situation
        self.last = situation.last
        self.written: dict[ItemKey, ItemRecord] = {}
        self.effects = Effects()
        self.open_items = True  # whether memberships carry items to compare; else their members query
        self._place = f"{situation.partition}-{situation.generation}"  # the beginning of each position
        self._facts = facts
        self.account = Account()  # of the current command
        self.settled: dict[str, str] = {}  # kinds of sort keys, by table, that this batch settles
        self.appended = 0  # changes of the batch so far
        self._counted: dict[tuple[str, Scalar], int] = {}  # difference of item counts to the facts

    # ── what is known ───────────────────────────────────────────────────────────────────────────────────────────────

    def know(self, fact: Fact) -> Any:
        try:
            return self._facts[fact]
        except KeyError:
            raise Missing((fact,)) from None

    def need(self, facts: Iterable[Fact]) -> None:
        """Raise Missing with all unknown facts among these, so that one round fetches them."""
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
        """Return the item of a record, unless it is deleted or expired."""
        if record is None or record.item is None:
            return None
        return None if table.expires and table.is_expired(record.item, self.situation.now) else record.item

    def item(self, table: Table, key: ItemKey) -> Item | None:
        return self.alive(table, self.record(key))

    # The methods of `Knowledge`, for audiences. Memberships are tables, so the same facts serve. A group of another
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
        self.need(ItemFact(key) for key in keys)  # in one round
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
        """Drop the effects of the last command, and charge costs to this account from now on."""
        self.effects = Effects()
        self.account = account or self.account

    def accept(self) -> Effects:
        """Accept the effects of the current command, so that the next ones see them, and return them."""
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

    # ── positions ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def last_id(self) -> tuple[int, int]:
        return self.effects.changes[-1][0] if self.effects.changes else self.last

    def next_id(self) -> tuple[int, int]:
        ms, seq = self.last_id
        return (self.situation.now, 0) if self.situation.now > ms else (ms, seq + 1)

    def position(self, id_: tuple[int, int]) -> str:
        return f"{self._place}-{id_text(id_)}"


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in JSON, where true is not 1."""
    # `==` is fast, and an updated item shares most of its parts. Only booleans need the slow comparison.
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
