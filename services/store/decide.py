"""What a batch of commands comes to: writes, changes and replies. Pure: no I/O, no clock.

The store decides in order and in memory; a later command sees what an earlier one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from tidewire.app import CONNECTIONS, App, ItemKey, Table, index_field
from tidewire.errors import BadRequest, Internal, PermissionDenied, RequestError, Timeout, TooLarge
from tidewire.functions import Operation
from tidewire.keys import Keys, Scalar, prefix_bytes, sort_bytes, tuple_bytes
from tidewire.protocol import (
    WRITES,
    Check,
    Delete,
    Edge,
    Follow,
    Get,
    Put,
    Query,
    Send,
    Transact,
    Update,
    fault_in,
    parse_operations,
    parse_request,
    within_operation,
)
from tidewire.records import Command, Item, ItemRecord, Reply, pack

from . import chores
from .facts import PAGE_BYTES, AskedFact, ConnectedFact, Fact, ItemFact, KindFact, Page, PageFact, RequestFact, Value
from .rights import Rights
from .updates import apply_update, touched
from .view import Author, Effects, Missing, Situation, View, same

log = structlog.get_logger(__name__)

MOST_SCANNED = 10_000
SCAN_AT_A_TIME = 1000
"""A query goes on over so many items that its caller may not read, so many at a time."""

COMMIT_BYTES = 4 << 20
"""A commit larger than this is cut: the rest of the batch comes with the next."""

SWEEP, LOAD = "sweep", "load"
"""What gateways and the import ask for, beside the actions of clients."""


class NextBatch(Exception):
    """This command must be decided after what goes before it is committed."""


@dataclass
class Decision:
    consumed: int = 0
    operations: list[Operation] = field(default_factory=list)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    last: tuple[int, int] = (0, 0)
    floor: int = 0
    size_bytes: int = 0
    changes: int = 0
    writes: set[tuple[str, int]] = field(default_factory=set)  # (gateway, number) of replies that tell of a write
    lost: dict[str, int] = field(default_factory=dict)  # by group: changes that were trimmed unread
    more_to_expire: bool = False
    more_to_forget: bool = False
    asked: dict[str, int] = field(default_factory=dict)  # by gateway: its last command, for those of the batch
    errors: list[str] = field(default_factory=list)  # codes, for the metrics


def decide(
    app: App, keys: Keys, facts: dict[Fact, Value], commands: Sequence[Command | None], situation: Situation
) -> Decision | set[Fact]:
    """The decision, or the facts that are missing for it. A command of None (unreadable) is skipped."""
    return _Batch(View(app, keys, facts, situation)).decide(commands)


def _request(command: Command, request: str) -> RequestFact:
    """Of one user under one role: what a service key was shown is not for the user's others."""
    return RequestFact(f"{command.role}:{command.user}", request)


def foresee(app: App, commands: Iterable[Command | None], situation: Situation) -> set[Fact]:
    """What a batch will need, as far as its commands say so: most are then decided once, and not to find out."""
    facts: set[Fact] = set()
    for command in commands:
        if command is None:
            continue
        if command.reply_to not in situation.asked:
            facts.add(AskedFact(command.reply_to))
        if command.request is not None:
            facts.add(_request(command, command.request))
        try:
            table = app[command.body["table"]]
            if command.action == "put":
                facts.add(ItemFact(table.key_of(command.body["item"])))
            elif "key" in command.body and command.action != "query":
                facts.add(ItemFact(table.parse_key(command.body["key"])))
        except (RequestError, KeyError, TypeError):
            continue  # what is wrong with it is said when it is decided
    return facts


class _Batch:
    def __init__(self, view: View) -> None:
        self.view = view
        self.app = view.app
        self.keys = view.keys
        self.situation = view.situation
        self.decision = Decision(floor=view.situation.floor)
        self.answered: dict[RequestFact, Reply] = {}
        self.deadlines: dict[str, int] = {}

    def decide(self, commands: Sequence[Command | None]) -> Decision | set[Fact]:
        missing: set[Fact] = set()
        for command in commands:
            try:
                if command is not None:
                    self.one(command)
            except Missing as need:
                # Whoever asks for the kind of a table's keys settles it: not before all that goes before is decided.
                missing |= need.facts if not missing else {f for f in need.facts if not isinstance(f, KindFact)}
            except NextBatch:
                break
            self.decision.consumed += 1
            if self.decision.size_bytes > COMMIT_BYTES:
                break
        for chore in self.chores():
            self.view.begin()
            try:
                chore()
            except Missing as need:
                missing |= need.facts
            else:
                self.keep(self.view.accept())
        self.remember()
        self.decision.last = self.view.last
        return missing or self.decision

    def remember(self) -> None:
        """Whose commands are done, up to where: for as long as one that comes again might still be done."""
        for gateway, number in self.decision.asked.items():
            ttl_ms = self.deadlines[gateway] - self.situation.now + 1000
            if ttl_ms > 0:
                key = self.keys.asked(self.situation.partition, gateway)
                self.decision.operations.append(Operation("SET", key, (number, "PX", ttl_ms)))

    def chores(self) -> Iterator[Callable[[], None]]:
        if self.situation.expire:
            yield self.expire
        if self.situation.keep_since is not None:
            yield self.trim

    def expire(self) -> None:
        self.decision.more_to_expire = chores.expire(self.view)

    def trim(self) -> None:
        self.decision.lost = chores.trim(self.view)
        self.decision.floor, self.decision.more_to_forget = chores.purge(self.view)

    # ── one command ─────────────────────────────────────────────────────────────────────────────────────────────────

    def one(self, command: Command) -> None:
        self.view.begin()
        if command.number <= self.last_of(command.reply_to):
            return  # the client library has sent it twice: it is done, and answered
        repeat = _request(command, command.request) if command.request is not None else None
        if repeat:
            first = self.first_reply(repeat)
            if first is not None:
                self.decision.writes.add((command.reply_to, command.number))
                self.reply(command, first._replace(number=command.number))
                return
        try:
            if command.deadline < self.situation.now:
                raise Timeout("the request waited longer than its time, and was not done")
            reply = Reply(command.number, self.perform(command), None)
        except RequestError as error:
            self.view.begin()
            reply = Reply(command.number, None, _error(error))
            self.decision.errors.append(error.code)
            if error.retry:
                repeat = None  # what may be tried again must be done when it is
        except (Missing, NextBatch):
            raise
        except Exception:  # the edge of one command: the next ones must not suffer
            log.exception("command_failed", action=command.action, table=command.body.get("table"))
            self.view.begin()
            reply = Reply(command.number, None, _error(Internal("something went wrong on the server")))
            repeat = None
        effects = self.view.accept()
        if effects.changes or (reply.result is not None and command.action in WRITES):
            # Also one that changes nothing: what it says is there may not be confirmed yet.
            self.decision.writes.add((command.reply_to, command.number))
        self.keep(effects, transaction=command.action == "transact")
        if repeat:
            self.answered[repeat] = reply
            key = self.keys.request(self.situation.partition, repeat.user, repeat.request)
            self.decision.operations.append(Operation("SET", key, (pack(reply), "PX", max(command.request_ttl_ms, 1))))
        self.reply(command, reply)

    def last_of(self, gateway: str) -> int:
        for known in (self.decision.asked, self.situation.asked):
            if gateway in known:
                return known[gateway]
        last: int = self.view.know(AskedFact(gateway))
        return last

    def first_reply(self, repeat: RequestFact) -> Reply | None:
        if repeat in self.answered:
            return self.answered[repeat]
        reply: Reply | None = self.view.know(repeat)
        return reply

    def keep(self, effects: Effects, *, transaction: bool = False) -> None:
        """What a command does becomes part of the commit."""
        decision, stream = self.decision, self.keys.changes(self.situation.partition)
        name = self.view.position(effects.changes[0][0]) if transaction and effects.changes else None
        for number, (id_, change) in enumerate(effects.changes, 1):
            more = name is not None and number < len(effects.changes)
            record = pack(change._replace(transaction=name, more=more) if name is not None else change)
            decision.operations.append(Operation("XADD", stream, (f"{id_[0]}-{id_[1]}", "r", record)))
            decision.size_bytes += 2 * len(record)
        decision.operations += effects.operations
        decision.changes += len(effects.changes)

    def reply(self, command: Command, reply: Reply) -> None:
        gateway = command.reply_to
        self.decision.asked[gateway] = command.number
        self.deadlines[gateway] = max(command.deadline, self.deadlines.get(gateway, 0))
        self.decision.replies.setdefault(gateway, []).append(reply)

    def perform(self, command: Command) -> Any:  # noqa: PLR0911 - one for each kind of request
        if command.action == SWEEP:
            return self.sweep(command)
        if command.action == LOAD:
            return self.load(command)
        request, rights = parse_request(command.body), Rights(self.view, command)
        author = Author(command.user, command.connection, command.request, command.trace)
        match request:
            case Put() | Update() | Delete():
                return self.write(author, rights, request)
            case Transact():
                return self.transact(author, rights, request)
            case Get():
                return self.get(rights, request)
            case Query():
                return self.query(rights, request)
            case Follow():
                rights.may_follow(request.topic)
                return {}
            case Send():
                _service_only(command)
                self.view.send(author, str(request.user), request.body)
                return {"delivered": True}
        raise BadRequest(f"the store has no action {command.action!r}")

    # ── writes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, author: Author, rights: Rights, request: Put | Update | Delete) -> dict[str, Any]:
        table = self.app[request.table]
        match request:
            case Put():
                return self.put(author, rights, table, request)
            case Update():
                return self.update(author, rights, table, request)
            case Delete():
                return self.delete(author, rights, table, request)

    def put(self, author: Author, rights: Rights, table: Table, request: Put) -> dict[str, Any]:
        key = table.key_of(request.item)
        old = self.view.item(table, key)
        rights.keep_hidden(table, request.item)
        new = dict(request.item)
        if old and not rights.all:
            # A client cannot send back what it is not shown.
            new = {name: value for name, value in old.items() if name in table.hidden} | new
        rights.may_write(table, old, new)
        rights.check(table, key, request.condition)
        table.validate(new)
        return self.written(author, table, key, new)

    def update(self, author: Author, rights: Rights, table: Table, request: Update) -> dict[str, Any]:
        key = table.parse_key(request.key)
        old = rights.readable(table, key)
        rights.keep_hidden(table, touched(request))
        new = apply_update(old, request)
        if table.key_of(new) != key:
            raise BadRequest(f"update: the key of an item cannot change: {_differing(table, new, key)}")
        if fault := fault_in(new):
            raise BadRequest(f"update: the item would hold {fault}")
        rights.may_write(table, old, new)
        rights.check(table, key, request.condition)
        table.validate(new)
        result = self.written(author, table, key, new)
        if rights.may_read(table, new):
            result["item"] = table.visible(new, "service" if rights.all else "client")
        return result

    def delete(self, author: Author, rights: Rights, table: Table, request: Delete) -> dict[str, Any]:
        key = table.parse_key(request.key)
        old = rights.readable(table, key)
        rights.may_write(table, old, None)
        rights.check(table, key, request.condition)
        return self.written(author, table, key, None)

    def written(self, author: Author, table: Table, key: ItemKey, new: Item | None) -> dict[str, Any]:
        version, position = self.view.write(author, table, key, new)
        return {"key": table.key_object(key), "version": version, "position": position}

    def transact(self, author: Author, rights: Rights, request: Transact) -> dict[str, Any]:
        """All or none; each operation sees what those before it did. Errors say which operation it was."""
        operations = parse_operations(request)
        keys: list[ItemKey] = []
        for number, operation in enumerate(operations):
            with within_operation(number):
                keys.append(self.key_of(operation))
        for number, key in enumerate(keys):
            if keys.index(key) != number:
                raise BadRequest(f"transact: operations {keys.index(key)} and {number} are about the same item")
            if not same(key.partition, keys[0].partition):
                raise BadRequest(
                    f"transact: operations 0 and {number} have the partition keys {keys[0].partition!r} and "
                    f"{key.partition!r}; all must have the same"
                )
        self.view.need(ItemFact(key) for key in keys)
        results = []
        for number, (operation, key) in enumerate(zip(operations, keys, strict=True)):
            with within_operation(number):
                if isinstance(operation, Check):
                    results.append(self.checked(rights, operation, key))
                else:
                    results.append(self.write(author, rights, operation))
        return {"results": results}

    def checked(self, rights: Rights, request: Check, key: ItemKey) -> dict[str, Any]:
        table = self.app[request.table]
        item, condition = self.view.item(table, key), request.condition
        if not (rights.all or condition.absent or (item is not None and rights.may_read(table, item))):
            rights.readable(table, key)
        if condition.absent and not rights.all and (item is None or not rights.may_read(table, item)):
            # Whether there is an item that he may not read is not to be found out, unless he may write there.
            rights.may_write(table, item, None)
        rights.check(table, key, condition)
        record = self.view.record(key)
        version = record.version if record and record.item is not None else 0
        return {"key": table.key_object(key), "version": version, "position": self.view.position(self.view.last_id)}

    def key_of(self, request: Put | Update | Delete | Check) -> ItemKey:
        table = self.app[request.table]
        if table.name == CONNECTIONS:
            raise PermissionDenied("connections are written by the gateways alone")
        return table.key_of(request.item) if isinstance(request, Put) else table.parse_key(request.key)

    # ── reads ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def get(self, rights: Rights, request: Get) -> dict[str, Any]:
        table = self.app[request.table]
        key = table.parse_key(request.key)
        item = rights.readable(table, key)
        record = self.view.record(key)
        assert record
        return self.shown(rights, table, item, record) | {"position": self.view.position(self.view.last)}

    def query(self, rights: Rights, request: Query) -> dict[str, Any]:
        table = self.app[request.table]
        attributes: tuple[str, str] | None
        if request.index is None:
            partition = table.parse_partition_key(request.key)
            found, attributes = self.scan(table, partition, request), None
            position = self.view.position(self.view.last)
        else:
            attributes = table.index(request.index)
            rights.keep_hidden(table, attributes)
            value = table.parse_index_key(request.index, request.key)
            order, items = self.keys.index(table.name, attributes, value)[::-1]
            found = self.pages(order, items, _Bounds(request, table, attributes))
            # It follows the tables of other partitions, by and by: of none of them it contains all.
            position = self.view.position((0, 0))
        shown: list[dict[str, Any]] = []
        last: Item | None = None
        following, size_bytes = None, 0
        try:
            for record in found:
                item = self.view.alive(table, record)
                if item is None or not rights.may_read(table, item):
                    continue
                entry = self.shown(rights, table, item, record)
                size_bytes += len(msgspec.json.encode(entry))
                if last is not None and (len(shown) == request.limit or size_bytes > PAGE_BYTES):
                    # Of items that are shown, and only because there is one more to show: it tells of no other.
                    following = _next(table, attributes, last, item)
                    break
                shown.append(entry)
                last = item
        except _TooFar:
            if last is None:
                raise
            following = _next(table, attributes, last, last)
        return {"items": shown, "next": following, "position": position, "key": list(table.key)}

    def scan(self, table: Table, partition: Scalar, request: Query) -> Iterator[ItemRecord]:
        """The items of a partition-key value, in the order asked for."""
        if not table.sorted:
            record = self.view.record(ItemKey(table.name, partition, None))
            return iter([record] if record else [])
        if any((key.table, key.partition) == (table.name, partition) for key in self.view.written):
            raise NextBatch  # a page is read as it was committed; it must have what went before
        order, items = self.keys.order(table.name, partition), self.keys.items(table.name, partition)
        return self.pages(order, items, _Bounds(request, table, None))

    def pages(self, order: bytes, items: bytes, bounds: _Bounds) -> Iterator[ItemRecord]:
        """Page by page. Raises _TooFar when it goes on and on over what is not shown."""
        limit, scanned = bounds.request.limit + 1, 0
        while True:
            low, high = bounds.range()
            page: Page = self.view.know(PageFact(order, items, low, high, limit, bounds.request.reverse))
            yield from page.records
            scanned += len(page.records)
            if not page.more:
                return
            if scanned > MOST_SCANNED:
                raise _TooFar("too many items lie between those that you may read: narrow the query by its bounds")
            bounds.go_on_from(page.records[-1])
            limit = SCAN_AT_A_TIME

    def shown(self, rights: Rights, table: Table, item: Item, record: ItemRecord) -> dict[str, Any]:
        visible = table.visible(item, "service" if rights.all else "client")
        return {"item": visible, "version": record.version, "at": record.at, "by": record.by}

    # ── what gateways and the import ask for ────────────────────────────────────────────────────────────────────────

    def sweep(self, command: Command) -> int:
        """Remove connections of a gateway that is dead; how many there were in this round."""
        _service_only(command)
        gateway, table = command.body["gateway"], self.app[CONNECTIONS]
        connected: list[tuple[str, str]] = self.view.know(ConnectedFact(gateway))
        keys = [ItemKey(CONNECTIONS, user, connection) for user, connection in connected]
        self.view.need(ItemFact(key) for key in keys)
        for key in keys:
            if self.view.item(table, key):
                self.view.write(Author(command.user), table, key, None)
            else:
                self.view.forget_connection(gateway, key)
        return len(connected)

    def load(self, command: Command) -> int:
        """Write many items of this partition at once, as an import does; how many. All or none, checked as any write.

        Errors name the item by its place in `items`, a list of [table, item].
        """
        _service_only(command)
        author, rights, keys = Author(command.user), Rights(self.view, command), []
        rows: list[tuple[str, Item]] = command.body["items"]
        for number, (name, item) in enumerate(rows):
            with _place(number):
                if name == CONNECTIONS:
                    raise PermissionDenied("connections are written by the gateways alone")
                keys.append(self.app[name].key_of(item))
        self.view.need(ItemFact(key) for key in keys)
        self.view.open_items = False  # each of a thousand members would carry the same items
        try:
            for number, ((name, item), key) in enumerate(zip(rows, keys, strict=True)):
                with _place(number):
                    table = self.app[name]
                    rights.may_write(table, None, item)
                    table.validate(item)
                    self.view.write(author, table, key, item)
        finally:
            self.view.open_items = True
        return len(rows)


class _TooFar(TooLarge):
    """A query has looked at so many items that it ends there."""


class _place:  # noqa: N801 - a context manager
    """Errors within say where in the command they arose."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RequestError):
            error.details = error.details | {"item": self._number}


class _Bounds:
    """The range that a query asks for, in the bytes of a table's order or of an index, page by page."""

    def __init__(self, request: Query, table: Table, attributes: tuple[str, str] | None) -> None:
        """Raises BadRequest for a bound that is none of a table."""
        self.request = request
        self._table = table
        self._attributes = attributes
        after, before = ((name, getattr(request, name)) for name in ("after", "before"))
        low = [] if after[1] is None else [b"(" + self._edge(*after, past=True)]
        high = [] if before[1] is None else [b"(" + self._edge(*before, past=False)]
        if request.prefix:
            start = sort_bytes(request.prefix) if attributes is None else prefix_bytes(request.prefix)
            low.append(b"[" + start)
            high.append(b"(" + start + b"\xff")  # beyond all of UTF-8
        self._low = max(low, key=lambda bound: bound[1:], default=b"-")
        self._high = min(high, key=lambda bound: bound[1:], default=b"+")

    def range(self) -> tuple[bytes, bytes]:
        """As ZRANGEBYLEX has it."""
        return self._low, self._high

    def go_on_from(self, record: ItemRecord) -> None:
        assert record.item is not None, "tombstones have no place in the order"
        key = self._table.key_of(record.item)
        edge = b"(" + (key.field if self._attributes is None else index_field(key, record.item, self._attributes))
        if self.request.reverse:
            self._high = edge
        else:
            self._low = edge

    def _edge(self, name: str, edge: Edge, *, past: bool) -> bytes:
        if isinstance(edge, list):
            if self._attributes is None:
                raise BadRequest(f"query: {name} is a sort-key value, not a list")
            parts = (self._attributes[1], *self._table.key)
            if len(edge) != len(parts):
                raise BadRequest(f"query: {name} as a list has the values of {', '.join(map(repr, parts))}")
            return tuple_bytes(*edge)
        assert edge is not None
        if self._attributes is None:
            return sort_bytes(edge)
        return tuple_bytes(edge) + (b"\xff" if past else b"")  # past all entries of that value


def _next(table: Table, attributes: tuple[str, str] | None, last: Item, following: Item) -> Any:
    """The sort value of a page's end; in an index that goes on with the same value, together with the item's key."""
    if attributes is None:
        return last[table.key[1]]
    attribute = attributes[1]
    if not same(last[attribute], following[attribute]):
        return last[attribute]
    return [last[attribute], *(last[name] for name in table.key)]


def _differing(table: Table, item: Item, key: ItemKey) -> str:
    """The first key attribute that is another one in the item."""
    return next(repr(name) for name, value in table.key_object(key).items() if not same(item[name], value))


def _service_only(command: Command) -> None:
    if command.role != "service":
        raise PermissionDenied(f"{command.action} is for service keys alone")


def _error(error: RequestError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "details": error.details}
