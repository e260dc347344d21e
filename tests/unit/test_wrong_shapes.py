"""Each wrong shape of each action: the error says what was wrong and where, and the partition goes on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shapes import GOOD, MAX_BYTES, NO_JSON, SEEDS, WRONG, Wrong, make_app
from tidewire.errors import BadRequest, RequestError
from tidewire.model.protocol import STORE_ACTIONS, decode_frame, parse_request

from .world import World


def seeded() -> World:
    world = World(make_app(), item_bytes=MAX_BYTES)
    for table, item in SEEDS:
        world.do("alice", "put", table=table, item=item)
    return world


SHARED = seeded()
"""One partition for all of them: what one of them did to it, the others would see."""


def refusal(world: World, frame: dict[str, Any]) -> dict[str, Any]:
    """The error by which a frame is refused, by the protocol or else by the store."""
    before = len(world.changes), _held(world)
    try:
        parse_request(decode_frame(json.dumps(frame), binary=False))
    except RequestError as error:
        return error.as_frame(None)
    assert frame["action"] in STORE_ACTIONS, "nobody but the protocol looks at the others"
    body = {name: value for name, value in frame.items() if name not in ("id", "request", "traceparent")}
    (reply,) = world.run(world.command("alice", **body))
    assert reply.error, f"it was done: {reply.result}"
    assert (len(world.changes), _held(world)) == before, "what is refused writes nothing"
    return reply.error


def _held(world: World) -> dict[bytes, dict[bytes, bytes]]:
    return {key: dict(fields) for key, fields in world.hashes.items() if fields}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_shape_is_refused_with_what_and_where(wrong: Wrong) -> None:
    error = refusal(SHARED, wrong.frame)
    assert error["code"] == wrong.code
    for name in wrong.names:
        assert name in error["message"], "the message names what was wrong and where"
    assert len(error["message"]) < 2000, "it tells, and does not send back all that came"
    if place := re.fullmatch(r"operations\[(\d+)\]", wrong.names[0] if wrong.names else ""):
        assert error["details"]["operation"] == int(place[1])


@pytest.mark.parametrize("text", NO_JSON)
def test_invalid_json_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(BadRequest, match=r"JSON.*(byte \d+|truncated|at `\$.+`)"):
        decode_frame(text, binary=False)


def test_all_of_them_in_one_batch_leave_the_partition_as_it_was() -> None:
    world = seeded()
    passed = []
    for wrong in WRONG:
        try:
            parse_request(decode_frame(json.dumps(wrong.frame), binary=False))
        except RequestError:
            continue
        passed.append(wrong)
    assert len(passed) > 50, "the store has its share of them"
    action, fields = GOOD
    commands = [world.command("alice", wrong.action, **wrong.fields) for wrong in passed]
    *refused, good = world.run(*commands, world.command("alice", action, **fields))
    assert [wrong for wrong, reply in zip(passed, refused, strict=True) if reply.error is None] == []
    assert good.error is None
    assert (good.result["version"], good.result["item"]["count"]) == (2, 2)
    assert len(world.changes) == len(SEEDS) + 1


# ── whatever is sent ────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = st.sampled_from(
    ["id", "page", "n", "room", "user", "owner", "at", "text", "text.a", "list.a", "deep.a", "deep", "count", "", "x"]
)
SCALARS = st.sampled_from(["n", "p", "o", "alice", "", "a.b", 0, 1, -1, 1.5, 2**53, 2**63, -(2**63), 1e308, None, True])
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ITEMS = st.sampled_from([item for _, item in SEEDS]) | st.dictionaries(NAMES, ANY, max_size=4)
PAIRS = st.dictionaries(NAMES, ANY, max_size=2) | st.lists(
    st.tuples(NAMES | st.lists(NAMES, max_size=3), ANY).map(list), max_size=2
)
IFS = st.sampled_from([{"version": 1}, {"absent": True}, {"present": True}]) | st.builds(
    lambda item: {"equals": item}, ITEMS
)
TABLES = st.sampled_from([*make_app().tables, "nothing"])
KEYED = st.sampled_from(
    [
        {"table": "notes", "key": "n"},
        {"table": "lines", "key": {"page": "p", "n": 1}},
        {"table": "orders", "key": {"id": "o"}},
    ]
) | st.fixed_dictionaries({"table": TABLES, "key": SCALARS | st.dictionaries(NAMES, SCALARS, max_size=2)})
OPTIONAL: dict[str, Any] = {"if": IFS}


def keyed(action: str, required: dict[str, Any] | None = None, **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    """A request about a key, often one that is there."""
    more = st.fixed_dictionaries({"action": st.just(action)} | (required or {}), optional=optional)
    return st.builds(lambda key, fields: key | fields, KEYED, more)


WRITES = st.one_of(
    st.fixed_dictionaries({"action": st.just("put"), "table": TABLES, "item": ITEMS}, optional=OPTIONAL),
    keyed(
        "update",
        set=PAIRS,
        remove=st.lists(NAMES | st.lists(NAMES, max_size=3), max_size=2),
        add=PAIRS,
        **OPTIONAL,
    ),
    keyed("delete", **OPTIONAL),
)
EDGES = SCALARS | st.lists(SCALARS, max_size=3)
FRAMES = st.one_of(
    WRITES,
    keyed("get"),
    keyed(
        "query",
        index=st.sampled_from(["by_owner", "by_member", "nothing"]),
        after=EDGES,
        before=EDGES,
        prefix=st.sampled_from(["", "a", "é"]),
        limit=st.integers(1, 3),
        reverse=st.booleans(),
    ),
    st.fixed_dictionaries(
        {
            "action": st.just("transact"),
            "operations": st.lists(WRITES | keyed("check", {"if": IFS}), max_size=3),
        }
    ),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(FRAMES, min_size=1, max_size=4), st.sampled_from(["client", "service"]))
def test_nothing_that_is_sent_is_our_fault(frames: list[dict[str, Any]], role: str) -> None:
    """Whatever comes through the protocol is done or refused: no request is an error of the server."""
    world = seeded()
    world.follow()
    for frame in frames:
        try:
            parse_request(decode_frame(json.dumps(frame), binary=False))
        except RequestError:
            continue
        (reply,) = world.run(world.command("alice", **frame, role=role))
        assert reply.error is None or reply.error["code"] != "internal", frame
        json.dumps(reply.result)
        world.follow()
