"""Audiences: the users that may read an item are those that receive its changes."""

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tidewire.app import App
from tidewire.audiences import (
    NO_RECIPIENTS,
    Audience,
    Peers,
    Reader,
    Recipients,
    Topic,
    claim,
    everyone,
    nobody,
    resolve,
    topic,
    user,
)
from tidewire.errors import ConfigurationError
from tidewire.model.claims import both, claim_is, either, holds, unless
from tidewire.model.records import Item, pack, unpack
from tidewire.model.values import Scalar

PEOPLE = ["alice", "bob", "carol", "dave"]
GROUPS: list[Scalar] = ["r1", "r2", 3]

app = App("test")
rooms = app.membership("members", group="room", member="user")


class Known:
    """What is known of groups, in a dict."""

    def __init__(self, groups: Mapping[Scalar, Mapping[str, Item]]) -> None:
        self.groups_ = groups

    def members(self, membership: str, group: Scalar) -> Mapping[str, Item]:
        assert membership == "members"
        return self.groups_.get(group, {})

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> list[Mapping[str, Item]]:
        return [self.members(membership, group) for group in groups]

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.members(membership, group).get(user)

    def any_member(self, membership: str, groups: Iterable[Scalar], user: str) -> bool:
        return any(self.member(membership, group, user) is not None for group in groups)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return not self.members(membership, group)

    def groups(self, membership: str, user: str) -> list[Scalar]:
        return [group for group, members in self.groups_.items() if user in members]


LEAVES = st.sampled_from(
    [
        nobody,
        everyone,
        user("author"),
        user("readers"),
        rooms.of("room"),
        rooms.of("room", role="owner"),
        rooms.of("other", role="owner", muted=False),
        rooms.peers("author"),
        claim("tenant"),
    ]
)
EXPRESSIONS: st.SearchStrategy[Audience] = st.recursive(
    LEAVES,
    lambda inner: st.tuples(inner, inner, st.booleans()).map(lambda t: t[0] | t[1] if t[2] else t[0] & t[1]),
    max_leaves=8,
)
NAMES = st.sampled_from(PEOPLE)
ODD = st.none() | st.booleans() | st.integers(0, 3) | st.just({"a": 1})
ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "author": NAMES | ODD,
        "readers": st.lists(NAMES | ODD, max_size=3) | ODD,
        "room": st.sampled_from(GROUPS) | ODD,
        "other": st.sampled_from(GROUPS) | ODD,
        "tenant": st.sampled_from(["t1", "t2", 1, True]) | ODD,
    },
)
MEMBERS = st.dictionaries(
    NAMES, st.fixed_dictionaries({"role": st.sampled_from(["owner", "guest"])}, optional={"muted": st.booleans()})
)
CLAIMS = st.fixed_dictionaries({}, optional={"tenant": st.sampled_from(["t1", "t2", 1, True])})
KNOWN = st.dictionaries(st.sampled_from(GROUPS), MEMBERS).map(Known)


@given(EXPRESSIONS, ITEMS, KNOWN, NAMES, CLAIMS)
def test_the_users_admitted_are_the_users_sent_to(
    audience: Audience, item: Item, known: Known, who: str, claims: dict[str, object]
) -> None:
    admitted = audience.admits(item, Reader(who, claims), known)
    assert admitted == holds(audience.recipients(item, known).user(who), claims)
    assert admitted == holds(audience.recipients(item, known, only=who).user(who), claims), "asked for one alone"


@given(EXPRESSIONS, ITEMS, KNOWN)
def test_everyone_or_a_user_is_everyone_once(audience: Audience, item: Item, known: Known) -> None:
    assert (everyone | audience).recipients(item, known) == Recipients(open=True)
    assert (audience | everyone).recipients(item, known) == Recipients(open=True)


@given(EXPRESSIONS, ITEMS, KNOWN)
def test_narrowing_by_everyone_keeps_all_and_by_nobody_keeps_none(a: Audience, item: Item, known: Known) -> None:
    assert (a & everyone).recipients(item, known) == a.recipients(item, known)
    assert (a & nobody).recipients(item, known) == NO_RECIPIENTS
    assert (a | nobody).recipients(item, known) == a.recipients(item, known)


@given(EXPRESSIONS, ITEMS, KNOWN)
def test_no_change_has_more_recipients_than_are_counted(audience: Audience, item: Item, known: Known) -> None:
    assume(not any(isinstance(part, Peers) for part in audience.parts()))  # they are found by an index, and count one
    counted = audience.count(item, lambda membership, group: len(known.members(membership, group)))
    assert counted >= len(audience.recipients(item, known).users)


@given(KNOWN, NAMES, st.sampled_from(GROUPS))
def test_a_vacant_group_admits_anyone_and_has_no_members(known: Known, who: str, group: Scalar) -> None:
    vacant = rooms.vacant("room")
    assert vacant.admits({"room": group}, Reader(who, {}), known) == (not known.members("members", group))
    assert vacant.recipients({"room": group}, known) == NO_RECIPIENTS


@pytest.mark.parametrize("group", [None, True, ["r1"], {"a": 1}])
def test_an_item_that_names_no_group_has_no_audience(group: object) -> None:
    known = Known({})
    for audience in (rooms.of("room"), rooms.vacant("room")):
        assert not audience.admits({"room": group}, Reader("alice", {}), known)
    assert not rooms.vacant("room").admits({}, Reader("alice", {}), known)


def test_members_with_values_are_those_whose_item_has_all_of_them() -> None:
    known = Known({"r1": {"alice": {"role": "owner", "muted": True}, "bob": {"role": "owner", "muted": False}}})
    assert rooms.of("room", role="owner", muted=False).recipients({"room": "r1"}, known).users == {"bob": True}


def test_a_user_attribute_may_name_several() -> None:
    assert user("to").recipients({"to": ["alice", "bob"]}, Known({})).users == {"alice": True, "bob": True}


def test_a_function_of_the_item_returns_its_audience() -> None:
    def readers(item: Item) -> Audience:
        return everyone if item.get("public") else user("author")

    assert resolve(readers, {"public": True}) is everyone
    assert resolve(readers, {"author": "alice"}) == user("author")
    assert resolve(nobody, {}) is nobody


def test_a_function_that_returns_no_audience_is_a_mistake_that_is_named() -> None:
    with pytest.raises(ConfigurationError, match="an audience was expected"):
        resolve(lambda _: True, {})  # type: ignore[arg-type, return-value]


def test_only_audiences_combine() -> None:
    with pytest.raises(ConfigurationError, match="an audience was expected"):
        user("author") | "bob"  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="an audience was expected"):
        user("author") & True  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="combine audiences within it"):
        user("author") & (lambda item: everyone)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="combine audiences within it"):
        (lambda item: everyone) & user("author")
    with pytest.raises(ConfigurationError, match="an audience was expected"):
        "bob" | user("author")


CONDITIONS = st.recursive(
    st.booleans() | st.builds(claim_is, st.sampled_from(["a", "b"]), st.sampled_from([1, True, "x"])),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda some: both(*some))
        | st.lists(inner, max_size=3).map(lambda some: either(*some))
        | inner.map(unless)
    ),
    max_leaves=6,
)
HELD = st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from([1, True, "x", None]))


@given(st.lists(CONDITIONS, max_size=4), HELD)
def test_conditions_are_boolean_algebra(conditions: list[Any], claims: dict[str, Any]) -> None:
    each = [holds(condition, claims) for condition in conditions]
    assert holds(both(*conditions), claims) == all(each)
    assert holds(either(*conditions), claims) == any(each)
    assert [holds(unless(condition), claims) for condition in conditions] == [not one for one in each]
    assert both(*conditions) == both(*reversed(conditions)), "written in one way"


@pytest.mark.parametrize("stored", [False, True])
def test_a_condition_is_met_by_a_claim_of_that_very_value(stored: bool) -> None:
    condition: Any = both(claim_is("tenant", 1), unless(claim_is("guest", True)))
    if stored:
        condition = unpack(pack(condition))
    assert holds(condition, {"tenant": 1})
    assert not holds(condition, {"tenant": True}), "true is not 1"
    assert not holds(condition, {"tenant": "1"})
    assert not holds(condition, {"tenant": 1, "guest": True})
    assert not holds(condition, {})


def test_a_topic_is_named_by_attributes_and_read_by_followers() -> None:
    cells = topic("cell:{x}/{y}", followers=rooms.of("x"))
    audience = cells.of("column", "row")
    known = Known({"r1": {"alice": {}}})
    item: Item = {"column": "r1", "row": 2.0}
    assert audience.recipients(item, known) == Recipients(topics={"cell:r1/2": True})
    assert cells.parse("cell:r1/2") == {"x": "r1", "y": "2"}
    assert cells.parse("cell:r1") is None
    assert audience.admits(item, Reader("alice", {}), known)
    assert not audience.admits(item, Reader("bob", {}), known)
    assert audience.recipients({"column": "r1"}, known) == NO_RECIPIENTS
    # As a topic it would be read as column "a", row "b/2": others might follow it.
    assert audience.recipients({"column": "a/b", "row": "2"}, known) == NO_RECIPIENTS


def test_followers_are_narrowed_by_claims_alone() -> None:
    audience = topic("cell:{id}", followers=everyone).of("id")
    known = Known({})
    narrowed = (audience & claim("tenant")).recipients({"id": 1, "tenant": "t1"}, known)
    assert narrowed == Recipients(topics={"cell:1": claim_is("tenant", "t1")})
    with pytest.raises(ConfigurationError, match="narrowed by claims only"):
        (audience & user("author")).recipients({"id": 1, "author": "alice"}, known)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("{id}", "begins with text of its own"),
        ("claim:{id}", "not with claim:"),
        ("cell:{}", "write a pattern"),
        ("cell:{a b}", "write a pattern"),
        ("cell:{id", "write a pattern"),
        ("cell:{id}{row}", "something that parts them"),
        ("cell:{id}:{id}", "a name twice"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        topic(pattern, followers=everyone)


@given(
    st.sampled_from(["c:{x}", "c:{x}-{y}", "c:{x}-{y}-{z}.", "c:{x}--{y}.-.", "c", "c{x}c", "c:{x}-.{y}-"]),
    st.lists(st.sampled_from(["c", ":", "-", ".", "a"]), max_size=12),
)
def test_a_topic_is_taken_apart_as_a_lazy_expression_would(pattern: str, rest: list[str]) -> None:
    name, pieces = "c" + "".join(rest), re.split(r"\{(.*?)\}", pattern)
    expression = "".join(f"(?P<{text}>.+?)" if n % 2 else re.escape(text) for n, text in enumerate(pieces))
    expected = re.fullmatch(expression, name)
    assert Topic(pattern, everyone).parse(name) == (expected.groupdict() if expected else None)


def test_a_topic_that_matches_nowhere_is_refused_in_linear_time() -> None:
    square = Topic("square:{x}-{y}-{z}.", everyone)
    begun = time.perf_counter()
    assert square.parse("square:" + "-" * 20_000) is None
    assert time.perf_counter() - begun < 1, "an expression would take hours"
