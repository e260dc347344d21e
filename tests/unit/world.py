"""A little Redis made of dicts, on which the store's decisions are made, committed and looked at."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tidewire.app import App
from tidewire.errors import RequestError
from tidewire.model.protocol import Get, Query, parse_request
from tidewire.model.records import Change, Command, FirstReply, ItemRecord, Position, Reply, unpack
from tidewire.model.values import ItemKey
from tidewire.redis.keys import Keys
from tidewire.services.store.batches import DETACHABLE
from tidewire.services.store.budget import UNLIMITED, Account, Cut, cut
from tidewire.services.store.decide import CHORES, Decision, decide, wire_error
from tidewire.services.store.facts import (
    CHORE_BATCH,
    ChangesFact,
    ConnectedFact,
    CountFact,
    DueFact,
    Fact,
    FieldsFact,
    ItemFact,
    KindFact,
    LastNumberFact,
    Page,
    PageFact,
    RequestFact,
    Stream,
    TombstonesFact,
    Value,
)
from tidewire.services.store.indexes import Filling, declared, follow
from tidewire.services.store.reading import reading_of
from tidewire.services.store.rights import Rights
from tidewire.services.store.view import Missing, Situation, View

KEYS = Keys("dev", 1)
NOW = 1_795_409_459_002
GENERATION = 3
Result = dict[str, Any]


class World:
    """One partition: what its commits have left, and what the store asks of it."""

    def __init__(self, app: App, *, item_bytes: int = 262144) -> None:
        self.app = app
        self.now = NOW
        self.last = (0, 0)
        self.item_bytes = item_bytes
        self.hashes: dict[bytes, dict[bytes, bytes]] = defaultdict(dict)
        self.orders: dict[bytes, set[bytes]] = defaultdict(set)
        self.strings: dict[bytes, tuple[Any, int]] = {}
        self.sets: dict[bytes, set[bytes]] = defaultdict(set)
        self.changes: list[tuple[str, Change]] = []
        self.kinds: dict[str, str] = {}
        self.scores: dict[bytes, dict[bytes, Any]] = defaultdict(dict)
        self.stream = Stream(0, (0, 0), (0, 0), {})
        self.batches = 0
        self.floor = 0
        self.rounds = 0  # of fetching, for the last decision
        self.limits = UNLIMITED
        self.detached = 0
        self.trims: list[tuple[Any, ...]] = []
        self.rechecked: list[Any] = []
        self._indexed = 0
        self._numbers = itertools.count(1)

    def command(
        self,
        who: str,
        action: str,
        *,
        role: str = "client",
        claims: dict[str, Any] | None = None,
        late: bool = False,
        request: str | None = None,
        **body: Any,
    ) -> Command:
        if "if_" in body:
            body["if"] = body.pop("if_")
        deadline = self.now - 1 if late else self.now + 1000
        number = next(self._numbers)
        return Command(
            action, {"action": action, **body}, who, role, claims or {}, "c1", request, 600_000, deadline, "g1", number
        )

    def run(self, *commands: Command | None, **chores: Any) -> list[Reply]:
        """Decide, fetch and commit until all are consumed; the replies in the order of the commands.

        `chores` are those of the Situation: they are done with each batch.
        """
        replies: dict[int, Reply] = {}
        left: Sequence[Command | None] = commands
        while left:
            decision = self.decided(left, **chores)
            assert decision.consumed > 0, "each round gets something done"
            self.commit(decision)
            assert set(decision.replies) <= {"g1"}
            for reply in decision.replies.get("g1", []):
                assert reply.number not in replies
                replies[reply.number] = reply
            for command, last in decision.detached:
                replies[command.number] = self.read(command, last)
            left = left[decision.consumed :]
        return [replies[command.number] for command in commands if command]

    def read(self, command: Command, last: tuple[int, int]) -> Reply:
        """Answer an expensive read beside the partition."""
        self.detached += 1
        self.rounds = 0
        facts, account = dict[Fact, Value](), Account(self.limits, lambda: 0.0)
        situation = Situation(0, GENERATION, self.now, last, self.item_bytes)
        view = View(self.app, KEYS, facts, situation)
        view.begin(account)
        request, rights = parse_request(command.body), Rights(view, command)
        assert isinstance(request, Get | Query)
        try:
            reading = reading_of(request, view, rights, serial=False)
            while not reading.done:
                try:
                    reading.step(view, rights)
                except Missing as need:
                    if reading.turning:
                        facts.clear()
                    self.rounds += 1
                    account.ask(len(need.facts))
                    account.check()
                    facts |= {fact: self.fetch(fact) for fact in need.facts}
        except RequestError as error:
            return Reply(command.number, None, wire_error(error), account.cost_ms())
        return Reply(command.number, reading.result(view), None, account.cost_ms())

    def chore(self, **chores: Any) -> Decision:
        """Decide a batch without a command."""
        decision = self.decided((), **chores)
        self.commit(decision)
        return decision

    def decided(self, commands: Sequence[Command | None], **chores: Any) -> Decision:
        facts: dict[Fact, Value] = {}
        accounts = [Account(self.limits, lambda: 0.0) for _ in commands]
        detachable = [command is not None and command.action in DETACHABLE for command in commands]
        chosen = Cut(len(commands), frozenset())
        situation = Situation(0, GENERATION, self.now, self.last, self.item_bytes, floor=self.floor, **chores)
        for self.rounds in range(100):
            found = decide(self.app, KEYS, facts, commands[: chosen.limit], situation, accounts, chosen.detached)
            if isinstance(found, Decision):
                return found
            wanted = {fact for needed in found.values() for fact in needed}
            for number, needed in found.items():
                if number != CHORES:
                    accounts[number].ask(len(needed))
            before, chosen = chosen, cut(accounts, detachable, found, chosen)
            assert wanted - facts.keys() or chosen != before, "what was given is not asked for again"
            facts |= {fact: self.fetch(fact) for fact in wanted}
        raise AssertionError("the facts are never enough")

    def fetch(self, fact: Fact) -> Value:  # noqa: PLR0911 - one for each kind of fact
        if isinstance(fact, ItemFact):
            raw = self.hashes[KEYS.items(fact.key.table, fact.key.partition)].get(fact.key.field)
            return ItemRecord(*unpack(raw)) if raw else None
        if isinstance(fact, CountFact):
            return len(self.orders[KEYS.order(fact.table, fact.partition)])
        if isinstance(fact, RequestFact):
            stored = self.strings.get(KEYS.request(0, fact.user, fact.request))
            return FirstReply(*unpack(stored[0])) if stored else None
        if isinstance(fact, LastNumberFact):
            last: int = self.strings.get(KEYS.last_number(0, fact.gateway), (0, 0))[0]
            return last
        if isinstance(fact, ConnectedFact):
            return sorted(tuple(unpack(raw)) for raw in self.sets[KEYS.connected(0, fact.gateway)])
        if isinstance(fact, KindFact):
            return self.kinds.get(fact.table)
        if isinstance(fact, DueFact):
            due = self.scores[KEYS.expiries(0)]
            found = [ItemKey(*unpack(member)) for member, at in due.items() if float(at) <= fact.now / 1000]
            return found[:CHORE_BATCH]
        if isinstance(fact, TombstonesFact):
            dead = self.scores[KEYS.tombstones(0)]
            found = [ItemKey(*unpack(member)) for member, at in dead.items() if float(at) < fact.before]
            return found[:CHORE_BATCH]
        if isinstance(fact, FieldsFact):
            return len(self.hashes[KEYS.items(fact.table, fact.partition)])
        if isinstance(fact, ChangesFact):
            return self.stream
        return self.page(fact)

    def page(self, fact: PageFact) -> Page:
        fields = [
            field
            for field in sorted(self.orders[fact.order], reverse=fact.reverse)
            if _within(field, fact.low, fact.high)
        ]
        records = self.hashes[fact.items]
        found = [ItemRecord(*unpack(records[field])) for field in fields[: fact.limit]]
        return Page(found, len(fields) > fact.limit)

    def commit(self, decision: Decision) -> None:
        self.batches += 1
        for command, key, args in decision.operations:
            if command == "XADD":
                id_, _, record = args
                assert isinstance(id_, str)
                assert isinstance(record, bytes)
                self.changes.append((f"0-{GENERATION}-{id_}", Change(*unpack(record))))
            elif key == KEYS.partition(0):
                assert (command, args[0]) == ("HSET", "floor")
                assert args[1] == decision.floor
            elif command == "XTRIM":
                assert key == KEYS.changes(0)
                self.trims.append(args)
            elif command == "HSET":
                assert isinstance(args[0], bytes)
                assert isinstance(args[1], bytes)
                self.hashes[key][args[0]] = args[1]
            elif command == "ZADD":
                assert isinstance(args[1], bytes)
                self.orders[key].add(args[1])
                self.scores[key][args[1]] = args[0]
            elif command == "ZREM":
                assert isinstance(args[0], bytes)
                self.orders[key].remove(args[0])
                del self.scores[key][args[0]]
            elif command == "HDEL":
                assert isinstance(args[0], bytes)
                del self.hashes[key][args[0]]
            elif command == "SET":
                assert isinstance(args[0], bytes | int)
                assert isinstance(args[2], int)
                self.strings[key] = (args[0], args[2])
            else:
                self._commit_other(command, key, args)
        self.last, self.floor = decision.last, decision.floor
        self.kinds |= decision.kinds

    def _commit_other(self, command: str, key: bytes, args: tuple[Any, ...]) -> None:
        if command == "DEL":
            self.hashes.pop(key, None)
        elif command == "SPUBLISH":
            self.rechecked.append(args[0])
        elif command == "SADD":
            self.sets[key].add(args[0])
        else:
            assert command == "SREM", command
            self.sets[key].discard(args[0])

    def follow(self) -> None:
        """The indexes come as far as the changes are."""
        indexes = {index: Filling(add=True, place=None, done=True) for index in declared(self.app)}
        for position, change in self.changes[self._indexed :]:
            self._indexed += 1
            links: Mapping[int, Any] = follow(self.app, KEYS, indexes, Position(*map(int, position.split("-"))), change)
            for effect in (effect for effects in links.values() for effect in effects):
                for command, key, args in effect.operations:
                    if command == "HSET":
                        self.hashes[key][args[0]] = args[1]
                    elif command == "HDEL":
                        self.hashes[key].pop(args[0], None)
                    elif command == "ZADD":
                        self.orders[key].add(args[1])
                    else:
                        assert command == "ZREM", command
                        self.orders[key].discard(args[0])

    def kept_replies(self) -> dict[bytes, tuple[Any, int]]:
        return {key: value for key, value in self.strings.items() if key != KEYS.last_number(0, "g1")}

    # One command at a time, for most tests.

    def do(self, who: str, action: str, **fields: Any) -> Result:
        (reply,) = self.run(self.command(who, action, **fields))
        assert reply.error is None, reply.error
        assert isinstance(reply.result, dict)
        return reply.result

    def refused(self, who: str, action: str, **fields: Any) -> dict[str, Any]:
        before = len(self.changes)
        (reply,) = self.run(self.command(who, action, **fields))
        assert reply.result is None
        assert reply.error
        assert len(self.changes) == before, "what is refused changes nothing"
        return reply.error

    def code(self, who: str, action: str, **fields: Any) -> str:
        return str(self.refused(who, action, **fields)["code"])


def _within(field: bytes, low: bytes, high: bytes) -> bool:
    above = low == b"-" or (field > low[1:] if low[:1] == b"(" else field >= low[1:])
    below = high == b"+" or (field < high[1:] if high[:1] == b"(" else field <= high[1:])
    return above and below
