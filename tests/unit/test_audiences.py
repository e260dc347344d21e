"""Audiences: who is admitted and who is sent to are the same people."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.app import App
from tidewire.audiences import Audience, Recipients, everyone, nobody, resolve, user
from tidewire.errors import ConfigurationError
from tidewire.keys import Scalar
from tidewire.records import Item

PEOPLE = ["alice", "bob", "carol", "dave"]
GROUPS: list[Scalar] = ["r1", "r2", 3]

app = App("test")
rooms = app.membership("members", group="room", member="user")


class Known:
    """What is known of groups, in a dict."""

    def __init__(self, groups: Mapping[Scalar, Mapping[str, Item]]) -> None:
        self.groups = groups

    def members(self, membership: str, group: Scalar) -> Mapping[str, Item]:
        assert membership == "members"
        return self.groups.get(group, {})

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        return self.members(membership, group).get(user)

    def vacant(self, membership: str, group: Scalar) -> bool:
        return not self.members(membership, group)


LEAVES = st.sampled_from(
    [
        nobody,
        everyone,
        user("author"),
        user("readers"),
        rooms.of("room"),
        rooms.of("room", role="owner"),
        rooms.of("other", role="owner", muted=False),
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
    },
)
MEMBERS = st.dictionaries(
    NAMES, st.fixed_dictionaries({"role": st.sampled_from(["owner", "guest"])}, optional={"muted": st.booleans()})
)
KNOWN = st.dictionaries(st.sampled_from(GROUPS), MEMBERS).map(Known)


@given(EXPRESSIONS, ITEMS, KNOWN, NAMES)
def test_who_is_admitted_is_who_is_sent_to(audience: Audience, item: Item, known: Known, who: str) -> None:
    sent = audience.recipients(item, known)
    assert audience.admits(item, who, known) == (sent.everyone or who in sent.users)


@given(EXPRESSIONS, ITEMS, KNOWN)
def test_everyone_or_somebody_is_everyone_once(audience: Audience, item: Item, known: Known) -> None:
    assert (everyone | audience).recipients(item, known) == Recipients(frozenset(), everyone=True)
    assert (audience | everyone).recipients(item, known) == Recipients(frozenset(), everyone=True)


@given(EXPRESSIONS, ITEMS, KNOWN)
def test_narrowing_by_everyone_narrows_nothing_and_by_nobody_all(a: Audience, item: Item, known: Known) -> None:
    assert (a & everyone).recipients(item, known) == a.recipients(item, known)
    assert (a & nobody).recipients(item, known) == Recipients(frozenset())
    assert (a | nobody).recipients(item, known) == a.recipients(item, known)


@given(KNOWN, NAMES, st.sampled_from(GROUPS))
def test_a_vacant_group_admits_anyone_and_names_nobody(known: Known, who: str, group: Scalar) -> None:
    vacant = rooms.vacant("room")
    assert vacant.admits({"room": group}, who, known) == (not known.members("members", group))
    assert vacant.recipients({"room": group}, known) == Recipients(frozenset())


@pytest.mark.parametrize("group", [None, True, ["r1"], {"a": 1}])
def test_what_names_no_group_is_nobodys(group: object) -> None:
    known = Known({})
    for audience in (rooms.of("room"), rooms.vacant("room")):
        assert not audience.admits({"room": group}, "alice", known)
    assert not rooms.vacant("room").admits({}, "alice", known)


def test_members_with_values_are_those_whose_item_has_all_of_them() -> None:
    known = Known({"r1": {"alice": {"role": "owner", "muted": True}, "bob": {"role": "owner", "muted": False}}})
    assert rooms.of("room", role="owner", muted=False).recipients({"room": "r1"}, known).users == {"bob"}


def test_a_user_attribute_may_name_several() -> None:
    assert user("to").recipients({"to": ["alice", "bob"]}, Known({})).users == {"alice", "bob"}


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
