"""`transact`: all or none, one transaction in the changes, and what each operation is told."""

from __future__ import annotations

from typing import Any

import pytest

from tidewire.app import App
from tidewire.audiences import everyone, user
from tidewire.services.store import writing
from tidewire.services.store.updates import apply_update

from .world import GENERATION, NOW, World

Operation = dict[str, Any]


def make_app() -> App:
    app = App("test")
    rooms = app.membership("members", group="room", member="user", readers=everyone, writers=everyone)
    app.table("notes", key="id", readers=everyone, writers=everyone)
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone)
    app.table("letters", key="id", readers=user("to"), writers=user("from"))
    app.table("messages", key=("room", "id"), readers=rooms.of("room"), writers=rooms.of("room"))
    app.table("lasting", key="id", readers=everyone, writers=everyone, expires="until")
    app.check()
    return app


@pytest.fixture
def world() -> World:
    world = World(make_app())
    world.do("alice", "put", table="lines", item={"page": "p", "n": 1, "x": 1})
    world.do("alice", "put", table="letters", item={"id": "p", "to": "alice", "from": "bob"}, role="service")
    world.changes.clear()
    world.now += 1000
    return world


def put(table: str, item: dict[str, Any], **more: Any) -> Operation:
    return {"action": "put", "table": table, "item": item, **more}


def line(n: Any, **more: Any) -> Operation:
    return put("lines", {"page": "p", "n": n, **more})


def check(table: str, key: Any, condition: dict[str, Any]) -> Operation:
    return {"action": "check", "table": table, "key": key, "if": condition}


ONE = {"page": "p", "n": 1}


class TestAll:
    def test_each_operation_has_its_result_in_its_place(self, world: World) -> None:
        operations = [
            line(2),
            {"action": "update", "table": "lines", "key": ONE, "add": {"x": 1}},
            check("lines", {"page": "p", "n": 9}, {"absent": True}),
            put("notes", {"id": "p"}),
            check("letters", "p", {"version": 1}),
        ]
        results = world.do("alice", "transact", operations=operations)["results"]
        positions = [f"0-{GENERATION}-{NOW + 1000}-{seq}" for seq in range(3)]
        assert results[0] == {"key": {"page": "p", "n": 2}, "version": 1, "position": positions[0]}
        item = {"page": "p", "n": 1, "x": 2}
        assert results[1] == {"key": ONE, "version": 2, "position": positions[1], "item": item}
        assert (results[2]["key"], results[2]["version"]) == ({"page": "p", "n": 9}, 0)
        assert results[3] == {"key": {"id": "p"}, "version": 1, "position": positions[2]}
        assert (results[4]["key"], results[4]["version"]) == ({"id": "p"}, 1)

    def test_the_changes_come_one_after_another_as_one_transaction(self, world: World) -> None:
        world.run(
            world.command("bob", "put", table="notes", item={"id": "before"}),
            world.command(
                "alice",
                "transact",
                operations=[line(2), {"action": "delete", "table": "lines", "key": ONE}, put("notes", {"id": "p"})],
            ),
            world.command("bob", "put", table="notes", item={"id": "after"}),
        )
        assert world.batches == 3, "all in one commit"
        before, *changes, after = [change for _, change in world.changes]
        assert [(change.event, change.table, change.by) for change in changes] == [
            ("INSERT", "lines", "alice"),
            ("REMOVE", "lines", "alice"),
            ("INSERT", "notes", "alice"),
        ]
        assert [change.more for change in changes] == [True, True, False]
        (name,) = {change.transaction for change in changes}
        assert name
        assert [(change.transaction, change.more) for change in (before, after)] == [(None, False)] * 2

    def test_two_transactions_have_two_names(self, world: World) -> None:
        for n in (2, 3):
            world.do("alice", "transact", operations=[line(n), put("notes", {"id": "p", "n": n})])
        names = [change.transaction for _, change in world.changes]
        assert names[0] == names[1] != names[2] == names[3]

    def test_one_operation_that_writes_is_a_transaction_without_more(self, world: World) -> None:
        world.do("alice", "transact", operations=[check("notes", "p", {"absent": True}), line(2), line(1, x=1)])
        ((_, change),) = world.changes
        assert change.transaction
        assert change.more is False

    def test_each_operation_sees_the_effects_of_earlier_ones(self, world: World) -> None:
        operations = [
            put("members", {"room": "p", "user": "carol"}),
            put("messages", {"room": "p", "id": 1}),
        ]
        assert world.code("carol", "transact", operations=operations[::-1]) == "forbidden"
        world.do("carol", "transact", operations=operations)

    def test_later_commands_see_its_effects(self, world: World) -> None:
        replies = world.run(
            world.command("alice", "transact", operations=[line(1, x=7), line(2)]),
            world.command("bob", "get", table="lines", key=ONE),
        )
        assert replies[1].result["item"]["x"] == 7
        assert world.batches == 3

    def test_a_write_without_effect_makes_no_change_and_keeps_the_version(self, world: World) -> None:
        operations = [line(1, x=1), check("letters", "p", {"version": 1})]
        results = world.do("alice", "transact", operations=operations)["results"]
        assert [result["version"] for result in results] == [1, 1]
        assert world.changes == []

    def test_a_repeated_request_gives_the_first_result_and_writes_nothing(self, world: World) -> None:
        update = {"action": "update", "table": "lines", "key": ONE, "add": {"x": 1}}
        first = world.do("alice", "transact", operations=[update, line(2)], request="r1")
        world.now += 1000
        assert world.do("alice", "transact", operations=[update, line(2)], request="r1") == first
        assert len(world.changes) == 2

    def test_an_item_whose_time_has_come_is_removed_within_the_transaction(self, world: World) -> None:
        world.do("alice", "put", table="lasting", item={"id": "p", "until": world.now / 1000 + 1})
        world.now += 1000
        world.changes.clear()
        operations = [line(2), put("lasting", {"id": "p"}, **{"if": {"absent": True}})]
        world.do("alice", "transact", operations=operations)
        assert [(change.event, change.by) for _, change in world.changes] == [
            ("INSERT", "alice"),
            ("REMOVE", "tidewire:expiry"),
            ("INSERT", "alice"),
        ]
        assert [change.more for _, change in world.changes] == [True, True, False]


BAD: list[tuple[str, Operation, str]] = [
    ("not there", {"action": "update", "table": "notes", "key": "p", "set": {"x": 1}}, "not_found"),
    ("not his to delete", {"action": "delete", "table": "letters", "key": "p"}, "forbidden"),
    ("not his to write", put("messages", {"room": "p", "id": 1}), "forbidden"),
    ("a check of a version", check("lines", ONE, {"version": 2}), "conflict"),
    ("a check of absence", check("lines", ONE, {"absent": True}), "conflict"),
    ("a check of values", check("lines", ONE, {"equals": {"x": 2}}), "conflict"),
    ("a check of presence", check("notes", "p", {"present": True}), "not_found"),
    ("an if", line(1, x=2) | {"if": {"version": 2}}, "conflict"),
    ("too large", line(3, x="x" * 1000), "too_large"),
    ("of another kind", line("three"), "bad_request"),
    ("written by gateways alone", put("connections", {"user": "p", "connection": "c"}), "forbidden"),
]


class TestNone:
    @pytest.mark.parametrize("place", ["first", "between", "last"])
    @pytest.mark.parametrize(("operation", "code"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
    def test_one_operation_that_fails_undoes_all_and_is_named(
        self, operation: Operation, code: str, place: str
    ) -> None:
        world = World(make_app(), item_bytes=500)
        world.do("alice", "put", table="lines", item={"page": "p", "n": 1, "x": 1})
        letter = {"id": "p", "to": "alice", "from": "bob"}
        world.do("alice", "put", table="letters", item=letter, role="service")
        operations = [line(10), line(11)]
        number = {"first": 0, "between": 1, "last": 2}[place]
        operations.insert(number, operation)
        held = {key: dict(fields) for key, fields in world.hashes.items() if fields}
        error = world.refused("alice", "transact", operations=operations)
        assert error["code"] == code
        assert error["details"]["operation"] == number
        assert f"operations[{number}]" in error["message"]
        assert {key: fields for key, fields in world.hashes.items() if fields} == held
        assert [entry["item"]["n"] for entry in world.do("bob", "query", table="lines", key="p")["items"]] == [1]
        world.do("alice", "transact", operations=[line(10), line(11)])

    def test_writers_are_checked_before_if(self, world: World) -> None:
        letter = put("letters", {"id": "p", "to": "alice", "from": "alice"})
        for condition in ({"version": 1}, {"version": 7}, {"absent": True}):
            operations = [line(2), letter | {"if": condition}]
            assert world.code("alice", "transact", operations=operations) == "forbidden"

    def test_writers_are_checked_on_the_item_as_it_is_and_as_it_would_be(self, world: World) -> None:
        over = [put("letters", {"id": "p", "to": "alice", "from": "alice"})]
        assert world.code("alice", "transact", operations=over) == "forbidden", "taken"
        assert world.code("bob", "transact", operations=over) == "forbidden", "given away"

    def test_a_conflict_of_an_operation_names_the_version_to_users_who_may_read(self, world: World) -> None:
        error = world.refused("alice", "transact", operations=[line(2), check("lines", ONE, {"version": 5})])
        assert error["details"] == {"version": 1, "operation": 1}

    @pytest.mark.parametrize("condition", [{"present": True}, {"version": 1}, {"equals": {"to": "alice"}}])
    def test_a_check_tells_a_stranger_nothing(self, world: World, condition: dict[str, Any]) -> None:
        errors = []
        for id_ in ("p", "q"):  # the one is there, the other is not
            letter = check("letters", id_, condition)
            errors.append(world.refused("carol", "transact", operations=[letter]))
        assert errors[0] == errors[1]

    def test_a_refused_one_is_a_first_result_too(self, world: World) -> None:
        operations = [line(2), check("notes", "p", {"present": True})]
        first = world.refused("alice", "transact", operations=operations, request="r1")
        world.do("alice", "put", table="notes", item={"id": "p"})
        assert world.refused("alice", "transact", operations=operations, request="r1") == first

    def test_a_command_that_waited_too_long_is_not_done(self, world: World) -> None:
        assert world.code("alice", "transact", operations=[line(2)], late=True) == "timeout"


def test_a_check_that_fails_is_found_before_images_are_built(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    built = 0

    def counted(*args: Any) -> Any:
        nonlocal built
        built += 1
        return apply_update(*args)

    monkeypatch.setattr(writing, "apply_update", counted)
    update = {"action": "update", "table": "lines", "key": ONE, "add": {"x": 1}}
    for condition, code in (({"version": 9}, "conflict"), ({"absent": True}, "conflict")):
        world.do("alice", "put", table="notes", item={"id": "p"})
        error = world.refused("alice", "transact", operations=[update, check("notes", "p", condition)])
        assert (error["code"], error["details"]["operation"]) == (code, 1)
    error = world.refused(
        "alice", "transact", operations=[update, check("lines", {"page": "p", "n": 9}, {"present": True})]
    )
    assert (error["code"], error["details"]["operation"]) == ("not_found", 1)
    assert built == 0
    world.do("alice", "transact", operations=[update, check("notes", "p", {"version": 1})])
    assert built == 1
