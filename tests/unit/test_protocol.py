"""Frames: garbage is a RequestError, and valid frames come through unchanged."""

import json
from decimal import Decimal
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.errors import BadRequest, RequestError, UnsupportedAction
from tidewire.model.protocol import (
    ACTIONS,
    Delete,
    Get,
    Ping,
    Put,
    Query,
    Update,
    decode_frame,
    encode_json,
    encode_msgpack,
    feed_frame,
    id_of_refused,
    json_to_msgpack,
    parse_request,
    request_id,
)
from tidewire.model.records import FeedBody

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=10
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=5)
ANYTHING = st.recursive(
    LEAVES | st.floats() | st.integers() | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | st.integers(), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    [
        "action",
        "id",
        "table",
        "item",
        "key",
        "if",
        "request",
        "set",
        "remove",
        "add",
        "after",
        "before",
        "prefix",
        "limit",
        "reverse",
        "auth_key",
        "topics",
    ]
)
REQUESTS = st.builds(
    lambda action, fields: {**fields, "action": action},
    st.sampled_from([*ACTIONS, "nonsense", ""]) | VALUES,
    st.dictionaries(FIELDS, VALUES | OBJECTS, max_size=8),
)


@given(st.text(max_size=200) | st.binary(max_size=200), st.booleans())
def test_garbage_is_refused_with_nothing_but_a_request_error(data: str | bytes, binary: bool) -> None:
    try:
        frame = decode_frame(data, binary=binary)
        assert isinstance(frame, dict)
        parse_request(frame)
    except RequestError:
        pass


@given(OBJECTS | ANYTHING)
def test_any_messagepack_is_an_object_or_refused(value: Any) -> None:
    try:
        data = msgpack.packb(value)
    except (OverflowError, ValueError):
        return
    try:
        frame = decode_frame(data, binary=True)
    except BadRequest:
        return
    assert json.loads(encode_json(frame)) == frame, "what is let in can be told in JSON"


@given(REQUESTS)
def test_a_malformed_request_is_refused_with_nothing_but_a_request_error(frame: dict[str, Any]) -> None:
    try:
        request = parse_request(frame)
    except RequestError:
        return
    assert type(request) is ACTIONS[frame["action"]]


@given(OBJECTS)
def test_json_comes_through_as_it_was(frame: dict[str, Any]) -> None:
    assert decode_frame(encode_json(frame).decode(), binary=False) == frame
    assert decode_frame(json.dumps(frame), binary=False) == frame


@given(OBJECTS)
def test_messagepack_comes_through_as_it_was(frame: dict[str, Any]) -> None:
    assert decode_frame(encode_msgpack(frame), binary=True) == frame
    assert decode_frame(json_to_msgpack(encode_json(frame)), binary=True) == frame


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ('{"a":1} {"b":2}', "not JSON"),
        ("{'a':1}", "not JSON"),
        ('{"a":NaN}', "not JSON"),
        ("[]", "an array"),
        ('"put"', "a string"),
        ("7", "a number"),
        ("null", "null"),
        ('{"a":18446744073709551616}', "64 bits"),
        ('{"a":[{"b":"\\ud800"}]}', "."),
        ('{"a":' * 70 + "1" + "}" * 70, "deeper than 64"),
        ("[" * 100_000 + "]" * 100_000, "."),
        (b"\x80", "text frame"),
    ],
)
def test_a_frame_that_is_no_json_object_is_refused_in_words(data: str | bytes, says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        decode_frame(data, binary=False)


@pytest.mark.parametrize(
    "value",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": b"bytes"},
        {1: "a"},
        {"a": msgpack.Timestamp(1)},
        {"a": msgpack.ExtType(5, b"x")},
        [1],
        1,
    ],
)
def test_values_that_json_lacks_are_refused_in_messagepack_too(value: Any) -> None:
    with pytest.raises(BadRequest):
        decode_frame(msgpack.packb(value), binary=True)
    with pytest.raises(BadRequest, match="binary frame"):
        decode_frame("{}", binary=True)


@pytest.mark.parametrize(
    ("id_", "known"), [(7, 7), ("a", "a"), (0, 0), ("", ""), (True, None), (1.5, None), ([], None)]
)
def test_an_id_is_a_string_or_an_integer(id_: Any, known: Any) -> None:
    assert request_id({"id": id_}) == known
    assert request_id({}) is None


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('{"id":7,"action":"put","item":{"x":18446744073709551616}}', 7),
        ('{"id":"a","x":-9223372036854775809}', "a"),
        ('{"x":' + "[" * 70 + "]" * 70 + ',"id":7}', 7),
        ('{"id":18446744073709551616}', None),
        ('{"id":"\\ud800"}', None),
        ('{"id":7,"x":NaN}', None),
        ("[7]", None),
    ],
)
def test_a_frame_that_is_refused_is_answered_with_its_id_where_it_can_be_read(text: str, known: Any) -> None:
    with pytest.raises(BadRequest):
        decode_frame(text, binary=False)
    assert id_of_refused(text, binary=False) == known
    assert id_of_refused(text.encode(), binary=False) is None


def test_an_unknown_action_is_unsupported() -> None:
    with pytest.raises(UnsupportedAction):
        parse_request({"action": "nonsense"})
    with pytest.raises(BadRequest, match="no action"):
        parse_request({"id": 1})


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        ({"action": "put", "table": "t", "item": {"id": 1}, "if": {"absent": True}, "request": "r"}, Put),
        ({"action": "update", "table": "t", "key": "a", "set": {"a.b": 1}, "remove": ["c"], "add": {"n": 1}}, Update),
        ({"action": "update", "table": "t", "key": "a", "set": [[["a.b"], 1]], "remove": [["c", "d"]]}, Update),
        ({"action": "delete", "table": "t", "key": {"id": 1}, "if": {"version": 3}}, Delete),
        ({"action": "get", "table": "t", "key": 5}, Get),
        ({"action": "query", "table": "t", "key": 5, "after": 1, "before": "x", "prefix": "p", "reverse": True}, Query),
        ({"action": "query", "table": "t", "key": 5, "limit": 1000}, Query),
        ({"action": "ping"}, Ping),
    ],
)
def test_the_requests_of_the_contract_are_read(frame: dict[str, Any], kind: type[Any]) -> None:
    assert type(parse_request(frame)) is kind


@pytest.mark.parametrize(
    "frame",
    [
        {"action": "put", "item": {}},
        {"action": "put", "table": "t"},
        {"action": "put", "table": "t", "item": []},
        {"action": "put", "table": "t", "item": {}, "iff": {"absent": True}},
        {"action": "put", "table": "t", "item": {}, "if": {}},
        {"action": "put", "table": "t", "item": {}, "if": {"absent": False}},
        {"action": "put", "table": "t", "item": {}, "if": {"absent": True, "version": 1}},
        {"action": "put", "table": "t", "item": {}, "if": {"version": "1"}},
        {"action": "put", "table": "t", "item": {}, "if": {"newer": 1}},
        {"action": "put", "table": "t", "item": {}, "request": ""},
        {"action": "put", "table": "t", "item": {}, "request": 5},
        {"action": "get", "table": "t"},
        {"action": "query", "table": "t", "key": 1, "limit": 0},
        {"action": "query", "table": "t", "key": 1, "limit": 1001},
        {"action": "query", "table": "t", "key": 1, "after": True},
        {"action": "update", "table": "t", "key": 1, "set": [["a"]]},
        {"action": "update", "table": "t", "key": 1, "remove": "a"},
        {"action": "auth"},
        {"action": "auth", "auth_key": 5},
        {"action": "auth", "auth_key": "k", "topics": {"a": 1}},
    ],
)
def test_a_request_of_a_wrong_shape_is_a_bad_request(frame: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        parse_request(frame)


@given(OBJECTS, st.none() | TEXTS)
def test_a_feeds_frame_is_json_with_its_cursor_and_topic(rest: dict[str, Any], topic: str | None) -> None:
    rest = {"position": "0-0-1-0", **{k: v for k, v in rest.items() if k not in ("type", "cursor", "topic")}}
    frame = feed_frame(FeedBody("change", msgspec.json.encode(rest)), "1.2.abc", topic)
    expected = {"type": "change", "cursor": "1.2.abc", **rest}
    assert json.loads(frame) == expected | ({} if topic is None else {"topic": topic})
    assert msgpack.unpackb(json_to_msgpack(frame)) == json.loads(frame)


@pytest.mark.parametrize(
    "number",
    [
        "0.12345678901234567891",
        "0.12345678901234567",  # 17 digits, but the nearest double is …66
        "4503599627370496.3",  # beyond 2^52 a double has no fraction
        "9007199254740993.0",
        "123456789012345678e2",
        "1e-400",
        "3e-324",  # between the two smallest doubles
        "1e-99999999999999999999",
    ],
)
def test_a_number_that_a_double_would_round_is_refused_with_its_path(number: str) -> None:
    with pytest.raises(BadRequest, match=r"would be rounded at \$\.item\.list\[1\] .*: send it with fewer digits"):
        decode_frame(f'{{"action":"put","item":{{"list":[1,{number}]}}}}', binary=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", 0.1),
        ("0.10000000000000001", 0.1),  # as %.17g of C writes it
        ("0.12345678901234566", 0.12345678901234566),
        ("1.000000000000000000000", 1.0),
        ("1152921504606846976.0", 2.0**60),
        ("5e-324", 5e-324),
        ("1e23", 1e23),
        ("-0.0", -0.0),
    ],
)
def test_a_number_that_names_one_double_is_kept(text: str, value: float) -> None:
    assert decode_frame(f'{{"a":{text}}}', binary=False) == {"a": value}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_double_is_kept_as_python_and_c_write_it(value: float) -> None:
    assert decode_frame(f'{{"a":{value!r}}}', binary=False) == {"a": value}
    assert decode_frame(f'{{"a":{value:.16e}}}', binary=False) == {"a": value}


@given(st.decimals(allow_nan=False, allow_infinity=False, places=None))
def test_an_accepted_number_comes_back_unchanged(number: Decimal) -> None:
    """A number is refused, or the double that is kept is written as the same number with as many digits."""
    text = f"{number:e}"
    try:
        kept = decode_frame(f'{{"a":{text}}}', binary=False)["a"]
    except BadRequest:
        return
    assert number in (Decimal(f"{kept:.{len(number.as_tuple().digits)}g}"), Decimal(repr(kept)))


def test_a_number_beyond_the_largest_double_is_refused_with_its_path() -> None:
    with pytest.raises(BadRequest, match=r"a number that is not finite at \$\.item\.x"):
        decode_frame('{"action":"put","item":{"x":1e999}}', binary=False)
