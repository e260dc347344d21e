"""What a batch of commands comes to: writes, changes and replies. Pure: no I/O, no clock.

The store decides in order and in memory; a later command sees what an earlier one did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from tidewire.app import CONNECTIONS, App, Table
from tidewire.errors import BadRequest, Internal, Overloaded, PermissionDenied, RequestError, Timeout
from tidewire.model.protocol import (
    Check,
    Delete,
    Follow,
    Get,
    Put,
    Query,
    Send,
    Transact,
    Update,
    parse_operations,
    parse_request,
    within_operation,
)
from tidewire.model.records import Command, Item, Reply, pack
from tidewire.model.values import ItemKey
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import Keys

from . import chores
from .budget import MAX_BATCH_CPU_S, Account, Clock, Exhausted
from .facts import AskedFact, ConnectedFact, Fact, ItemFact, RequestFact, Value
from .reading import reading_of
from .rights import Rights
from .updates import apply_update, check_values, touched
from .view import Author, Effects, Gaps, Missing, Situation, View, same

log = structlog.get_logger(__name__)

WRITE_ACTIONS = frozenset({"put", "update", "delete", "transact", "send"})
"""Actions whose result is kept for a repeated request id."""
COMMIT_BYTES = 4 << 20
"""A commit larger than this is cut: the rest of the batch comes with the next."""

SWEEP, LOAD = "sweep", "load"
"""What gateways and the import ask for, beside the actions of clients."""


class NextBatch(Exception):
    """This command must be decided after what goes before it is committed."""


class Detached(NamedTuple):
    """An expensive read that is acknowledged here without a reply, and decided beside the partition."""

    command: Command
    last: tuple[int, int]
    """Id of the partition's last change at this point. The read begins after the commit, so it contains that change."""


@dataclass
class Decision:
    consumed: int = 0
    operations: list[RedisCommand] = field(default_factory=list)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    last: tuple[int, int] = (0, 0)
    floor: int = 0
    size_bytes: int = 0
    changes: int = 0
    writes: set[tuple[str, int]] = field(default_factory=set)  # (gateway, number) of replies that tell of a write
    lost: dict[str, int] = field(default_factory=dict)  # by group: changes that were trimmed unread
    more_to_expire: bool = False
    more_to_forget: bool = False
    more_to_trim: bool = False
    asked: dict[str, int] = field(default_factory=dict)  # by gateway: its last command, for those of the batch
    kinds: dict[str, str] = field(default_factory=dict)  # of the sort keys of tables, settled by these writes
    detached: list[Detached] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # codes, for the metrics


Needs = dict[int, set[Fact]]
"""The facts that are missing, by the number of the command in its batch; those of chores under CHORES."""
CHORES = -1


def decide(
    app: App,
    keys: Keys,
    facts: dict[Fact, Value],
    commands: Sequence[Command | None],
    situation: Situation,
    accounts: Sequence[Account] = (),
    detached: Collection[int] = (),
    clock: Clock = lambda: 0.0,
) -> Decision | Needs:
    """The decision, or the facts that are missing for it. A command of None (unreadable) is skipped.

    What a command costs is charged to its account; one whose budget is exceeded is answered `too_large`. The reads
    whose numbers are in `detached` are acknowledged without a reply.
    """
    return _Batch(View(app, keys, facts, situation), accounts, detached, clock).decide(commands)


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
    def __init__(self, view: View, accounts: Sequence[Account], detached: Collection[int], clock: Clock) -> None:
        self.view = view
        self.app = view.app
        self.keys = view.keys
        self.situation = view.situation
        self.accounts = accounts
        self.detached = detached
        self.clock = clock
        self.decision = Decision(floor=view.situation.floor)
        self.answered: dict[RequestFact, Reply] = {}
        self.deadlines: dict[str, int] = {}

    def decide(self, commands: Sequence[Command | None]) -> Decision | Needs:
        begun_s, needs = self.clock(), Needs()
        for number, command in enumerate(commands):
            account = self.accounts[number] if self.accounts else Account(clock=self.clock)
            account.begin()
            try:
                if command is not None:
                    self.one(command, account, detached=number in self.detached)
            except Missing as need:
                needs[number] = need.facts
                account.must_not_share |= need.expensive
            except NextBatch:
                break
            finally:
                account.pause()
            self.decision.consumed += 1
            if self.decision.size_bytes > COMMIT_BYTES or self.clock() - begun_s > MAX_BATCH_CPU_S:
                break
        for chore in self.chores():
            self.view.begin()
            try:
                chore()
            except Missing as need:
                needs.setdefault(CHORES, set()).update(need.facts)
            else:
                self.keep(self.view.accept())
        self.remember()
        self.decision.last = self.view.last
        self.decision.kinds = dict(self.view.settled)
        return needs or self.decision

    def remember(self) -> None:
        """Whose commands are done, up to where: for as long as one that comes again might still be done."""
        for gateway, number in self.decision.asked.items():
            ttl_ms = self.deadlines[gateway] - self.situation.now + 1000
            if ttl_ms > 0:
                key = self.keys.asked(self.situation.partition, gateway)
                self.decision.operations.append(RedisCommand("SET", key, (number, "PX", ttl_ms)))

    def chores(self) -> Iterator[Callable[[], None]]:
        if self.situation.expire:
            yield self.expire
        if self.situation.keep_since is not None:
            yield self.trim

    def expire(self) -> None:
        self.decision.more_to_expire = chores.expire(self.view)

    def trim(self) -> None:
        trimmed = chores.trim(self.view)
        self.decision.lost, self.decision.more_to_trim = trimmed
        self.decision.floor, self.decision.more_to_forget = chores.purge(self.view)

    # ── one command ─────────────────────────────────────────────────────────────────────────────────────────────────

    def one(self, command: Command, account: Account, *, detached: bool) -> None:
        self.view.begin(account)
        if command.number <= self.last_of(command.reply_to):
            return  # the client library has sent it twice: it is done, and answered
        if detached:
            self.done_with(command)
            self.decision.detached.append(Detached(command, self.view.last))
        else:
            self.answer(command)

    def answer(self, command: Command) -> None:
        repeat = _request(command, command.request) if command.request is not None else None
        if repeat:
            first = self.first_reply(repeat)
            if first is not None:
                self.decision.writes.add((command.reply_to, command.number))
                self.reply(command, first._replace(number=command.number))
                return
        try:
            if command.deadline < self.situation.now + self.situation.waited_ms:
                raise Timeout("the request waited longer than its time, and was not done")
            self.view.account.check()
            reply = Reply(command.number, self.perform(command), None)
        except RequestError as error:
            self.view.begin()
            reply = Reply(command.number, None, wire_error(error))
            self.decision.errors.append(error.code)
            if error.retry or isinstance(error, Exhausted):
                repeat = None  # what may be tried again must be done when it is
        except (Missing, NextBatch):
            raise
        except Exception:  # the edge of one command: the next ones must not suffer
            log.exception("command_failed", action=command.action, table=command.body.get("table"))
            self.view.begin()
            reply = Reply(command.number, None, wire_error(Internal("something went wrong on the server")))
            repeat = None
        effects = self.view.accept()
        if effects.changes or (reply.result is not None and command.action in WRITE_ACTIONS):
            # Also one that changes nothing: what it says is there may not be confirmed yet.
            self.decision.writes.add((command.reply_to, command.number))
        self.keep(effects, transaction=command.action == "transact")
        if repeat:
            self.answered[repeat] = reply
            key = self.keys.request(self.situation.partition, repeat.user, repeat.request)
            self.decision.operations.append(
                RedisCommand("SET", key, (pack(reply), "PX", max(command.request_ttl_ms, 1)))
            )
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
            decision.operations.append(RedisCommand("XADD", stream, (f"{id_[0]}-{id_[1]}", "r", record)))
            decision.size_bytes += 2 * len(record)
        decision.operations += effects.operations
        decision.changes += len(effects.changes)

    def reply(self, command: Command, reply: Reply) -> None:
        self.done_with(command)
        self.decision.replies.setdefault(command.reply_to, []).append(reply)

    def done_with(self, command: Command) -> None:
        """Nothing is done for this command if it comes again."""
        gateway = command.reply_to
        self.decision.asked[gateway] = command.number
        self.deadlines[gateway] = max(command.deadline, self.deadlines.get(gateway, 0))

    def perform(self, command: Command) -> Any:  # noqa: PLR0911 - one for each kind of request
        if command.action == SWEEP:
            return self.sweep(command)
        if command.action == LOAD:
            return self.load(command)
        request, rights = parse_request(command.body), Rights(self.view, command)
        if self.situation.full and grows(request):
            raise Overloaded(self.situation.full)
        author = Author(command.user, command.connection, command.request, command.trace)
        match request:
            case Put() | Update() | Delete():
                return self.write(author, rights, request)
            case Transact():
                return self.transact(author, rights, request)
            case Get() | Query():
                return self.read(rights, request)
            case Follow():
                rights.may_follow(request.topic)
                return {}
            case Send():
                _service_only(command)
                user = str(request.user)
                connections = self.view.count(CONNECTIONS, user)
                self.view.send(author, user, request.body)
                return {"delivered": True, "connections": connections}
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
        new = table.validate(new)
        return self.written(author, table, key, new)

    def update(self, author: Author, rights: Rights, table: Table, request: Update) -> dict[str, Any]:
        key = table.parse_key(request.key)
        old = rights.readable(table, key)
        rights.keep_hidden(table, touched(request))
        new = apply_update(old, request)
        check_values(request)
        if table.key_of(new) != key:
            raise BadRequest(f"update: the key of an item cannot change: {_differing(table, new, key)}")
        rights.may_write(table, old, new)
        rights.check(table, key, request.condition)
        new = table.validate(new)
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
        gaps = Gaps()
        for number, (operation, key) in enumerate(zip(operations, keys, strict=True)):
            # Before images are built: no other operation is about this item, so its condition cannot begin to hold.
            # That of a write is looked at behind the right to write, which depends on its images.
            if isinstance(operation, Check):
                with gaps, within_operation(number):
                    rights.check_if_readable(self.app[operation.table], key, operation.condition)
        gaps.close()
        results = []
        for number, (operation, key) in enumerate(zip(operations, keys, strict=True)):
            with gaps, within_operation(number):
                self.view.account.check()
                if isinstance(operation, Check):
                    results.append(self.checked(rights, operation, key))
                else:
                    results.append(self.write(author, rights, operation))
        gaps.close()
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

    def read(self, rights: Rights, request: Get | Query) -> dict[str, Any]:
        reading = reading_of(request, self.view, rights, serial=True)
        if isinstance(request, Query) and request.index is None:
            table = self.app[request.table]
            place = (table.name, table.parse_partition_key(request.key))
            if table.sorted and any((key.table, key.partition) == place for key in self.view.written):
                raise NextBatch  # a page is read as it was committed; it must have what went before
        while not reading.done:
            reading.step(self.view, rights)
        return reading.result(self.view)

    # ── what gateways and the import ask for ────────────────────────────────────────────────────────────────────────

    def sweep(self, command: Command) -> int:
        """Remove connections of a gateway that is dead; how many there were in this round."""
        _service_only(command)
        gateway, table = command.body["gateway"], self.app[CONNECTIONS]
        connected: list[tuple[str, str]] = self.view.know(ConnectedFact(gateway))
        keys = [ItemKey(CONNECTIONS, user, connection) for user, connection in connected]
        self.view.need(ItemFact(key) for key in keys)
        gaps = Gaps()
        for key in keys:
            with gaps:
                if self.view.item(table, key):
                    self.view.write(Author(command.user), table, key, None)
                else:
                    self.view.forget_connection(gateway, key)
        gaps.close()
        return len(connected)

    def load(self, command: Command) -> int:
        """Write many items of this partition at once, as an import does; how many. All or none, checked as any write.

        Errors name the item by its place in `items`, a list of [table, item].
        """
        _service_only(command)
        if self.situation.full:
            raise Overloaded(self.situation.full)
        author, rights, keys = Author(command.user), Rights(self.view, command), []
        rows: list[tuple[str, Item]] = command.body["items"]
        for number, (name, item) in enumerate(rows):
            with _place(number):
                if name == CONNECTIONS:
                    raise PermissionDenied("connections are written by the gateways alone")
                keys.append(self.app[name].key_of(item))
        self.view.need(ItemFact(key) for key in keys)
        self.view.open_items = False  # each of a thousand members would carry the same items
        gaps = Gaps()
        try:
            for number, ((name, item), key) in enumerate(zip(rows, keys, strict=True)):
                with gaps, _place(number):
                    table = self.app[name]
                    rights.may_write(table, None, item)
                    self.view.write(author, table, key, table.validate(item))
        finally:
            self.view.open_items = True
        gaps.close()
        return len(rows)


class _place:  # noqa: N801 - a context manager
    """Errors within say where in the command they arose."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RequestError):
            error.details = error.details | {"item": self._number}


def _differing(table: Table, item: Item, key: ItemKey) -> str:
    """The first key attribute that is another one in the item."""
    return next(repr(name) for name, value in table.key_object(key).items() if not same(item[name], value))


def grows(request: object) -> bool:
    """Whether the request makes Redis hold more: any write but a delete, and what gateways note of connections."""
    match request:
        case Put(table=table) | Update(table=table):
            return table != CONNECTIONS
        case Transact(operations=operations):
            return any(operation.get("action") in ("put", "update") for operation in operations)
        case Send():
            return True
    return False


def _service_only(command: Command) -> None:
    if command.role != "service":
        raise PermissionDenied(f"{command.action} is for service keys alone")


def wire_error(error: RequestError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "details": error.details}
