"""What a batch of commands comes to, on a little Redis made of dicts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers import LONG
from tidewire.app import App, Write
from tidewire.audiences import Audience, everyone, nobody, user
from tidewire.model.records import Change, Item
from tidewire.model.values import ItemKey

from .world import GENERATION, NOW, World


def only_owner_renames(write: Write) -> Audience | bool:
    if write.claims.get("admin"):
        return True
    return write.old is None or write.old.get("owner") == write.user


def broken(write: Write) -> Audience:
    raise RuntimeError("a mistake of the application")


def broken_for_some(item: Item) -> Audience:
    if item.get("fault"):
        raise RuntimeError("a mistake of the application")
    return everyone


def make_app() -> App:
    app = App("test")
    rooms = app.membership(
        "members", group="room", member="user", writers=rooms_owner() | everyone_may_take_a_vacant_room()
    )
    app.table("notes", key="id", readers=everyone, writers=everyone)
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone)
    app.table("words", key=("page", "n"), readers=everyone, writers=everyone)
    app.table("mine", key=("owner", "id"), readers=user("owner"), writers=user("owner"))
    app.table("by_author", key="id", readers=everyone, writers=user("author"))
    app.table("letters", key="id", readers=user("to"), writers=everyone)
    app.table("messages", key=("room", "id"), readers=rooms.of("room"), writers=rooms.of("room") & user("author"))
    app.table("secrets", key="id", readers=everyone, writers=everyone, hidden=("secret",))
    app.table("ruled", key="id", readers=everyone, writers=only_owner_renames)
    app.table("broken", key="id", readers=everyone, writers=broken)
    app.table("faulty", key="id", readers=broken_for_some, writers=everyone)
    app.table("closed", key="id")
    app.check()
    return app


def rooms_owner() -> Audience:
    return App("shape").membership("members", group="room", member="user").of("room", role="owner")


def everyone_may_take_a_vacant_room() -> Audience:
    return App("shape").membership("members", group="room", member="user").vacant("room") & user("user")


@pytest.fixture
def world() -> World:
    return World(make_app())


class TestWriting:
    def test_versions_are_one_two_three(self, world: World) -> None:
        versions = [world.do("alice", "put", table="notes", item={"id": "n", "x": x})["version"] for x in range(3)]
        assert versions == [1, 2, 3]
        assert [change.event for _, change in world.changes] == ["INSERT", "MODIFY", "MODIFY"]

    def test_a_put_gives_key_version_and_position_and_makes_a_change(self, world: World) -> None:
        item = {"page": "p", "n": 1, "text": "x"}
        result = world.do("alice", "put", table="lines", item=item)
        position = f"0-{GENERATION}-{NOW}-0"
        assert result == {"key": {"page": "p", "n": 1}, "version": 1, "position": position}
        key = {"page": "p", "n": 1}
        change = Change("INSERT", "lines", key, 1, item, None, NOW, "alice", "c1", None, generation=GENERATION)
        assert world.changes == [(position, change._replace(previous=[0, 0]))]

    def test_a_put_replaces_the_item_whole(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n", "a": 1})
        world.do("alice", "put", table="notes", item={"id": "n", "b": 2})
        assert world.do("alice", "get", table="notes", key="n")["item"] == {"id": "n", "b": 2}
        assert world.changes[-1][1].old == {"id": "n", "a": 1}

    def test_an_update_changes_parts_and_shows_the_item(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n", "a": 1, "b": 1})
        result = world.do("bob", "update", table="notes", key="n", set={"c.d": 1}, remove=["b"], add={"a": 2})
        item = {"id": "n", "a": 3, "c": {"d": 1}}
        assert result == {"key": {"id": "n"}, "version": 2, "position": world.changes[-1][0], "item": item}
        assert world.changes[-1][1].by == "bob"

    def test_a_delete_removes_with_a_version_and_the_old_image(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n"})
        result = world.do("alice", "delete", table="notes", key={"id": "n"})
        position, change = world.changes[-1]
        assert result == {"key": {"id": "n"}, "version": 2, "position": position}
        assert (change.event, change.new, change.old) == ("REMOVE", None, {"id": "n"})
        for action in ("get", "delete", "update"):
            assert world.code("alice", action, table="notes", key="n") == "not_found"

    def test_versions_never_go_back_over_a_delete_and_a_new_put(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n"})
        world.do("alice", "delete", table="notes", key="n")
        assert world.do("alice", "put", table="notes", item={"id": "n"})["version"] == 3
        assert world.changes[-1][1].event == "INSERT"

    @pytest.mark.parametrize("action", ["put", "update"])
    def test_a_write_that_changes_nothing_makes_no_change_and_keeps_the_version(
        self, world: World, action: str
    ) -> None:
        item = {"id": "n", "x": [1, {"y": None}]}
        first = world.do("alice", "put", table="notes", item=item)
        fields: dict[str, Any] = (
            {"item": dict(item)} if action == "put" else {"key": "n", "set": {"x": [1, {"y": None}]}}
        )
        again = world.do("bob", action, table="notes", **fields)
        assert (again["version"], again["position"]) == (1, first["position"])
        assert len(world.changes) == 1
        assert world.do("alice", "get", table="notes", key="n")["by"] == "alice"

    def test_true_is_another_value_than_one(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n", "x": 1})
        assert world.do("alice", "put", table="notes", item={"id": "n", "x": True})["version"] == 2

    def test_one_and_one_point_nought_name_one_item(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": 1})
        assert world.do("alice", "get", table="notes", key=1.0)["version"] == 1
        assert world.code("alice", "get", table="notes", key="1") == "not_found"

    def test_an_update_cannot_change_the_key(self, world: World) -> None:
        world.do("alice", "put", table="lines", item={"page": "p", "n": 1})
        for parts in ({"set": {"n": 2}}, {"remove": ["n"]}, {"set": {"page": "q"}}, {"add": {"n": 1}}):
            assert world.code("alice", "update", table="lines", key={"page": "p", "n": 1}, **parts) == "bad_request"

    @pytest.mark.parametrize(
        "fields",
        [
            {"table": "nothing", "item": {"id": 1}},
            {"table": "lines", "item": {"page": "p"}},
            {"table": "lines", "item": {"page": "p", "n": True}},
            {"table": "lines", "item": {"page": "p", "n": 2**54}},
        ],
    )
    def test_a_put_that_has_no_place_is_a_bad_request(self, world: World, fields: Any) -> None:
        assert world.code("alice", "put", **fields) == "bad_request"

    def test_an_item_beyond_the_limit_is_too_large_by_put_and_by_update(self) -> None:
        world = World(make_app(), item_bytes=100)
        world.do("alice", "put", table="notes", item={"id": "n", "x": "x" * 80})
        assert world.code("alice", "put", table="notes", item={"id": "n", "x": "x" * 200}) == "too_large"
        error = world.refused("alice", "update", table="notes", key="n", set={"y": "x" * 20})
        assert (error["code"], error["details"]["limit"]) == ("too_large", 100)
        assert "TIDEWIRE_LIMIT_ITEM_BYTES" in error["message"]

    def test_a_limit_of_zero_means_no_limit(self) -> None:
        World(make_app(), item_bytes=0).do("alice", "put", table="notes", item={"id": "n", "x": "x" * 10**6})

    def test_positions_rise_even_when_the_clock_goes_back(self, world: World) -> None:
        first = world.do("alice", "put", table="notes", item={"id": 1})["position"]
        world.now -= 5000
        second = world.do("alice", "put", table="notes", item={"id": 2})["position"]
        world.now += 6000
        third = world.do("alice", "put", table="notes", item={"id": 3})["position"]
        assert [tuple(map(int, p.split("-"))) for p in (first, second, third)] == [
            (0, GENERATION, NOW, 0),
            (0, GENERATION, NOW, 1),
            (0, GENERATION, NOW + 1000, 0),
        ]

    def test_an_unreadable_command_is_skipped(self, world: World) -> None:
        put = world.command("alice", "put", table="notes", item={"id": 1})
        assert len(world.run(None, put, None)) == 1
        assert len(world.changes) == 1


class TestConditions:
    @pytest.mark.parametrize(
        ("condition", "absent", "present"),
        [
            ({"absent": True}, True, False),
            ({"present": True}, False, True),
            ({"version": 1}, False, True),
            ({"version": 2}, False, False),
            ({"equals": {"x": 1}}, False, True),
            ({"equals": {"x": 1, "y": {"z": []}}}, False, True),
            ({"equals": {}}, False, True),
            ({"equals": {"x": True}}, False, False),
            ({"equals": {"w": None}}, False, False),
        ],
    )
    def test_if_is_asked_of_the_item_as_it_is(
        self, world: World, condition: dict[str, Any], absent: bool, present: bool
    ) -> None:
        for there, holds in ((False, absent), (True, present)):
            if there:
                world.do("alice", "put", table="notes", item={"id": "n2", "x": 1, "y": {"z": []}})
            put: dict[str, Any] = {"table": "notes", "item": {"id": "n2", "new": 1}, "if_": condition}
            if holds:
                world.do("alice", "put", **put)
            else:
                assert world.code("alice", "put", **put) == "conflict"
            if there is False and holds:
                world.do("alice", "delete", table="notes", key="n2")
                world.hashes.clear()

    def test_a_conflict_names_the_version_to_users_who_may_read(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n"})
        for action in ("update", "delete"):
            error = world.refused("alice", action, table="notes", key="n", if_={"version": 5})
            assert (error["code"], error["details"]) == ("conflict", {"version": 1})

    def test_a_deleted_item_is_absent_whatever_its_version(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n"})
        world.do("alice", "delete", table="notes", key="n")
        assert world.code("alice", "put", table="notes", item={"id": "n"}, if_={"version": 2}) == "conflict"
        world.do("alice", "put", table="notes", item={"id": "n"}, if_={"absent": True})

    def test_if_sees_the_effects_of_earlier_commands_of_the_batch(self, world: World) -> None:
        replies = world.run(
            *(
                world.command(who, "put", table="notes", item={"id": "n", "by": who}, if_={"absent": True})
                for who in ("alice", "bob")
            )
        )
        assert replies[0].error is None
        assert replies[1].error
        assert replies[1].error["code"] == "conflict"
        assert world.batches == 1


class TestWriters:
    def test_no_client_writes_a_table_without_a_write_rule(self, world: World) -> None:
        assert world.code("alice", "put", table="closed", item={"id": 1}) == "forbidden"

    def test_service_keys_read_and_write_everything(self, world: World) -> None:
        world.do("job", "put", table="closed", item={"id": 1}, role="service")
        assert world.do("job", "get", table="closed", key=1, role="service")["item"] == {"id": 1}
        world.do("job", "update", table="closed", key=1, set={"x": 1}, role="service")
        world.do("job", "delete", table="closed", key=1, role="service")
        world.do("job", "put", table="broken", item={"id": 1}, role="service")

    def test_no_client_takes_an_item_by_writing_over_it(self, world: World) -> None:
        world.do("alice", "put", table="by_author", item={"id": 1, "author": "alice"})
        assert world.code("bob", "put", table="by_author", item={"id": 1, "author": "bob"}) == "forbidden"
        assert world.code("bob", "update", table="by_author", key=1, set={"author": "bob"}) == "forbidden"
        assert world.code("bob", "delete", table="by_author", key=1) == "forbidden"

    def test_no_client_gives_an_item_to_another_user(self, world: World) -> None:
        world.do("alice", "put", table="by_author", item={"id": 1, "author": "alice"})
        assert world.code("alice", "put", table="by_author", item={"id": 1, "author": "bob"}) == "forbidden"
        assert world.code("alice", "update", table="by_author", key=1, set={"author": "bob"}) == "forbidden"
        assert world.code("alice", "put", table="by_author", item={"id": 2, "author": "bob"}) == "forbidden"

    @pytest.mark.parametrize("condition", [{"version": 1}, {"version": 9}, {"absent": True}, {"equals": {"x": 2}}])
    def test_writers_are_checked_before_if(self, world: World, condition: Any) -> None:
        world.do("alice", "put", table="by_author", item={"id": 1, "author": "alice", "x": 1})
        put: dict[str, Any] = {"table": "by_author", "item": {"id": 1, "author": "bob"}, "if_": condition}
        assert world.code("bob", "put", **put) == "forbidden"

    def test_a_function_of_the_write_decides_with_images_user_and_claims(self, world: World) -> None:
        world.do("alice", "put", table="ruled", item={"id": 1, "owner": "alice"})
        assert world.code("bob", "put", table="ruled", item={"id": 1, "owner": "bob"}) == "forbidden"
        world.do("bob", "put", table="ruled", item={"id": 1, "owner": "bob"}, claims={"admin": True})

    def test_a_write_rule_that_raises_lets_no_client_write(self, world: World) -> None:
        error = world.refused("alice", "put", table="broken", item={"id": 1})
        assert error["code"] == "bad_request"
        assert "mistake of the application" not in str(error), "nothing of the inside is told"

    def test_an_item_whose_readers_fail_is_not_stored(self, world: World) -> None:
        assert world.code("alice", "put", table="faulty", item={"id": 1, "fault": 1}) == "bad_request"

    def test_only_the_first_of_two_takes_a_vacant_room(self, world: World) -> None:
        replies = world.run(
            *(
                world.command(who, "put", table="members", item={"room": "r", "user": who, "role": "owner"})
                for who in ("alice", "mallory")
            )
        )
        assert world.batches == 1
        assert [reply.error and reply.error["code"] for reply in replies] == [None, "forbidden"]

    def test_an_invited_user_may_write_in_the_same_batch_and_a_removed_one_may_not(self, world: World) -> None:
        invite: dict[str, Any] = {"table": "members", "item": {"room": "r", "user": "bob"}}
        message: dict[str, Any] = {"table": "messages", "item": {"room": "r", "id": 1, "author": "bob"}}
        replies = world.run(
            world.command("alice", "put", table="members", item={"room": "r", "user": "alice", "role": "owner"}),
            world.command("bob", "put", **message),
            world.command("alice", "put", **invite),
            world.command("bob", "put", **message),
            world.command("alice", "delete", table="members", key={"room": "r", "user": "bob"}),
            world.command("bob", "get", table="messages", key={"room": "r", "id": 1}),
        )
        codes = [reply.error and reply.error["code"] for reply in replies]
        assert codes == [None, "forbidden", None, None, None, "not_found"]
        assert world.batches == 1


class TestReaders:
    def test_absent_and_not_yours_have_the_same_answer(self, world: World) -> None:
        world.do("alice", "put", table="mine", item={"owner": "alice", "id": 1})
        for action in ("get", "update", "delete"):
            errors = [world.refused("carol", action, table="mine", key={"owner": "alice", "id": id_}) for id_ in (1, 2)]
            assert errors[0] == errors[1]
            assert errors[0]["code"] == "not_found"

    def test_a_query_leaves_out_what_its_caller_may_not_read(self, world: World) -> None:
        world.do("alice", "put", table="messages", item={"room": "r", "id": 1}, role="service")
        assert world.do("carol", "query", table="messages", key="r")["items"] == []
        assert len(world.do("job", "query", table="messages", key="r", role="service")["items"]) == 1

    def test_an_update_shows_no_item_to_a_user_who_may_not_read_the_result(self, world: World) -> None:
        world.do("alice", "put", table="letters", item={"id": 1, "to": "alice"})
        assert "item" not in world.do("alice", "update", table="letters", key=1, set={"to": "bob"})

    def test_a_query_tells_a_stranger_nothing_by_its_next(self, world: World) -> None:
        for who in ("alice", "bob"):
            world.do("job", "put", table="members", item={"room": "r", "user": who}, role="service")
        result = world.do("carol", "query", table="members", key="r", limit=1)
        assert "alice" not in str(result)

    def test_a_condition_cannot_probe_an_item_that_its_writer_may_not_read(self, world: World) -> None:
        world.do("alice", "put", table="letters", item={"id": 1, "to": "alice", "pin": 7})
        letter = {"id": 1, "to": "carol"}
        codes = []
        for guess in (6, 7):
            (reply,) = world.run(
                world.command("carol", "put", table="letters", item=letter, if_={"equals": {"pin": guess}})
            )
            codes.append(reply.error and reply.error["code"])
        assert codes[0] == codes[1]


class TestHidden:
    @pytest.fixture
    def world(self) -> World:
        world = World(make_app())
        world.do("job", "put", table="secrets", item={"id": 1, "x": 1, "secret": "s"}, role="service")
        return world

    def test_hidden_attributes_are_shown_to_service_keys_alone(self, world: World) -> None:
        for role, item in (("client", {"id": 1, "x": 1}), ("service", {"id": 1, "x": 1, "secret": "s"})):
            assert world.do("alice", "get", table="secrets", key=1, role=role)["item"] == item
            assert world.do("alice", "query", table="secrets", key=1, role=role)["items"][0]["item"] == item
        assert world.do("alice", "update", table="secrets", key=1, set={"x": 2})["item"] == {"id": 1, "x": 2}

    def test_a_put_of_the_shown_item_keeps_hidden_attributes(self, world: World) -> None:
        world.do("alice", "put", table="secrets", item={"id": 1, "x": 2})
        stored = world.do("job", "get", table="secrets", key=1, role="service")["item"]
        assert stored == {"id": 1, "x": 2, "secret": "s"}

    @pytest.mark.parametrize("guess", ["s", "t", None])
    def test_if_does_not_answer_about_hidden_attributes(self, world: World, guess: Any) -> None:
        fields: dict[str, Any] = {"table": "secrets", "key": 1, "set": {"x": 1}, "if_": {"equals": {"secret": guess}}}
        error = world.refused("alice", "update", **fields)
        assert error == world.refused("alice", "update", **{**fields, "if_": {"equals": {"secret": "another"}}})

    @pytest.mark.parametrize(
        "parts",
        [
            {"set": {"secret": "s"}},
            {"add": {"secret": 1}},
            {"set": {"secret.a": 1}},
            {"set": [[["secret"], 1]]},
            {"remove": ["secret"]},
            {"remove": ["secret.a"]},
            {"set": {"x": 2}},
        ],
    )
    def test_an_update_is_answered_alike_whatever_a_hidden_attribute_is(self, world: World, parts: Any) -> None:
        answers = []
        for secret in ("s", "t", 1, {"a": 1}, None):
            fresh = World(world.app)
            fresh.do("job", "put", table="secrets", item={"id": 1, "secret": secret}, role="service")
            (reply,) = fresh.run(fresh.command("alice", "update", table="secrets", key=1, **parts))
            answers.append((reply.error, (reply.result or {}).get("version")))
        assert all(one == answers[0] for one in answers)

    def test_a_client_does_not_write_a_hidden_attribute(self, world: World) -> None:
        (reply,) = world.run(world.command("alice", "put", table="secrets", item={"id": 1, "secret": "mine"}))
        assert reply.error
        assert reply.error["code"] == "forbidden"


class TestQueries:
    @pytest.fixture
    def world(self) -> World:
        world = World(make_app())
        for n in (10, 9, -1, 2.5, 100):
            world.do("alice", "put", table="lines", item={"page": "p", "n": n})
        for text in ("b", "a", "ab", "é", "z", "abc"):
            world.do("alice", "put", table="words", item={"page": "p", "n": text})
        return world

    def test_a_declared_kind_of_sort_keys_does_not_depend_on_the_first_item(self) -> None:
        app = App("test")
        app.table("events", key=("day", "at"), readers=everyone, writers=everyone, sort="number")
        world = World(app)
        (reply,) = world.run(world.command("alice", "put", table="events", item={"day": "d", "at": "noon"}))
        assert reply.error
        assert reply.error["code"] == "bad_request"
        assert "must be a number, as the application declares" in reply.error["message"]
        world.do("alice", "put", table="events", item={"day": "d", "at": 12})

    def ns(self, world: World, table: str = "lines", **fields: Any) -> tuple[list[Any], Any]:
        result = world.do("bob", "query", table=table, key="p", **fields)
        return [entry["item"]["n"] for entry in result["items"]], result["next"]

    def test_numbers_come_as_numbers_and_strings_by_their_bytes(self, world: World) -> None:
        assert self.ns(world) == ([-1, 2.5, 9, 10, 100], None)
        assert self.ns(world, "words") == (["a", "ab", "abc", "b", "z", "é"], None)
        assert self.ns(world, reverse=True) == ([100, 10, 9, 2.5, -1], None)

    def test_after_and_before_are_exclusive(self, world: World) -> None:
        assert self.ns(world, after=2.5, before=100) == ([9, 10], None)
        assert self.ns(world, "words", after="ab") == (["abc", "b", "z", "é"], None)

    def test_a_prefix_is_of_strings(self, world: World) -> None:
        assert self.ns(world, "words", prefix="ab") == (["ab", "abc"], None)
        assert self.ns(world, "words", prefix="ab", after="ab") == (["abc"], None)
        assert self.ns(world, "words", prefix="a", before="abc") == (["a", "ab"], None)
        assert self.ns(world, "words", prefix="", limit=2) == (["a", "ab"], "ab")

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("limit", [1, 2, 5])
    def test_pages_follow_one_another_without_gap(self, world: World, reverse: bool, limit: int) -> None:
        seen: list[Any] = []
        bound: dict[str, Any] = {}
        while True:
            some, following = self.ns(world, limit=limit, reverse=reverse, **bound)
            assert len(some) <= limit
            seen += some
            if following is None:
                break
            bound = {"before" if reverse else "after": following}
        assert seen == sorted([-1, 2.5, 9, 10, 100], reverse=reverse)

    def test_an_entry_says_version_at_and_by(self, world: World) -> None:
        (entry,) = world.do("bob", "query", table="lines", key={"page": "p"}, limit=1)["items"]
        assert entry == {"item": {"page": "p", "n": -1}, "version": 1, "at": NOW, "by": "alice"}

    def test_a_query_of_a_table_without_sort_key_finds_the_one(self, world: World) -> None:
        assert world.do("bob", "query", table="notes", key="n")["items"] == []
        world.do("alice", "put", table="notes", item={"id": "n"})
        result = world.do("bob", "query", table="notes", key="n")
        assert [entry["item"] for entry in result["items"]] == [{"id": "n"}]
        assert result["next"] is None
        world.do("alice", "delete", table="notes", key="n")
        assert world.do("bob", "query", table="notes", key="n")["items"] == []

    def test_a_read_contains_every_change_up_to_its_position(self, world: World) -> None:
        for action, fields in (("get", {"key": {"page": "p", "n": 9}}), ("query", {"key": "p"})):
            assert world.do("bob", action, table="lines", **fields)["position"] == world.changes[-1][0]

    def test_a_query_sees_the_put_before_it_in_the_batch_by_being_cut(self, world: World) -> None:
        before = world.batches
        replies = world.run(
            world.command("alice", "put", table="lines", item={"page": "q", "n": 1}),
            world.command("alice", "query", table="lines", key="q"),
            world.command("alice", "delete", table="lines", key={"page": "q", "n": 1}),
            world.command("alice", "query", table="lines", key="q"),
            world.command("alice", "query", table="words", key="p", limit=1),
        )
        assert [len(reply.result["items"]) for reply in replies if "items" in reply.result] == [1, 0, 1]
        assert world.batches == before + 3


class TestRequests:
    def test_a_repeated_request_gives_the_first_result_and_writes_nothing(self, world: World) -> None:
        update: dict[str, Any] = {"table": "notes", "key": "n", "add": {"x": 1}, "request": "r1"}
        world.do("alice", "put", table="notes", item={"id": "n"})
        first = world.do("alice", "update", **update)
        world.now += 5000
        assert world.do("alice", "update", **update) == first
        assert first["item"]["x"] == 1
        assert len(world.changes) == 2

    def test_a_request_twice_in_one_batch_is_done_once(self, world: World) -> None:
        put: dict[str, Any] = {"table": "notes", "item": {"id": "n"}, "request": "r1", "if_": {"absent": True}}
        replies = world.run(*(world.command("alice", "put", **put) for _ in range(2)))
        assert world.batches == 1
        assert replies[0].result == replies[1].result
        assert replies[0].number != replies[1].number
        assert len(world.changes) == 1

    def test_a_request_id_of_another_write_is_a_conflict_and_nothing_is_done(self, world: World) -> None:
        first = world.do("alice", "put", table="notes", item={"id": "n", "x": 1, "y": 2}, request="r1")
        error = world.refused("alice", "put", table="notes", item={"id": "m"}, request="r1")
        assert (error["code"], error["details"]) == ("conflict", {"request": "r1"})
        assert world.code("alice", "delete", table="notes", key="n", request="r1") == "conflict"
        assert len(world.changes) == 1
        assert world.do("alice", "put", table="notes", item={"y": 2, "x": 1, "id": "n"}, request="r1") == first

    def test_a_request_id_used_twice_in_one_batch_is_a_conflict(self, world: World) -> None:
        puts = [world.command("alice", "put", table="notes", item={"id": n}, request="r1") for n in ("a", "b")]
        done, refused = world.run(*puts)
        assert world.batches == 1
        assert done.result["version"] == 1
        assert refused.error
        assert refused.error["code"] == "conflict"
        assert len(world.changes) == 1

    def test_an_error_is_a_first_result_too(self, world: World) -> None:
        update: dict[str, Any] = {"table": "notes", "key": "n", "set": {"x": 1}, "request": "r1"}
        assert world.code("alice", "update", **update) == "not_found"
        world.do("alice", "put", table="notes", item={"id": "n"})
        assert world.code("alice", "update", **update) == "not_found"

    def test_anothers_request_of_the_same_name_is_another(self, world: World) -> None:
        for who in ("alice", "bob"):
            world.do(who, "put", table="notes", item={"id": who}, request="r1")
        assert len(world.changes) == 2

    def test_a_timed_out_request_may_be_done_when_it_is_repeated(self, world: World) -> None:
        put: dict[str, Any] = {"table": "notes", "item": {"id": "n"}, "request": "r1"}
        assert world.code("alice", "put", late=True, **put) == "timeout"
        assert world.do("alice", "put", **put)["version"] == 1

    def test_a_repeat_that_comes_late_still_gives_the_first_result(self, world: World) -> None:
        put: dict[str, Any] = {"table": "notes", "item": {"id": "n"}, "request": "r1"}
        first = world.do("alice", "put", **put)
        assert world.do("alice", "put", late=True, **put) == first

    def test_the_result_is_kept_for_the_window(self, world: World) -> None:
        world.do("alice", "put", table="notes", item={"id": "n"}, request="r1")
        ((_, kept_ms),) = world.kept_replies().values()
        assert kept_ms == 600_000


@pytest.mark.parametrize("action", ["put", "get", "query"])
def test_a_command_that_waited_too_long_is_not_done(world: World, action: str) -> None:
    fields: dict[str, Any] = {"item": {"id": "n"}} if action == "put" else {"key": "n"}
    assert world.code("alice", action, table="notes", late=True, **fields) == "timeout"


def test_deciding_a_command_again_after_a_fetch_gives_the_same() -> None:
    app = App("test")
    rooms = app.membership("members", group="room", member="user")
    app.table("counts", key="id", readers=everyone, writers=rooms.of("room"))
    world = World(app)
    world.do("job", "put", table="members", item={"room": "r", "user": "alice"}, role="service")
    world.do("job", "put", table="counts", item={"id": 1, "room": "r"}, role="service")
    result = world.do("alice", "update", table="counts", key=1, set={"a": {}}, add={"a.n": 1})
    assert result["item"]["a"] == {"n": 1}


class TestSweeping:
    def connected(self, world: World, connection: str, gateway: str) -> None:
        item = {"user": "alice", "connection": connection, "gateway": gateway}
        world.do("alice", "put", table="connections", item=item, role="service")

    def test_the_connections_of_a_dead_gateway_are_removed_and_no_others(self, world: World) -> None:
        self.connected(world, "a-1", "a")
        self.connected(world, "a-2", "a")
        self.connected(world, "b-1", "b")
        (reply,) = world.run(world.command("g", "sweep", role="service", gateway="a"))
        assert reply.result == 2
        (reply,) = world.run(world.command("g", "sweep", role="service", gateway="a"))
        assert reply.result == 0
        left = world.do("job", "query", table="connections", key="alice", role="service")["items"]
        assert [entry["item"]["connection"] for entry in left] == ["b-1"]

    def test_a_connection_that_left_by_itself_is_not_swept(self, world: World) -> None:
        self.connected(world, "a-1", "a")
        key = {"user": "alice", "connection": "a-1"}
        world.do("alice", "delete", table="connections", key=key, role="service")
        (reply,) = world.run(world.command("g", "sweep", role="service", gateway="a"))
        assert reply.result == 0

    def test_clients_do_not_sweep(self, world: World) -> None:
        assert world.code("mallory", "sweep", gateway="a") == "forbidden"


# ── a batch is as its commands one by one ───────────────────────────────────────────────────────────────────────────

WHO = st.sampled_from(["alice", "bob"])
PAGES = st.sampled_from(["p", "q"])
NS = st.sampled_from([1, 2, "a"])
SMALL = st.integers(0, 2)
IFS = st.sampled_from(
    [
        {},
        {},
        {},
        {"if_": {"absent": True}},
        {"if_": {"present": True}},
        {"if_": {"version": 2}},
        {"if_": {"equals": {"x": 1}}},
    ]
)
REQUEST = st.sampled_from([{}, {}, {"request": "r1"}, {"request": "r2"}])
LATE = st.sampled_from([{}, {}, {}, {"late": True}])
ROLE = st.sampled_from([{}, {}, {"role": "service"}])


def _line(page: str, n: Any, x: int, **more: Any) -> dict[str, Any]:
    return {"table": "lines", "item": {"page": page, "n": n, "x": x}, **more}


WRITES = st.one_of(
    st.builds(lambda p, n, x: ("put", _line(p, n, x)), PAGES, NS, SMALL),
    st.builds(
        lambda p, n, x: ("update", {"table": "lines", "key": {"page": p, "n": n}, "add": {"x": x}}), PAGES, NS, SMALL
    ),
    st.builds(lambda p, n: ("delete", {"table": "lines", "key": {"page": p, "n": n}}), PAGES, NS),
    st.builds(
        lambda who, role: ("put", {"table": "members", "item": {"room": "r", "user": who, **role}}),
        WHO,
        st.sampled_from([{}, {"role": "owner"}]),
    ),
    st.builds(lambda who: ("delete", {"table": "members", "key": {"room": "r", "user": who}}), WHO),
    st.builds(lambda who, x: ("put", {"table": "messages", "item": {"room": "r", "id": x, "author": who}}), WHO, SMALL),
)
TRANSACTIONS = st.lists(WRITES.map(lambda write: {"action": write[0], **write[1]}), min_size=1, max_size=3).map(
    lambda operations: ("transact", {"operations": operations})
)
READS = st.one_of(
    st.builds(lambda p, n: ("get", {"table": "lines", "key": {"page": p, "n": n}}), PAGES, NS),
    st.builds(lambda p, limit: ("query", {"table": "lines", "key": p, "limit": limit + 1}), PAGES, SMALL),
    st.just(("query", {"table": "members", "key": "r"})),
    st.just(("query", {"table": "messages", "key": "r"})),
)
COMMANDS = st.lists(
    st.one_of(
        st.tuples(WHO, WRITES, IFS, REQUEST, LATE, ROLE).map(
            lambda t: (t[0], t[1][0], t[1][1] | t[2] | t[3] | t[4] | t[5])
        ),
        st.tuples(WHO, TRANSACTIONS | READS, ROLE).map(lambda t: (t[0], t[1][0], t[1][1] | t[2])),
    ),
    max_size=14,
)


FIRST_KIND = [
    ("alice", "put", _line("p", 1, 0, request="r1")),
    ("alice", "transact", {"operations": [{"action": "put", **_line("p", "a", 0)}]}),
]
"""The second asks for less before it comes to the kind of the table's keys; the first settles that all the same."""


@settings(max_examples=150 if LONG else 60, deadline=None)
@given(COMMANDS)
@example(FIRST_KIND)
def test_a_batch_has_the_same_result_as_its_commands_one_by_one(
    commands: list[tuple[str, str, dict[str, Any]]],
) -> None:
    app = make_app()
    together, single = World(app), World(app)
    at_once = together.run(*(together.command(who, action, **fields) for who, action, fields in commands))
    one_by_one = [single.run(single.command(who, action, **fields))[0] for who, action, fields in commands]
    # Commands of one batch share facts, so they may cost less.
    assert [reply._replace(cost_ms=0) for reply in at_once] == [reply._replace(cost_ms=0) for reply in one_by_one]
    assert together.changes == single.changes
    assert together.kept_replies() == single.kept_replies()
    assert {key: fields for key, fields in together.hashes.items() if fields} == {
        key: fields for key, fields in single.hashes.items() if fields
    }
    assert {key: order for key, order in together.orders.items() if order} == {
        key: order for key, order in single.orders.items() if order
    }


class TestLoad:
    """What an import asks for: many items of one partition in one command."""

    def test_each_item_is_a_write_and_the_same_once_more_is_none(self, world: World) -> None:
        items = [["notes", {"id": f"n{n}", "owner": "bob"}] for n in range(3)]
        for _ in range(2):
            (reply,) = world.run(world.command("importer", "load", role="service", items=items))
            assert reply.result == 3
        assert [(change.event, change.key["id"], change.by) for _, change in world.changes] == [
            ("INSERT", f"n{n}", "importer") for n in range(3)
        ]

    def test_of_one_item_twice_the_later_one_stays(self, world: World) -> None:
        items = [["notes", {"id": "n", "owner": owner}] for owner in ("alice", "bob")]
        world.run(world.command("importer", "load", role="service", items=items))
        assert [change.version for _, change in world.changes] == [1, 2]
        assert world.changes[-1][1].new == {"id": "n", "owner": "bob"}

    @pytest.mark.parametrize(
        ("table", "item", "code"),
        [
            ("notes", {"owner": "bob"}, "bad_request"),
            ("nix", {"id": "a"}, "bad_request"),
            ("notes", {"id": "a", "text": "x" * 300_000}, "too_large"),
            ("connections", {"user": "bob", "connection": "c"}, "forbidden"),
        ],
    )
    def test_one_wrong_operation_stops_the_transaction_and_is_named(
        self, world: World, table: str, item: Item, code: str
    ) -> None:
        items = [["notes", {"id": "n", "owner": "bob"}], [table, item]]
        error = world.refused("importer", "load", role="service", items=items)
        assert (error["code"], error["details"]["item"]) == (code, 1)

    def test_it_is_for_services_alone(self, world: World) -> None:
        assert world.code("bob", "load", items=[["notes", {"id": "n", "owner": "bob"}]]) == "forbidden"


@settings(max_examples=100, deadline=None)
@given(COMMANDS)
def test_the_changes_tell_the_whole_story(commands: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Each change's old image is the new one of the change before it, versions rise by one, positions rise."""
    world = World(make_app())
    world.run(*(world.command(who, action, **fields) for who, action, fields in commands))
    items: dict[str, tuple[int, Item | None]] = {}
    positions = [tuple(map(int, position.split("-"))) for position, _ in world.changes]
    assert positions == sorted(set(positions))
    for _, change in world.changes:
        name = f"{change.table} {change.key}"
        version, image = items.get(name, (0, None))
        assert (change.version, change.old) == (version + 1, image)
        assert change.new != change.old
        events = {(False, True): "INSERT", (True, True): "MODIFY", (True, False): "REMOVE"}
        assert change.event == events[change.old is not None, change.new is not None]
        items[name] = (change.version, change.new)


def test_a_table_without_readers_has_no_audience() -> None:
    assert make_app()["closed"].readers is nobody
    assert ItemKey("t", 1, None).field == b""
