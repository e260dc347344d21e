"""Queries of an index: its order, its bounds and pages, and what of it each caller is shown."""

from __future__ import annotations

from typing import Any

import pytest

from tidewire.app import App
from tidewire.audiences import everyone, user
from tidewire.services.store import reading

from .world import NOW, World


def make_app() -> App:
    app = App("test")
    app.table(
        "books",
        key=("shelf", "n"),
        readers=everyone,
        writers=everyone,
        indexes={"by_author": ("author", "year"), "by_price": ("author", "price"), "by_title": ("author", "title")},
        hidden=("price",),
        expires="until",
    )
    app.table("loans", key="id", readers=user("reader"), writers=everyone, indexes={"by_book": ("book", "at")})
    app.table(
        "letters", key=("box", "n"), readers=user("to"), writers=everyone, indexes={"by_subject": ("subject", "n")}
    )
    app.check()
    return app


BOOKS: list[dict[str, Any]] = [
    {"shelf": "b", "n": 1, "author": "ann", "year": 2000, "title": "a", "price": 9},
    {"shelf": "a", "n": 2, "author": "ann", "year": 1999.5, "title": "ab"},
    {"shelf": "a", "n": 1, "author": "ann", "year": 2000, "title": "abc"},
    {"shelf": "a", "n": 10, "author": "ann", "year": 2000, "title": "b"},
    {"shelf": "a", "n": 3, "author": "ann", "year": -5, "title": "é"},
    {"shelf": "a", "n": 4, "author": "ann", "year": "unknown", "title": "zz"},
    {"shelf": "a", "n": 5, "author": "bob", "year": 2000},
    {"shelf": "a", "n": 6, "author": "ann"},
    {"shelf": "a", "n": 7, "year": 2000},
    {"shelf": "a", "n": 8, "author": "ann", "year": None},
    {"shelf": "a", "n": 9, "author": ["ann"], "year": 2000},
]
IN_ORDER = [("a", 3), ("a", 2), ("a", 1), ("a", 10), ("b", 1), ("a", 4)]
"""Of ann, by year: numbers before strings; those of one year by their keys."""


@pytest.fixture
def world() -> World:
    world = World(make_app())
    for book in BOOKS:
        world.do("job", "put", table="books", item=book, role="service")
    world.follow()
    return world


def page(world: World, index: str = "by_author", **fields: Any) -> tuple[list[Any], Any]:
    result = world.do("carol", "query", table="books", index=index, **({"key": "ann"} | fields))
    return [(entry["item"]["shelf"], entry["item"]["n"]) for entry in result["items"]], result["next"]


class TestOrder:
    def test_items_that_have_both_attributes_are_in_it_by_the_second(self, world: World) -> None:
        assert page(world) == (IN_ORDER, None)
        assert page(world, reverse=True) == (IN_ORDER[::-1], None)
        assert page(world, key={"author": "bob"}) == ([("a", 5)], None)
        assert page(world, key="nobody") == ([], None)

    def test_a_bound_is_exclusive_of_all_items_that_have_it(self, world: World) -> None:
        assert page(world, after=1999.5) == (IN_ORDER[2:], None)
        assert page(world, after=2000) == (IN_ORDER[5:], None)
        assert page(world, before=2000) == (IN_ORDER[:2], None)
        assert page(world, after=-5, before="unknown") == (IN_ORDER[1:5], None)
        assert page(world, after=-5, before=2000, reverse=True) == ([("a", 2)], None)
        assert page(world, after=2000, before=2000) == ([], None)

    def test_a_prefix_is_of_strings(self, world: World) -> None:
        assert page(world, "by_title", prefix="ab") == ([("a", 2), ("a", 1)], None)
        assert page(world, "by_title", prefix="a", after="a") == ([("a", 2), ("a", 1)], None)
        assert page(world, "by_title", prefix="a", before="abc", reverse=True) == ([("a", 2), ("b", 1)], None)
        assert page(world, "by_title", prefix="é") == ([("a", 3)], None)
        assert page(world, prefix="un") == ([("a", 4)], None)

    def test_the_next_is_a_sort_value_or_where_that_goes_on_with_the_key_a_list(self, world: World) -> None:
        assert page(world, limit=1) == (IN_ORDER[:1], -5)
        assert page(world, limit=2) == (IN_ORDER[:2], 1999.5)
        assert page(world, limit=3) == (IN_ORDER[:3], [2000, "a", 1])
        assert page(world, limit=3, after=[2000, "a", 1]) == (IN_ORDER[3:], None)
        assert page(world, limit=5) == (IN_ORDER[:5], 2000)
        assert page(world, limit=2, reverse=True) == (IN_ORDER[:-3:-1], [2000, "b", 1])

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
    def test_pages_follow_one_another_without_gap(self, world: World, limit: int, reverse: bool) -> None:
        seen: list[Any] = []
        bound: dict[str, Any] = {}
        for _ in range(10):
            some, following = page(world, limit=limit, reverse=reverse, **bound)
            assert 0 < len(some) <= limit
            seen += some
            if following is None:
                break
            bound = {"before" if reverse else "after": following}
        assert seen == (IN_ORDER[::-1] if reverse else IN_ORDER)


class TestFollowing:
    def test_an_item_moves_with_its_attributes_and_leaves_with_them(self, world: World) -> None:
        def update(n: int, **parts: Any) -> None:
            world.do("job", "update", table="books", key={"shelf": "a", "n": n}, role="service", **parts)

        update(3, set={"year": 3000})
        update(2, remove=["year"])
        update(1, set={"author": "bob"})
        update(8, set={"year": 1})
        world.do("job", "delete", table="books", key={"shelf": "a", "n": 10}, role="service")
        world.follow()
        assert page(world) == ([("a", 8), ("b", 1), ("a", 3), ("a", 4)], None)
        assert page(world, key="bob") == ([("a", 1), ("a", 5)], None)

    def test_an_entry_is_the_item_as_it_is_now(self, world: World) -> None:
        key = {"shelf": "a", "n": 5}
        world.do("alice", "update", table="books", key=key, set={"pages": 7})
        world.follow()
        (entry,) = world.do("carol", "query", table="books", index="by_author", key="bob")["items"]
        assert entry == {"item": {**BOOKS[6], "pages": 7}, "version": 2, "at": NOW, "by": "alice"}

    def test_an_expired_item_is_absent_before_it_is_removed(self, world: World) -> None:
        key = {"shelf": "a", "n": 5}
        world.do("alice", "update", table="books", key=key, set={"until": NOW / 1000 + 1})
        world.follow()
        assert page(world, key="bob")[0] == [("a", 5)]
        world.now += 1000
        assert page(world, key="bob") == ([], None)


class TestRights:
    def test_hidden_attributes_are_shown_to_service_keys_alone(self, world: World) -> None:
        query: dict[str, Any] = {"table": "books", "index": "by_author", "key": "ann", "after": 1999.5, "limit": 3}
        for role, price in (("client", None), ("service", 9)):
            entry = world.do("carol", "query", role=role, **query)["items"][2]
            assert entry["item"]["shelf"] == "b"
            assert entry["item"].get("price") == price

    def test_the_order_of_a_hidden_attribute_is_for_service_keys_alone(self, world: World) -> None:
        query: dict[str, Any] = {"table": "books", "index": "by_price", "key": "ann"}
        error = world.refused("carol", "query", **query)
        assert error["code"] == "forbidden"
        assert "'price'" in error["message"]
        assert len(world.do("job", "query", role="service", **query)["items"]) == 1

    def test_readers_are_asked_of_each_item_and_the_next_tells_of_no_other(self, world: World) -> None:
        for n, reader in enumerate(["alice", "bob", "alice", "bob", "bob"]):
            world.do("job", "put", table="loans", item={"id": n, "book": "b", "at": n, "reader": reader})
        world.follow()

        def loans(who: str, **fields: Any) -> tuple[list[int], Any]:
            result = world.do(who, "query", table="loans", index="by_book", key="b", **fields)
            return [entry["item"]["id"] for entry in result["items"]], result["next"]

        assert loans("alice") == ([0, 2], None)
        assert loans("alice", limit=1) == ([0], 0)
        assert loans("alice", limit=1, after=0) == ([2], None)
        assert loans("alice", limit=2) == ([0, 2], None), "there is no more of hers"
        assert loans("bob", reverse=True) == ([4, 3, 1], None)
        assert loans("carol", limit=1) == ([], None)
        assert loans("job", role="service") == ([0, 1, 2, 3, 4], None)

    def test_a_query_that_examines_too_many_items_ends_early(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It goes on from there; without anything to go on from, it says so."""
        monkeypatch.setattr(reading, "MAX_SCANNED", 4)
        monkeypatch.setattr(reading, "SCAN_BATCH", 2)
        for n in range(20):
            reader = "alice" if n in (0, 6, 19) else "bob"
            world.do("job", "put", table="letters", item={"box": "b", "n": n, "subject": "s", "to": reader})
        world.follow()

        def letters(**fields: Any) -> tuple[list[int], Any]:
            result = world.do("alice", "query", table="letters", **fields)
            return [entry["item"]["n"] for entry in result["items"]], result["next"]

        assert letters(key="b", limit=4) == ([0], 0)
        assert letters(key="b", limit=4, after=2) == ([6], 6)
        assert letters(key="s", index="by_subject", limit=4) == ([0], [0, "b", 0])
        assert letters(key="s", index="by_subject", limit=4, reverse=True) == ([19], [19, "b", 19])
        error = world.refused("alice", "query", table="letters", key="b", limit=4, after=6)
        assert (error["code"], "narrow the query" in error["message"]) == ("too_large", True)
