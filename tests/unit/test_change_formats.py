"""Changes as lines: ours, and the ones of DynamoDB Streams."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.app import STREAM_VIEWS
from tidewire.errors import ConfigurationError
from tidewire.model.records import Change, Position
from tidewire.services.cli.change_formats import (
    Unrepresentable,
    as_dynamodb,
    as_json,
    number_text,
    parse_position,
    sequence_number,
    size_of_item,
    typed,
    typed_item,
)

AT = 1_795_409_459_002
POSITION = Position(3, 0, AT, 7)
OLD, NEW = {"id": "n1", "text": "a"}, {"id": "n1", "text": "b"}
CHANGE = Change("MODIFY", "notes", {"id": "n1"}, 2, NEW, OLD, AT, "alice", "g1-c1", "r1", "3-0-1-0", True, "00-a-b-01")

positions = st.builds(
    Position, st.just(3), st.integers(0, 10**14 - 1), st.integers(0, 10**14 - 1), st.integers(0, 10**12 - 1)
)


def test_a_line_has_all_that_the_change_has() -> None:
    assert as_json(POSITION, CHANGE, "NEW_AND_OLD_IMAGES") == {
        "position": str(POSITION),
        "event": "MODIFY",
        "table": "notes",
        "key": {"id": "n1"},
        "version": 2,
        "new": NEW,
        "old": OLD,
        "at": AT,
        "by": "alice",
        "connection": "g1-c1",
        "request": "r1",
        "transaction": "3-0-1-0",
        "more": True,
        "trace": "00-a-b-01",
    }


@pytest.mark.parametrize("view", STREAM_VIEWS)
def test_the_stream_view_says_which_images_leave(view: str) -> None:
    line, record = as_json(POSITION, CHANGE, view), as_dynamodb(POSITION, CHANGE, view, "dev")["dynamodb"]
    assert ("new" in line, "old" in line) == (view.startswith("NEW"), "OLD" in view)
    assert ("NewImage" in record, "OldImage" in record) == (view.startswith("NEW"), "OLD" in view)
    assert record["StreamViewType"] == view
    assert record["Keys"] == {"id": {"S": "n1"}}


def test_a_record_of_dynamodb_streams() -> None:
    record = as_dynamodb(POSITION, CHANGE._replace(event="INSERT", old=None), "NEW_AND_OLD_IMAGES", "dev")
    assert (record["eventName"], record["eventSource"]) == ("INSERT", "aws:dynamodb")
    assert record["dynamodb"]["NewImage"] == {"id": {"S": "n1"}, "text": {"S": "b"}}
    assert "OldImage" not in record["dynamodb"], "an INSERT has none"
    assert record["dynamodb"]["ApproximateCreationDateTime"] == AT // 1000
    assert "userIdentity" not in record
    expired = as_dynamodb(POSITION, CHANGE._replace(event="REMOVE", new=None, by="tidewire:expiry"), "OLD_IMAGE", "dev")
    assert expired["userIdentity"] == {"type": "Service", "principalId": "dynamodb.amazonaws.com"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {"NULL": True}),
        (True, {"BOOL": True}),
        ("a", {"S": "a"}),
        (1, {"N": "1"}),
        (-0.5, {"N": "-0.5"}),
        (1e21, {"N": "1000000000000000000000"}),
        (0.0, {"N": "0"}),
        ([1, "a"], {"L": [{"N": "1"}, {"S": "a"}]}),
        ({"a": {"b": None}}, {"M": {"a": {"M": {"b": {"NULL": True}}}}}),
    ],
)
def test_values_have_the_letter_of_their_type(value: Any, expected: dict[str, Any]) -> None:
    assert typed(value) == expected


@given(
    st.integers(-(2**63), 2**64 - 1)
    | st.floats(-9e125, 9e125).filter(lambda number: number == 0 or abs(number) >= 1e-130)
)
def test_numbers_keep_all_their_digits(value: int | float) -> None:
    assert Decimal(number_text(value)) == Decimal(repr(value))


@given(positions, positions)
def test_sequence_numbers_sort_as_positions_do_as_text_and_as_numbers(a: Position, b: Position) -> None:
    first, second = sequence_number(a), sequence_number(b)
    assert first.isdigit()
    assert len(first) == 40
    assert (first < second, int(first) < int(second)) == (a < b, a < b)


def test_sizes_count_names_and_values() -> None:
    assert size_of_item({"id": "n1", "n": 12, "ok": True, "no": None}) == (2 + 2) + (1 + 2) + (2 + 1) + (2 + 1)


def test_a_position_is_read_back() -> None:
    assert parse_position(str(POSITION), 8) == POSITION


@pytest.mark.parametrize("text", ["", "1-2-3", "x", "1-0-0-0-0", "-1-0-0-0", "8-0-0-0"])
def test_a_position_of_another_stage_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--from"):
        parse_position(text, 8)


@pytest.mark.parametrize("number", [1e308, 5e-324, 1e126, 1e-131])
def test_a_number_that_dynamodb_cannot_hold_is_named_with_its_place(number: float) -> None:
    with pytest.raises(Unrepresentable, match=r"a: b: the number .* does not fit"):
        typed_item({"a": {"b": [number]}})


@pytest.mark.parametrize(("number", "text"), [(1e125, "1E+125"), (1e-130, "1E-130"), (0.1, "0.1"), (-0.0, "0")])
def test_numbers_at_the_edge_of_dynamodbs_range_are_kept(number: float, text: str) -> None:
    assert number_text(number) == text
