"""What one command may cost: facts are asked for all at once, and what costs too much is detached, cut or refused."""

from __future__ import annotations

from typing import Any

import pytest

from tidewire.app import App
from tidewire.audiences import everyone, user
from tidewire.errors import ConfigurationError
from tidewire.process.settings import Settings
from tidewire.services.store.budget import (
    CHECK_EVERY,
    FACTS_PER_MS,
    MAX_BATCH_FACTS,
    MAX_SHARED_FACTS,
    MAX_SHARED_ROUNDS,
    WRITTEN_BYTES_PER_MS,
    Account,
    Cut,
    Exhausted,
    Limits,
    cut,
)
from tidewire.services.store.decide import Decision, decide
from tidewire.services.store.facts import ItemFact, LastNumberFact
from tidewire.services.store.view import Situation

from .world import GENERATION, KEYS, NOW, World


def make_app() -> App:
    app = App("test")
    rooms = app.membership("members", group="room", member="user", readers=everyone, writers=everyone)
    app.table("docs", key="id", readers=rooms.of("room"), writers=rooms.of("room"), indexes={"by_kind": ("kind", "id")})
    app.table("papers", key=("page", "n"), readers=rooms.of("room"), writers=rooms.of("room"))
    app.table("faces", key="user", readers=rooms.peers("user"), writers=user("user"))
    app.table("notes", key="id", readers=everyone, writers=everyone)
    app.check()
    return app


@pytest.fixture
def world() -> World:
    return World(make_app())


def fill(world: World, count: int, *, of: str = "alice") -> None:
    """Documents of one kind, each of a room of its own; the user is in the last one."""
    for n in range(count):
        world.do("job", "put", role="service", table="docs", item={"id": n, "kind": "k", "room": f"r{n}"})
    world.do("job", "put", role="service", table="members", item={"room": f"r{count - 1}", "user": of})
    world.follow()


class TestRounds:
    def test_a_page_asks_for_the_memberships_of_all_its_items_at_once(self, world: World) -> None:
        fill(world, 300)
        result = world.do("alice", "query", table="docs", index="by_kind", key="k", limit=1000)
        assert [entry["item"]["id"] for entry in result["items"]] == [299]
        assert world.rounds == 2, "the page, then all memberships"

    def test_items_behind_a_page_that_may_not_be_read_cost_two_rounds_a_page(self, world: World) -> None:
        fill(world, 300)
        result = world.do("alice", "query", table="docs", index="by_kind", key="k", limit=10)
        assert [entry["item"]["id"] for entry in result["items"]] == [299]
        assert world.rounds == 4

    def test_peers_are_looked_up_in_all_groups_at_once(self, world: World) -> None:
        for n in range(100):
            world.do("job", "put", role="service", table="members", item={"room": f"r{n}", "user": "bob"})
        world.do("job", "put", role="service", table="members", item={"room": "r99", "user": "alice"})
        world.do("job", "put", role="service", table="faces", item={"user": "bob", "smiles": True})
        world.follow()
        assert world.do("alice", "get", table="faces", key="bob")["item"]["smiles"]
        assert world.rounds <= 4, "the gateway's number, the item, his groups, her memberships"
        assert world.code("mallory", "get", table="faces", key="bob") == "not_found"

    def test_a_transaction_asks_for_what_its_operations_need_at_once(self, world: World) -> None:
        for n in range(50):
            world.do("job", "put", role="service", table="members", item={"room": f"r{n}", "user": "alice"})
        operations = [
            {"action": "put", "table": "papers", "item": {"page": "p", "n": n, "room": f"r{n}"}} for n in range(50)
        ]
        assert len(world.do("alice", "transact", operations=operations)["results"]) == 50
        assert world.rounds <= MAX_SHARED_ROUNDS
        operations[30]["item"] = {"page": "p", "n": 130, "room": "r130"}
        error = world.refused("alice", "transact", operations=operations)
        assert (error["code"], error["details"]) == ("forbidden", {"operation": 30})

    def test_an_import_asks_for_what_its_items_need_at_once(self, world: World) -> None:
        rows = [["members", {"room": f"r{n}", "user": "alice"}] for n in range(50)]
        (reply,) = world.run(world.command("job", "load", role="service", items=rows))
        assert reply.result == 50
        assert world.rounds <= MAX_SHARED_ROUNDS


class TestBudget:
    @pytest.mark.parametrize(
        ("limits", "bound"),
        [
            (Limits(rounds=2), "rounds"),
            (Limits(facts=50), "facts"),
            (Limits(evaluations=64), "evaluations"),
        ],
    )
    def test_a_query_beyond_a_bound_is_too_large_and_names_bound_and_setting(
        self, world: World, limits: Limits, bound: str
    ) -> None:
        fill(world, 100)
        world.limits = limits
        error = world.refused("alice", "query", table="docs", index="by_kind", key="k", limit=10)
        assert error["code"] == "too_large"
        assert error["details"] == {"limit": max(limits), "bound": bound}
        assert f"TIDEWIRE_COMMAND_{bound.upper()}" in error["message"]
        assert "narrower" in error["message"]

    def test_a_write_beyond_a_bound_is_too_large_and_writes_nothing(self, world: World) -> None:
        world.limits = Limits(bytes=1000)
        operations = [
            {"action": "put", "table": "notes", "item": {"id": "p", "text": "x" * 2000}},
            {"action": "put", "table": "papers", "item": {"page": "p", "n": 1, "room": "r"}},
        ]
        error = world.refused("job", "transact", role="service", operations=operations, request="q")
        assert (error["code"], error["details"]["bound"]) == ("too_large", "bytes")
        world.limits = Limits()
        assert world.do("job", "transact", role="service", operations=operations, request="q"), (
            "it is done when it can be"
        )

    def test_cpu_time_is_counted_over_all_passes_and_not_between_them(self) -> None:
        now_s = 0.0
        account = Account(Limits(ms=100), lambda: now_s)
        for _ in range(2):
            account.begin()
            now_s += 0.05
            account.check()
            account.pause()
            now_s += 10
        account.begin()
        now_s += 0.002
        for _ in range(CHECK_EVERY - 1):
            account.evaluate()
        with pytest.raises(Exhausted, match="TIDEWIRE_COMMAND_MS") as caught:
            account.evaluate()
        assert caught.value.details == {"limit": 100, "bound": "ms"}

    def test_a_bound_of_zero_is_none(self) -> None:
        account = Account(Limits(), lambda: 0.0)
        account.ask(10**9)
        account.add_bytes(10**12)
        account.check()

    def test_the_settings_are_the_limits(self) -> None:
        settings = Settings(command_rounds=1, command_facts=2, command_evaluations=3, command_bytes=4, command_ms=5)
        assert Limits.of(settings) == (1, 2, 3, 4, 5)
        with pytest.raises(ConfigurationError, match="TIDEWIRE_COMMAND_MS=-1: at least 0"):
            Settings(command_ms=-1)

    def test_a_deadline_that_passes_while_facts_are_fetched_counts(self, world: World) -> None:
        command = world.command("alice", "put", table="notes", item={"id": "n"})
        facts: Any = {LastNumberFact("g1"): 0}
        situation = Situation(0, GENERATION, NOW, (0, 0), 0)
        assert not isinstance(decide(world.app, KEYS, facts, [command], situation), Decision)
        late = Situation(0, GENERATION, NOW, (0, 0), 0, waited_ms=1001)
        decision = decide(world.app, KEYS, facts, [command], late)
        assert isinstance(decision, Decision)
        assert decision.replies["g1"][0].error["code"] == "timeout"  # type: ignore[index]


def accounts(*facts: int) -> list[Account]:
    found = [Account(clock=lambda: 0.0) for _ in facts]
    for account, count in zip(found, facts, strict=True):
        account.ask(count)
    return found


class TestBatches:
    def test_an_expensive_read_is_detached_and_the_others_go_on(self, world: World) -> None:
        fill(world, 300)
        commands = [
            world.command("bob", "put", table="notes", item={"id": "before"}),
            world.command("alice", "query", table="docs", index="by_kind", key="k", limit=1000),
            world.command("bob", "put", table="notes", item={"id": "after"}),
        ]
        world.batches = 0
        replies = world.run(*commands)
        assert (world.batches, world.detached) == (1, 1)
        assert [entry["item"]["id"] for entry in replies[1].result["items"]] == [299]
        assert [reply.error for reply in replies] == [None] * 3

    def test_a_read_that_is_detached_is_not_done_again_and_has_the_position_of_its_place(self, world: World) -> None:
        for n in range(300):
            item = {"page": "p", "n": n, "room": f"r{n}"}
            world.do("job", "put", role="service", table="papers", item=item)
        commands = [
            world.command("bob", "put", table="notes", item={"id": "p"}),
            world.command("alice", "query", table="papers", key="p", limit=1000),
            world.command("bob", "put", table="notes", item={"id": "p", "x": 1}),
        ]
        replies = world.run(*commands)
        assert world.detached == 1
        assert replies[1].result["position"] == replies[0].result["position"] != replies[2].result["position"]
        assert world.decided(commands[1:2]).detached == [], "the gateway's number says that it is done"

    def test_a_query_of_one_small_page_stays_where_it_is(self, world: World) -> None:
        world.do("bob", "put", table="members", item={"room": "r", "user": "alice"})
        for n in range(150):
            world.do("job", "put", role="service", table="papers", item={"page": "p", "n": n, "room": "r"})
        assert len(world.do("alice", "query", table="papers", key="p")["items"]) == 100
        assert world.detached == 0

    def test_a_batch_is_cut_before_an_expensive_write_which_is_then_alone(self) -> None:
        expensive = MAX_SHARED_FACTS + 1
        whole = Cut(3, frozenset())
        assert cut(accounts(1, expensive, 1), [False] * 3, {}, whole) == Cut(1, frozenset())
        assert cut(accounts(expensive, 1, 1), [False] * 3, {}, whole) == Cut(1, frozenset())
        assert cut(accounts(1, 1, 1), [False] * 3, {}, whole) == whole
        assert cut(accounts(1, expensive, expensive), [False, True, True], {}, whole) == Cut(3, frozenset({1, 2}))

    def test_a_batch_is_cut_where_its_commands_need_too_much_together(self) -> None:
        needs = dict.fromkeys(range(3), [ItemFact(None)] * (MAX_BATCH_FACTS // 2))  # type: ignore[arg-type]
        assert cut(accounts(1, 1, 1), [False] * 3, needs, Cut(3, frozenset())) == Cut(2, frozenset())

    def test_a_batch_ends_when_it_has_taken_its_time(self, world: World) -> None:
        now_s = 0.0

        def clock() -> float:
            nonlocal now_s
            now_s += 0.01
            return now_s

        commands = [world.command("alice", "put", table="nothing", item={}) for _ in range(20)]
        facts: Any = {LastNumberFact("g1"): 0}
        decision = decide(world.app, KEYS, facts, commands, Situation(0, GENERATION, NOW, (0, 0), 0), clock=clock)
        assert isinstance(decision, Decision)
        assert 0 < decision.consumed < 20


class TestKinds:
    """Within a table, sort keys are of one kind. Only a write that was accepted settles which."""

    def papers(self, n: Any) -> dict[str, Any]:
        return {"action": "put", "table": "papers", "item": {"page": "p", "n": n, "room": "r"}}

    def test_a_refused_transaction_settles_nothing(self, world: World) -> None:
        failing = {"action": "check", "table": "notes", "key": "p", "if": {"present": True}}
        operations = [self.papers(1), failing]
        assert world.code("job", "transact", role="service", operations=operations) == "conflict"
        assert world.kinds == {}
        assert world.do("job", "transact", role="service", operations=[self.papers("one")])
        assert world.kinds == {"papers": "s"}

    def test_a_failed_condition_settles_nothing_for_later_commands(self, world: World) -> None:
        item = {"page": "p", "n": 1, "room": "r"}
        refused, done, wrong = world.run(
            world.command("job", "put", role="service", table="papers", item=item, if_={"present": True}),
            world.command("job", "put", role="service", table="papers", item=item | {"n": "one"}),
            world.command("job", "put", role="service", table="papers", item=item),
        )
        assert refused.error
        assert refused.error["code"] == "conflict"
        assert done.error is None
        assert wrong.error
        assert wrong.error["code"] == "bad_request"
        assert world.kinds == {"papers": "s"}

    def test_a_transaction_of_both_kinds_is_refused_and_settles_nothing(self, world: World) -> None:
        operations = [self.papers(1), self.papers("one")]
        assert world.code("job", "transact", role="service", operations=operations) == "bad_request"
        assert world.kinds == {}


class TestCosts:
    """What a command is said to have cost, in ms. The clock of these tests stands still."""

    def cost(self, world: World, action: str, **fields: Any) -> float:
        (reply,) = world.run(world.command("alice", action, **fields))
        return reply.cost_ms

    def test_a_write_costs_by_the_bytes_of_its_change(self, world: World) -> None:
        small = self.cost(world, "put", table="notes", item={"id": "a", "text": "x"})
        large = self.cost(world, "put", table="notes", item={"id": "b", "text": "x" * 100_000})
        assert small < 0.1
        assert 2 * 100_000 / WRITTEN_BYTES_PER_MS < large < 3 * 100_000 / WRITTEN_BYTES_PER_MS

    def test_a_read_costs_by_its_facts(self, world: World) -> None:
        fill(world, 200)
        cheap = self.cost(world, "get", table="notes", key="none")
        dear = self.cost(world, "query", table="docs", index="by_kind", key="k", limit=1000)
        assert cheap < 0.1
        assert dear > 200 / FACTS_PER_MS

    def test_a_refused_write_costs_no_change(self, world: World) -> None:
        item = {"id": "a", "text": "x" * 100_000}
        assert self.cost(world, "put", table="notes", item=item, if_={"version": 5}) < 1
