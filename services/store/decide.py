"""What a batch of commands comes to: writes, changes and replies. Pure: no I/O, no clock.

The store decides in order and in memory; a later command sees what an earlier one did. What it does not know it names,
is given, and decides again from the start: so the same code says what must be fetched and what is to be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from tidewire.app import CONNECTIONS, App, ItemKey, Table, Write
from tidewire.audiences import Audience, resolve
from tidewire.errors import BadRequest, Conflict, Internal, NotFound, PermissionDenied, RequestError, Timeout, TooLarge
from tidewire.functions import Operation
from tidewire.keys import Keys, Scalar
from tidewire.protocol import Condition, Delete, Get, Put, Query, Update, parse_request
from tidewire.records import Change, Command, Item, ItemRecord, Position, Reply, pack

from .facts import PAGE_BYTES, ConnectedFact, CountFact, Fact, ItemFact, Page, PageFact, RequestFact, Value
from .updates import apply_update, touched

log = structlog.get_logger(__name__)

MOST_SCANNED = 10_000
SCAN_AT_A_TIME = 1000
"""A query goes on over so many items that its caller may not read, so many at a time."""

COMMIT_BYTES = 4 << 20
"""A commit larger than this is cut: the rest of the batch comes with the next."""


class Missing(Exception):
    """A fact must be fetched before this command can be decided."""

    def __init__(self, fact: Fact) -> None:
        self.fact = fact


class NextBatch(Exception):
    """This command must be decided after what goes before it is committed."""


@dataclass(frozen=True)
class Situation:
    """Where and when a batch is decided."""

    partition: int
    generation: int
    now: int  # ms since 1970, the server's
    last: tuple[int, int]  # id of the partition's last change
    item_bytes: int  # most bytes of an item as JSON; 0: no limit


@dataclass
class Decision:
    consumed: int = 0
    operations: list[Operation] = field(default_factory=list)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    last: tuple[int, int] = (0, 0)
    size_bytes: int = 0
    changes: int = 0
    errors: list[str] = field(default_factory=list)  # codes, for the metrics


@dataclass
class _Effects:
    """What one command would do; nothing of it counts until it succeeds."""

    items: dict[ItemKey, ItemRecord] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    ids: list[tuple[int, int]] = field(default_factory=list)


def decide(
    app: App, keys: Keys, facts: dict[Fact, Value], commands: Sequence[Command | None], situation: Situation
) -> Decision | set[Fact]:
    """The decision, or the facts that are missing for it. A command of None (unreadable) is skipped."""
    return _Batch(app, keys, facts, situation).decide(commands)


class _Batch:
    def __init__(self, app: App, keys: Keys, facts: dict[Fact, Value], situation: Situation) -> None:
        self.app = app
        self.keys = keys
        self.facts = facts
        self.situation = situation
        self.decision = Decision(last=situation.last)
        self.written: dict[ItemKey, ItemRecord] = {}
        self.counted: dict[tuple[str, Scalar], int] = {}  # items more or fewer than the facts say
        self.answered: dict[RequestFact, Reply] = {}
        self.effects = _Effects()

    def decide(self, commands: Sequence[Command | None]) -> Decision | set[Fact]:
        missing: set[Fact] = set()
        for command in commands:
            try:
                if command is not None:
                    self.one(command)
            except Missing as need:
                missing.add(need.fact)
            except NextBatch:
                break
            self.decision.consumed += 1
            if self.decision.size_bytes > COMMIT_BYTES:
                break
        return missing or self.decision

    # ── one command ─────────────────────────────────────────────────────────────────────────────────────────────────

    def one(self, command: Command) -> None:
        self.effects = _Effects()
        repeat = RequestFact(command.user, command.request) if command.request is not None else None
        if repeat:
            first = self.first_reply(repeat)
            if first is not None:
                self.reply(command, first)
                return
        try:
            if command.deadline < self.situation.now:
                raise Timeout("the request waited longer than its time, and was not done")
            reply = Reply(command.number, self.perform(command), None)
        except RequestError as error:
            self.effects = _Effects()
            reply = Reply(command.number, None, _error(error))
            self.decision.errors.append(error.code)
            if error.retry:
                repeat = None  # what may be tried again must be done when it is
        except (Missing, NextBatch):
            raise
        except Exception:  # the edge of one command: the next ones must not suffer
            log.exception("command_failed", action=command.action, table=command.body.get("table"))
            self.effects = _Effects()
            reply = Reply(command.number, None, _error(Internal("something went wrong on the server")))
            repeat = None
        self.accept(command, reply, repeat)

    def accept(self, command: Command, reply: Reply, repeat: RequestFact | None) -> None:
        effects = self.effects
        self.effects = _Effects()  # from here on `record` is what was before
        for key, record in effects.items.items():
            was, is_ = self.live(self.record(key)) is not None, self.live(record) is not None
            group = (key.table, key.partition)
            self.counted[group] = self.counted.get(group, 0) + int(is_) - int(was)
            self.written[key] = record
        self.decision.operations += effects.operations
        if effects.ids:
            self.decision.last = effects.ids[-1]
            self.decision.changes += len(effects.ids)
        if repeat:
            self.answered[repeat] = reply
            key_ = self.keys.request(self.situation.partition, repeat.user, repeat.request)
            self.decision.operations.append(Operation("SET", key_, (pack(reply), "PX", max(command.request_ttl_ms, 1))))
        self.decision.size_bytes += sum(
            len(arg) for operation in effects.operations for arg in operation.args if isinstance(arg, bytes)
        )
        self.reply(command, reply)

    def reply(self, command: Command, reply: Reply) -> None:
        self.decision.replies.setdefault(command.reply_to, []).append(reply._replace(number=command.number))

    def perform(self, command: Command) -> Any:
        if command.action == "sweep":
            return self.sweep(command)
        request = parse_request(command.body)
        table = self.app[getattr(request, "table", "")]
        match request:
            case Put():
                return self.put(command, table, request)
            case Update():
                return self.update(command, table, request)
            case Delete():
                return self.delete(command, table, request)
            case Get():
                return self.get(command, table, request)
            case Query():
                return self.query(command, table, request)
        raise BadRequest(f"the store has no action {command.action!r}")

    # ── the actions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, command: Command, table: Table, request: Put) -> Any:
        key = table.key_of(request.item)
        old = self.live(self.record(key))
        self.keep_hidden(command, table, request.item)
        new = dict(request.item)
        if old and command.role != "service":
            # A client cannot send back what it is not shown.
            new = {name: value for name, value in old.items() if name in table.hidden} | new
        self.may_write(command, table, old, new)
        self.check(command, table, key, request.condition)
        return self.write(command, table, key, new)

    def update(self, command: Command, table: Table, request: Update) -> Any:
        key = table.parse_key(request.key)
        old = self.readable(command, table, key)
        self.keep_hidden(command, table, touched(request))
        new = apply_update(old, request)
        if table.key_of(new) != key:
            raise BadRequest("update: the key of an item cannot change")
        self.may_write(command, table, old, new)
        self.check(command, table, key, request.condition)
        result = self.write(command, table, key, new)
        if self.may_read(command, table, new):
            result["item"] = table.visible(new, command.role)
        return result

    def delete(self, command: Command, table: Table, request: Delete) -> Any:
        key = table.parse_key(request.key)
        old = self.readable(command, table, key)
        self.may_write(command, table, old, None)
        self.check(command, table, key, request.condition)
        return self.write(command, table, key, None)

    def get(self, command: Command, table: Table, request: Get) -> Any:
        key = table.parse_key(request.key)
        item = self.readable(command, table, key)
        record = self.record(key)
        assert record
        return self.shown(command, table, item, record) | {"position": self.position(self.decision.last)}

    def query(self, command: Command, table: Table, request: Query) -> Any:
        partition = table.parse_partition_key(request.key)
        items: list[dict[str, Any]] = []
        following, size_bytes = None, 0
        for record in self.scan(table, partition, request):
            if record.item is None or not self.may_read(command, table, record.item):
                continue
            shown = self.shown(command, table, record.item, record)
            size_bytes += len(msgspec.json.encode(shown))
            if items and (len(items) == request.limit or size_bytes > PAGE_BYTES):
                # Of an item that is shown, and only because there is one more to show: it tells of no other.
                following = items[-1]["item"][table.key[1]]
                break
            items.append(shown)
        return {"items": items, "next": following, "position": self.position(self.decision.last)}

    def scan(self, table: Table, partition: Scalar, request: Query) -> Iterator[ItemRecord]:
        """The items in the order asked for, page by page.

        Raises TooLarge when it goes on and on over what is not shown.
        """
        if not table.sorted:
            record = self.record(ItemKey(table.name, partition, None))
            if record and self.live(record):
                yield record
            return
        if any((key.table, key.partition) == (table.name, partition) for key in self.written):
            raise NextBatch  # a page is read as it was committed; it must have what went before
        after, before, limit, scanned = request.after, request.before, request.limit + 1, 0
        while True:
            fact = PageFact(table.name, partition, after, before, request.prefix, limit, request.reverse)
            page: Page = self.know(fact)
            yield from page.records
            scanned += len(page.records)
            if not page.more:
                return
            if scanned > MOST_SCANNED:
                raise TooLarge("too many items lie between those that you may read: narrow the query by its bounds")
            last = page.records[-1].item
            assert last is not None
            edge = last[table.key[1]]
            after, before = (after, edge) if request.reverse else (edge, before)
            limit = SCAN_AT_A_TIME

    def sweep(self, command: Command) -> Any:
        """Remove connections of a gateway that is dead; how many there were in this round."""
        if command.role != "service":
            raise PermissionDenied("sweep is the gateways' own")
        gateway, table = command.body["gateway"], self.app[CONNECTIONS]
        connected: list[tuple[str, str]] = self.know(ConnectedFact(gateway))
        for user, connection in connected:
            key = ItemKey(CONNECTIONS, user, connection)
            if self.live(self.record(key)):
                self.write(command, table, key, None)
            else:
                self.forget_connection(gateway, key)
        return len(connected)

    # ── what is known ───────────────────────────────────────────────────────────────────────────────────────────────

    def know(self, fact: Fact) -> Any:
        if fact not in self.facts:
            raise Missing(fact)
        return self.facts[fact]

    def record(self, key: ItemKey) -> ItemRecord | None:
        """The item as it stands after what was decided so far."""
        for written in (self.effects.items, self.written):
            if key in written:
                return written[key]
        record: ItemRecord | None = self.know(ItemFact(key))
        return record

    @staticmethod
    def live(record: ItemRecord | None) -> Item | None:
        return record.item if record else None

    def first_reply(self, repeat: RequestFact) -> Reply | None:
        if repeat in self.answered:
            return self.answered[repeat]
        reply: Reply | None = self.know(repeat)
        return reply

    # `Knowledge`, for the audiences: memberships are tables, so that the same facts serve.

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.live(self.record(ItemKey(membership, group, user)))

    def members(self, membership: str, group: Scalar) -> dict[str, Item]:
        raise NotImplementedError("the store asks of one user at a time")

    def vacant(self, membership: str, group: Scalar) -> bool:
        count: int = self.know(CountFact(membership, group))
        return count + self.counted.get((membership, group), 0) <= 0

    # ── who may ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def may_read(self, command: Command, table: Table, item: Item) -> bool:
        if command.role == "service":
            return True
        try:
            audience = resolve(table.readers, item)
        except Exception as error:  # the application's function: what it cannot say yes to, nobody reads
            log.warning("readers_failed", table=table.name, error=repr(error))
            return False
        return audience.admits(item, command.user, self)

    def readable(self, command: Command, table: Table, key: ItemKey) -> Item:
        """The live item. Raises NotFound where there is none, or none that this user may know of."""
        item = self.live(self.record(key))
        if item is None or not self.may_read(command, table, item):
            raise NotFound(f"there is no such item in table {table.name!r}")
        return item

    def may_write(self, command: Command, table: Table, old: Item | None, new: Item | None) -> None:
        """Raises PermissionDenied unless the user is among the writers of the item as it is and as it would be."""
        if new is not None:
            self.check_readers(table, new)
        if command.role == "service":
            return
        audience: Audience | bool
        try:
            if isinstance(table.writers, Audience):
                audience = table.writers
            else:
                audience = table.writers(Write(old, new, command.user, command.claims))
                if not isinstance(audience, bool | Audience):
                    raise TypeError(f"a writers function returns an audience or a bool, not {audience!r}")
        except Exception as error:
            log.warning("writers_failed", table=table.name, error=repr(error))
            raise BadRequest(f"the rules of table {table.name!r} cannot be applied to this item") from None
        images = [image for image in (old, new) if image is not None]
        allowed = (
            audience
            if isinstance(audience, bool)
            else all(audience.admits(image, command.user, self) for image in images)
        )
        if not allowed:
            raise PermissionDenied(f"you may not write this item of table {table.name!r}")

    def check_readers(self, table: Table, new: Item) -> None:
        try:
            resolve(table.readers, new)
        except Exception as error:
            log.warning("readers_failed", table=table.name, error=repr(error))
            raise BadRequest(f"the rules of table {table.name!r} cannot be applied to this item") from None

    def check(self, command: Command, table: Table, key: ItemKey, condition: Condition | None) -> None:
        """`if`. Raises Conflict, with the item's version for who may read it."""
        if condition is None:
            return
        record = self.record(key)
        item = self.live(record)
        if condition.equals is not None:
            self.keep_hidden(command, table, condition.equals)
        told = record is not None and item is not None and self.may_read(command, table, item)
        if item is not None and not told and (condition.version is not None or condition.equals is not None):
            holds = False  # what one may write and not read cannot be found out by guessing
        elif condition.version is not None:
            holds = record is not None and item is not None and record.version == condition.version
        elif condition.equals is not None:
            holds = item is not None and all(
                name in item and _same(item[name], value) for name, value in condition.equals.items()
            )
        else:
            holds = (item is None) == bool(condition.absent)
        if not holds:
            details = {"version": record.version} if told and record else {}
            raise Conflict("the item is not as `if` says it must be", **details)

    def keep_hidden(self, command: Command, table: Table, names: Iterable[str]) -> None:
        """Raises PermissionDenied where a client names a hidden attribute: its answers would tell what is in it."""
        if command.role != "service" and (hidden := table.hidden.intersection(names)):
            raise PermissionDenied(f"attribute {min(hidden)!r} of table {table.name!r} is for service keys alone")

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, command: Command, table: Table, key: ItemKey, new: Item | None) -> dict[str, Any]:
        """Item, order and change, as one step of the commit. Nothing, where nothing changes."""
        record = self.record(key)
        old = self.live(record)
        version = record.version if record else 0
        key_object = table.key_object(key)
        if new is not None and old is not None and _same(old, new):
            return {"key": key_object, "version": version, "position": self.position(self.decision.last)}
        if new is not None:
            self.check_size(new)
        now, id_ = self.situation.now, self.next_id()
        version += 1
        written = ItemRecord(version, now, command.user, new)
        event = "REMOVE" if new is None else "INSERT" if old is None else "MODIFY"
        change = Change(
            event, table.name, key_object, version, new, old, now, command.user, command.connection, command.request
        )
        at = f"{id_[0]}-{id_[1]}"
        operations = [
            Operation("XADD", self.keys.changes(self.situation.partition), (at, "r", pack(change))),
            Operation("HSET", self.keys.items(key.table, key.partition), (key.field, pack(written))),
        ]
        if table.sorted and (old is None) != (new is None):
            order = self.keys.order(key.table, key.partition)
            args = ("0", key.field) if new is not None else (key.field,)
            operations.append(Operation("ZADD" if new is not None else "ZREM", order, args))
        self.effects.items[key] = written
        self.effects.operations += operations
        self.effects.ids.append(id_)
        if table.name == CONNECTIONS:
            self.keep_connection(key, old, new)
        return {"key": key_object, "version": version, "position": self.position(id_)}

    def keep_connection(self, key: ItemKey, old: Item | None, new: Item | None) -> None:
        """Beside a connection's item, by gateway: what must be removed when the gateway dies."""
        if old is not None:
            self.forget_connection(str(old.get("gateway")), key)
        if new is not None:
            connected = self.keys.connected(self.situation.partition, str(new.get("gateway")))
            self.effects.operations.append(Operation("SADD", connected, (pack((key.partition, key.sort)),)))

    def forget_connection(self, gateway: str, key: ItemKey) -> None:
        connected = self.keys.connected(self.situation.partition, gateway)
        self.effects.operations.append(Operation("SREM", connected, (pack((key.partition, key.sort)),)))

    def check_size(self, item: Item) -> None:
        limit = self.situation.item_bytes
        size = len(msgspec.json.encode(item)) if limit else 0
        if size > limit:
            raise TooLarge(f"the item has {size} bytes as JSON; at most {limit} are allowed", limit=limit, size=size)

    def next_id(self) -> tuple[int, int]:
        ms, seq = self.effects.ids[-1] if self.effects.ids else self.decision.last
        return (self.situation.now, 0) if self.situation.now > ms else (ms, seq + 1)

    def position(self, id_: tuple[int, int]) -> str:
        return str(Position(self.situation.partition, self.situation.generation, *id_))

    def shown(self, command: Command, table: Table, item: Item, record: ItemRecord) -> dict[str, Any]:
        visible = table.visible(item, command.role)
        return {"item": visible, "version": record.version, "at": record.at, "by": record.by}


def _same(a: Any, b: Any) -> bool:
    """JSON equality: as ==, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _error(error: RequestError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "details": error.details}
