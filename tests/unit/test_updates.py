"""`update`: set, remove and add, by dotted paths and by lists."""

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.errors import BadRequest
from tidewire.model.protocol import Update, fault_in, parse_request
from tidewire.model.records import Item
from tidewire.services.store.updates import apply_update, check_values


def updated(item: dict[str, Any], **parts: Any) -> dict[str, Any]:
    before = deepcopy(item)
    request = parse_request({"action": "update", "table": "t", "key": 1, **parts})
    assert isinstance(request, Update)
    after = apply_update(item, request)
    assert item == before, "the item as it was is not touched"
    return after


@pytest.mark.parametrize(
    ("item", "parts", "after"),
    [
        ({"a": 1}, {"set": {"a": 2, "b": [3]}}, {"a": 2, "b": [3]}),
        ({}, {"set": {"a.b.c": 1}}, {"a": {"b": {"c": 1}}}),
        ({"a": {"x": 1}}, {"set": {"a.b": 2}}, {"a": {"x": 1, "b": 2}}),
        ({}, {"set": [[["a.b"], 1]]}, {"a.b": 1}),
        ({"a.b": {"c": 1}}, {"set": [[["a.b", "c"], 2]]}, {"a.b": {"c": 2}}),
        ({}, {"set": [["a.b", 1]]}, {"a": {"b": 1}}),
        ({"a": 1}, {"set": {"a": None}}, {"a": None}),
        ({"a": 1, "b": 2}, {"remove": ["a"]}, {"b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"remove": ["a.b"]}, {"a": {"c": 2}}),
        ({"a.b": 1, "a": {"b": 2}}, {"remove": [["a.b"]]}, {"a": {"b": 2}}),
        ({"a": 1}, {"remove": ["b", "c.d"]}, {"a": 1}),
        ({"n": 1}, {"add": {"n": 2}}, {"n": 3}),
        ({}, {"add": {"n": -2}}, {"n": -2}),
        ({}, {"add": {"a.n": 0.5}}, {"a": {"n": 0.5}}),
        ({"a.n": 1}, {"add": [[["a.n"], 1]]}, {"a.n": 2}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"set": {"b": 1}, "remove": ["a"], "add": {"n": 1}}, {"b": 1, "n": 1}),
    ],
)
def test_an_update_gives_the_item_that_is_meant(item: Any, parts: Any, after: Any) -> None:
    assert updated(item, **parts) == after


@pytest.mark.parametrize(
    ("item", "parts", "says"),
    [
        ({"a": 1}, {"set": {"a.b": 1}}, "'a' is not an object"),
        ({"a": [1]}, {"set": {"a.b": 1}}, "'a' is not an object"),
        ({"a": "x"}, {"add": {"a": 1}}, "not a number"),
        ({"a": True}, {"add": {"a": 1}}, "not a number"),
        ({"a": 1}, {"add": {"a": "1"}}, "a number is needed"),
        ({"a": 1}, {"add": {"a": True}}, "a number is needed"),
        ({"a": 2**64 - 1}, {"add": {"a": 1}}, "beyond"),
        ({"a": 1.7e308}, {"add": {"a": 1.7e308}}, "beyond"),
        ({}, {"set": {"": 1}}, "empty name"),
        ({}, {"set": {"a..b": 1}}, "empty name"),
        ({}, {"set": {"a.": 1}}, "empty name"),
        ({}, {"set": [[[], 1]]}, "empty name"),
        ({}, {"set": {".".join("a" * 33): 1}}, "deeper than 32"),
    ],
)
def test_a_path_that_does_not_fit_is_named(item: Any, parts: Any, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        updated(item, **parts)


NAMES = st.text("abc.", min_size=1, max_size=3)


@given(st.dictionaries(NAMES, st.integers(), max_size=4), st.lists(NAMES, min_size=1, max_size=3), st.integers())
def test_a_value_set_at_a_path_can_be_read_and_removed(item: dict[str, Any], path: list[str], value: int) -> None:
    item = {name: inner for name, inner in item.items() if name != path[0]}
    after = updated(item, set=[[path, value]])
    inner: Any = after
    for name in path:
        inner = inner[name]
    assert inner == value
    assert {name: after[name] for name in item} == item
    assert updated(after, remove=[path[:1]]) == item


@given(st.lists(st.integers(-1000, 1000), max_size=10))
def test_additions_add_up(numbers: list[int]) -> None:
    item: dict[str, Any] = {}
    for number in numbers:
        item = updated(item, add={"n": number})
    assert item.get("n", 0) == sum(numbers)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(("names", "depth", "fits"), [(1, 62, True), (1, 63, False), (20, 43, True), (20, 44, False)])
def test_an_item_is_not_nested_deeper_than_a_frame_may_be(names: int, depth: int, fits: bool) -> None:
    path = ".".join("a" * names)
    update = Update(table="t", key="k", set={path: nested(depth)})
    assert (fault_in(apply_update({}, update)) is None) == fits
    if fits:
        check_values(update)
    else:
        with pytest.raises(BadRequest, match="nested deeper than 64 levels"):
            check_values(update)


def test_an_update_shares_the_parts_that_it_does_not_touch() -> None:
    item: Item = {"large": {"rows": [1, 2]}, "small": {"n": 1, "inner": {"x": 1}}}
    new = apply_update(item, Update(table="t", key="k", add={"small.n": 1}))
    assert new == {"large": {"rows": [1, 2]}, "small": {"n": 2, "inner": {"x": 1}}}
    assert new["large"] is item["large"]
    assert new["small"]["inner"] is item["small"]["inner"]
    assert item["small"]["n"] == 1


def test_ten_times_a_tenth_is_one() -> None:
    item: Item = {"n": 0}
    for _ in range(10):
        item = updated(item, add={"n": 0.1})
    assert item == {"n": 1.0}


@pytest.mark.parametrize(
    ("before", "value", "expected"),
    [(2**53 + 1, 1.0, 2**53 + 2), (2**53, 1.0, 2**53 + 1), (0.5, 0.5, 1.0), (1e308, -1e308, 0.0), (2**63, -0.5, None)],
)
def test_a_sum_keeps_its_integer_part_or_is_refused(before: float, value: float, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(BadRequest, match="more digits than a number keeps"):
            updated({"n": before}, add={"n": value})
    else:
        assert updated({"n": before}, add={"n": value}) == {"n": expected}


def test_a_sum_that_would_lose_a_one_is_refused() -> None:
    with pytest.raises(BadRequest, match="add 'n': the sum has more digits than a number keeps"):
        updated({"n": 2**53 + 1}, add={"n": 0.5})
