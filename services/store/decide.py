"""Decides a batch of commands: their writes, changes and replies. No I/O.

Commands are decided in their order. A later one sees the effects of an earlier one, before anything is committed. Facts
that a command lacks are returned; they are fetched, and the batch is decided again from its beginning. So the same code
says which facts are needed and what happens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog

from tidewire.app import CONNECTIONS, App
from tidewire.errors import BadRequest, Conflict, Internal, Overloaded, RequestError, Timeout
from tidewire.model.protocol import (
    Delete,
    Follow,
    Get,
    Put,
    Query,
    Send,
    Transact,
    Update,
    digest_of,
    parse_request,
)
from tidewire.model.records import Change, Command, FirstReply, Reply, id_text, pack
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import Keys

from . import chores
from .appending import append_message
from .budget import MAX_BATCH_CPU_S, Account, Clock, Exhausted
from .bulk import LOAD, SWEEP, load, service_only, sweep
from .facts import Fact, ItemFact, LastNumberFact, RequestFact, Value
from .reading import NextBatch, read_serially
from .rights import Rights
from .view import Author, Effects, Missing, Situation, View
from .writing import grows, transact, write

log = structlog.get_logger(__name__)

WRITE_ACTIONS = frozenset({"put", "update", "delete", "transact", "send"})
"""Actions whose result is kept for a repeated request id."""
COMMIT_BYTES = 4 << 20
"""Size at which a commit ends, in bytes of changes. The rest of the batch comes with the next one."""


class Detached(NamedTuple):
    """An expensive read: acknowledged in this batch without a reply, and decided beside the partition."""

    command: Command
    last: tuple[int, int]
    """Id of the partition's last change at this point. The read begins after the commit, so it contains that change."""


@dataclass
class Decision:
    """The effects of a batch: commands to commit, and the replies after the commit."""

    consumed: int = 0
    operations: list[RedisCommand] = field(default_factory=list)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    last: tuple[int, int] = (0, 0)
    floor: int = 0
    size_bytes: int = 0
    changes: int = 0
    writes: set[tuple[str, int]] = field(default_factory=set)  # (gateway, number) of replies that tell of a write
    changes_of: dict[tuple[str, int], list[Change]] = field(default_factory=dict)  # by the same; of users' commands
    lost: dict[str, int] = field(default_factory=dict)  # by group: changes that were trimmed unread
    more_to_expire: bool = False
    more_to_forget: bool = False
    more_to_trim: bool = False
    last_numbers: dict[str, int] = field(default_factory=dict)  # by gateway: its last command in the batch
    kinds: dict[str, str] = field(default_factory=dict)  # of the sort keys of tables, settled by these writes
    detached: list[Detached] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # codes, for the metrics


Needs = dict[int, set[Fact]]
"""Missing facts, by the number of the command in the batch. Those of chores are under CHORES."""
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
    """Return the decision, or the facts that it lacks. A command of None (unreadable) is skipped.

    Each command is charged to its account. One that exceeds its budget is answered `too_large`. Reads whose numbers are
    in `detached` are acknowledged without a reply.
    """
    return _DecisionBuilder(View(app, keys, facts, situation), accounts, detached, clock).decide(commands)


def _request(command: Command, request: str) -> RequestFact:
    """The stored reply of a user under one role: a service key's reply may hold what the user's other keys may not
    see."""
    return RequestFact(f"{command.role}:{command.user}", request)


def foresee(app: App, commands: Iterable[Command | None], situation: Situation) -> set[Fact]:
    """Return the facts that the commands of a batch name themselves. Most batches are then decided in one pass."""
    facts: set[Fact] = set()
    for command in commands:
        if command is None:
            continue
        if command.reply_to not in situation.last_numbers:
            facts.add(LastNumberFact(command.reply_to))
        if command.request is not None:
            facts.add(_request(command, command.request))
        try:
            table = app[command.body["table"]]
            if command.action == "put":
                facts.add(ItemFact(table.key_of(command.body["item"])))
            elif "key" in command.body and command.action != "query":
                facts.add(ItemFact(table.parse_key(command.body["key"])))
        except (RequestError, KeyError, TypeError):
            continue  # the decision will say what is wrong
    return facts


class _DecisionBuilder:
    def __init__(self, view: View, accounts: Sequence[Account], detached: Collection[int], clock: Clock) -> None:
        self.view = view
        self.app = view.app
        self.keys = view.keys
        self.situation = view.situation
        self.accounts = accounts
        self.detached = detached
        self.clock = clock
        self.decision = Decision(floor=view.situation.floor)
        self.answered: dict[RequestFact, FirstReply] = {}
        self.deadlines: dict[str, int] = {}

    def decide(self, commands: Sequence[Command | None]) -> Decision | Needs:
        begun_s, needs = self.clock(), Needs()
        for number, command in enumerate(commands):
            account = self.accounts[number] if self.accounts else Account(clock=self.clock)
            account.begin()
            try:
                if command is not None:
                    self.decide_one(command, account, detached=number in self.detached)
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
        """Store the last command number of each gateway, for as long as a repeat could still be decided."""
        for gateway, number in self.decision.last_numbers.items():
            ttl_ms = self.deadlines[gateway] - self.situation.now + 1000
            if ttl_ms > 0:
                key = self.keys.last_number(self.situation.partition, gateway)
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

    def decide_one(self, command: Command, account: Account, *, detached: bool) -> None:
        self.view.begin(account)
        if command.number <= self.last_of(command.reply_to):
            return  # the gateway's client library sent it twice; it is done and answered
        if detached:
            self.done_with(command)
            self.decision.detached.append(Detached(command, self.view.last))
        else:
            self.answer(command)

    def answer(self, command: Command) -> None:
        repeat = _request(command, command.request) if command.request is not None else None
        digest = digest_of(command.body) if repeat else b""
        if repeat:
            first = self.first_reply(repeat)
            if first is not None:
                self.repeat(command, first, same=first.digest == digest)
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
                repeat = None  # a retry must be decided again
        except (Missing, NextBatch):
            raise
        except Exception:  # the edge of one command: the next ones must be decided
            log.exception("command_failed", action=command.action, table=command.body.get("table"))
            self.view.begin()
            reply = Reply(command.number, None, wire_error(Internal("something went wrong on the server")))
            repeat = None
        effects, size_before = self.view.accept(), self.decision.size_bytes
        if effects.changes or (reply.result is not None and command.action in WRITE_ACTIONS):
            # Also a write that changes nothing: the item that it reports may not be confirmed as durable yet.
            self.decision.writes.add((command.reply_to, command.number))
        self.keep(effects, transaction=command.action == "transact")
        if effects.changes and command.role != "service":
            self.decision.changes_of[command.reply_to, command.number] = [change for _, change in effects.changes]
        if repeat:
            first = self.answered[repeat] = FirstReply(reply.result, reply.error, digest)
            key = self.keys.request(self.situation.partition, repeat.user, repeat.request)
            self.decision.operations.append(
                RedisCommand("SET", key, (pack(first), "PX", max(command.request_ttl_ms, 1)))
            )
        self.reply(command, reply, self.decision.size_bytes - size_before)

    def repeat(self, command: Command, first: FirstReply, *, same: bool) -> None:
        """Answer a command whose request id was used before, by the same request or by another one."""
        if same:
            self.decision.writes.add((command.reply_to, command.number))
            self.reply(command, Reply(command.number, first.result, first.error))
            return
        error = Conflict(
            "this request id was used for another request, and nothing was done: use a new id for each write",
            request=command.request,
        )
        self.decision.errors.append(error.code)
        self.reply(command, Reply(command.number, None, wire_error(error)))

    def last_of(self, gateway: str) -> int:
        for known in (self.decision.last_numbers, self.situation.last_numbers):
            if gateway in known:
                return known[gateway]
        last: int = self.view.know(LastNumberFact(gateway))
        return last

    def first_reply(self, repeat: RequestFact) -> FirstReply | None:
        if repeat in self.answered:
            return self.answered[repeat]
        reply: FirstReply | None = self.view.know(repeat)
        return reply

    def keep(self, effects: Effects, *, transaction: bool = False) -> None:
        """Add the effects of a command to the commit."""
        decision, stream = self.decision, self.keys.changes(self.situation.partition)
        name = self.view.position(effects.changes[0][0]) if transaction and effects.changes else None
        for number, (id_, change) in enumerate(effects.changes, 1):
            more = name is not None and number < len(effects.changes)
            record = pack(change._replace(transaction=name, more=more) if name is not None else change)
            decision.operations.append(RedisCommand("XADD", stream, (id_text(id_), "r", record)))
            decision.size_bytes += 2 * len(record)
        decision.operations += effects.operations
        decision.changes += len(effects.changes)

    def reply(self, command: Command, reply: Reply, written_bytes: int = 0) -> None:
        self.done_with(command)
        reply = reply._replace(cost_ms=self.view.account.cost_ms(written_bytes))
        self.decision.replies.setdefault(command.reply_to, []).append(reply)

    def done_with(self, command: Command) -> None:
        """Note that the command is done. A repeat of it does nothing."""
        gateway = command.reply_to
        self.decision.last_numbers[gateway] = command.number
        self.deadlines[gateway] = max(command.deadline, self.deadlines.get(gateway, 0))

    def perform(self, command: Command) -> Any:  # noqa: PLR0911 - one for each kind of request
        """Do one command on the view, and return its result. Raises RequestError, Missing or NextBatch."""
        if command.action == SWEEP:
            return sweep(self.view, command)
        if command.action == LOAD:
            return load(self.view, command)
        # Parsed again: a gateway of another release may have written the body. See `parse_request`.
        request, rights = parse_request(command.body), Rights(self.view, command)
        if self.situation.full and grows(request):
            raise Overloaded(self.situation.full)
        author = Author(command.user, command.connection, command.request, command.trace)
        match request:
            case Put() | Update() | Delete():
                return write(self.view, author, rights, request)
            case Transact():
                return transact(self.view, author, rights, request)
            case Get() | Query():
                return read_serially(self.view, rights, request)
            case Follow():
                rights.may_follow(request.topic)
                return {}
            case Send():
                service_only(command)
                user = str(request.user)
                connections = self.view.count(CONNECTIONS, user)
                append_message(self.view, author, user, request.body)
                return {"delivered": True, "connections": connections}
        raise BadRequest(f"the store has no action {command.action!r}")


def wire_error(error: RequestError) -> dict[str, Any]:
    """The error of a reply on its way to the gateway."""
    return {"code": error.code, "message": error.message, "details": error.details}
