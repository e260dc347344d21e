"""Audiences: expressions over an item that say who may see or write it. No I/O.

The store asks whether an audience admits one user (`admits`). The broadcaster asks for all its users (`recipients`).
Both pass an object with the methods of `Knowledge`, which knows the members of groups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tidewire.errors import ConfigurationError
from tidewire.model.claims import ClaimCondition, both, claim_is, either, holds
from tidewire.model.records import Item
from tidewire.model.values import Scalar, canonical


class Knowledge(Protocol):
    """Known memberships. A method may raise to say that a group must be fetched first."""

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        """Return the membership item of a user in a group, or None."""

    def any_member(self, membership: str, groups: Iterable[Scalar], user: str) -> bool:
        """Whether the user is a member of one of the groups. Missing facts are asked for all at once."""

    def members(self, membership: str, group: Scalar) -> Mapping[str, Item]:
        """Return all membership items of a group, by user."""

    def members_of_all(self, membership: str, groups: Iterable[Scalar]) -> Iterable[Mapping[str, Item]]:
        """Return all membership items of several groups. Missing groups are asked for all at once."""

    def vacant(self, membership: str, group: Scalar) -> bool:
        """Whether a group has no members."""

    def groups(self, membership: str, user: str) -> Iterable[Scalar]:
        """Return the groups of a user. They come from an index, which is eventually consistent."""


class Reader(NamedTuple):
    """A user with the claims of one connection."""

    user: str
    claims: Mapping[str, Any]


class Recipients(NamedTuple):
    """The recipients of a change, each with a condition that a connection's claims must meet."""

    users: Mapping[str, ClaimCondition] = {}
    topics: Mapping[str, ClaimCondition] = {}  # the followers of each
    open: ClaimCondition = False  # every connection that meets it

    def user(self, name: str) -> ClaimCondition:
        """Return the condition for connections of a user, by name or as one of all."""
        return either(self.users.get(name, False), self.open)


NO_RECIPIENTS = Recipients()


SizeOf = Callable[[str, Scalar], int]
"""Returns the number of members of a group, from its membership and its key."""


class Audience:
    """The base of all audiences. `a | b` is the union, `a & b` the intersection."""

    def __or__(self, other: Audience) -> Audience:
        return Union(self, _audience(other))

    def __and__(self, other: Audience) -> Audience:
        return Intersection(self, _audience(other))

    def __ror__(self, other: object) -> Audience:
        return _audience(other) | self

    def __rand__(self, other: object) -> Audience:
        return _audience(other) & self

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        raise NotImplementedError

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        """Return all recipients. With `only`, return what concerns that user, for which fewer facts are needed."""
        raise NotImplementedError

    def count(self, item: Item, size: SizeOf) -> int:
        """Return about how many feeds a change of the item goes to; `size` returns the number of a group's members."""
        return 1

    def parts(self) -> Iterator[Audience]:
        """Yield this audience and those that it is made of."""
        yield self


def _audience(value: Any) -> Audience:
    if not isinstance(value, Audience):
        advice = "; a function cannot be part of one: combine audiences within it" if callable(value) else ""
        raise ConfigurationError(
            f"an audience was expected (user(…), members.of(…), claim(…), everyone, nobody), not {value!r}{advice}"
        )
    return value


@dataclass(frozen=True)
class Nobody(Audience):
    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return False

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        return NO_RECIPIENTS


@dataclass(frozen=True)
class Everyone(Audience):
    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return True

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        return Recipients(open=True)


@dataclass(frozen=True)
class Claim(Audience):
    """Connections whose claim equals the item's attribute of the same name: a string, number or bool."""

    name: str

    def _condition(self, item: Item) -> ClaimCondition:
        value = item.get(self.name)
        return claim_is(self.name, value) if isinstance(value, str | int | float) else False

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return holds(self._condition(item), reader.claims)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        return Recipients(open=self._condition(item))


@dataclass(frozen=True)
class User(Audience):
    """The user that an attribute names, or each of a list."""

    attribute: str

    def _named(self, item: Item) -> set[str]:
        value = item.get(self.attribute)
        values = value if isinstance(value, list) else [value]
        return {name for name in values if isinstance(name, str)}

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return reader.user in self._named(item)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        named = self._named(item)
        return Recipients(dict.fromkeys(named if only is None else named & {only}, True))

    def count(self, item: Item, size: SizeOf) -> int:
        return len(self._named(item))


def _group(item: Item, attribute: str) -> Scalar | None:
    value = item.get(attribute)
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Members(Audience):
    """The members of the group that an attribute names. With `values`, only those whose membership item has them."""

    membership: str
    attribute: str
    values: tuple[tuple[str, Any], ...] = ()

    def counts(self, member: Item | None) -> bool:
        """Whether a user with that membership item is in the audience."""
        return member is not None and all(member.get(name) == value for name, value in self.values)

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        group = _group(item, self.attribute)
        return group is not None and self.counts(known.member(self.membership, group, reader.user))

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        group = _group(item, self.attribute)
        if group is None:
            return NO_RECIPIENTS
        if only is not None:
            return Recipients({only: True} if self.counts(known.member(self.membership, group, only)) else {})
        members = known.members(self.membership, group)
        # A member is the name of a user, which is a string. The store refuses others.
        return Recipients({u: True for u, member in members.items() if isinstance(u, str) and self.counts(member)})

    def count(self, item: Item, size: SizeOf) -> int:
        group = _group(item, self.attribute)
        return 0 if group is None else size(self.membership, group)


@dataclass(frozen=True)
class Vacant(Audience):
    """Every user, while the group has no members. It admits users, and has no recipients."""

    membership: str
    attribute: str

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        group = _group(item, self.attribute)
        return group is not None and known.vacant(self.membership, group)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        return NO_RECIPIENTS


@dataclass(frozen=True)
class Peers(Audience):
    """The users who share a group with the user that an attribute names. Eventually consistent."""

    membership: str
    attribute: str

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return bool(self.recipients(item, known, reader.user).users)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        named = item.get(self.attribute)
        if not isinstance(named, str):
            return NO_RECIPIENTS
        groups = known.groups(self.membership, named)
        if only is not None:
            shared = known.any_member(self.membership, groups, only)
            return Recipients({only: True} if shared else {})
        all_members = known.members_of_all(self.membership, groups)
        return Recipients({u: True for members in all_members for u in members if isinstance(u, str)})


@dataclass(frozen=True)
class Followers(Audience):
    """The followers of the topic that attributes of the item name. Users who may follow it may read the item."""

    topic: Topic
    attributes: tuple[str, ...]

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        values = self._values(item)
        return values is not None and self.topic.followers.admits(values, reader, known)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        values = self._values(item)
        return NO_RECIPIENTS if values is None else Recipients(topics={self.topic.name(values): True})

    def _values(self, item: Item) -> dict[str, str] | None:
        found = [_group(item, attribute) for attribute in self.attributes]
        if None in found:
            return None
        values = dict(
            zip(self.topic.fields, (str(canonical(value)) for value in found if value is not None), strict=True)
        )
        # A name that parses to other values would belong to other followers.
        return values if self.topic.parse(self.topic.name(values)) == values else None


CLAIM_TOPICS = "claim:"


def claim_topic(name: str, value: Scalar | bool) -> str:
    """Return the topic of all connections whose claim has a value."""
    written = value if isinstance(value, bool) else canonical(value)
    return f"{CLAIM_TOPICS}{name}:{json.dumps(written, ensure_ascii=False)}"


class Topic:
    """A family of topics.

    Args:
        pattern: the names of the topics, such as `"cell:{id}"`.
        followers: the audience of users who may follow one, for an item with the values in its name.

    Raises:
        ConfigurationError: the pattern is malformed, or could match topics of another kind.
    """

    def __init__(self, pattern: str, followers: Audience) -> None:
        self.pattern = pattern
        self.followers = _audience(followers)
        if any(isinstance(part, Followers) for part in followers.parts()):
            raise ConfigurationError(f"topic {pattern!r}: its followers cannot be those of another topic")
        if any(isinstance(part, Vacant) for part in followers.parts()):
            raise ConfigurationError(
                f"topic {pattern!r}: its followers cannot be those of a vacant group: nobody would know whom to send "
                "away when its first member comes"
            )
        if not isinstance(pattern, str) or not pattern.partition("{")[0] or pattern.startswith(CLAIM_TOPICS):
            raise ConfigurationError(
                f"topic {pattern!r}: a pattern begins with text of its own, as 'cell:{{id}}', not with {CLAIM_TOPICS}"
            )
        pieces = re.split(r"\{(.*?)\}", pattern)
        self.fields = tuple(pieces[1::2])
        if any(not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in self.fields) or re.search(
            "[{}]", "".join(pieces[::2])
        ):
            raise ConfigurationError(f"topic {pattern!r}: write a pattern like 'cell:{{id}}'")
        if len(set(self.fields)) < len(self.fields):
            raise ConfigurationError(f"topic {pattern!r} has a name twice")
        if len(self.fields) and any(not text for text in pieces[2:-1:2]):
            raise ConfigurationError(f"topic {pattern!r}: between two names there must be something that parts them")
        self._pieces = pieces

    def of(self, *attributes: str) -> Audience:
        """Return the audience of the followers of one topic.

        Args:
            attributes: attributes of the item, one for each `{…}` of the pattern, in order.
        """
        if len(attributes) != len(self.fields):
            raise ConfigurationError(
                f"topic {self.pattern!r}: of(…) names an attribute for each of {len(self.fields)} parts, "
                f"not {len(attributes)}"
            )
        return Followers(self, attributes)

    def name(self, values: Mapping[str, str]) -> str:
        """Return the name of the topic with these values."""
        return "".join(values[text] if n % 2 else text for n, text in enumerate(self._pieces))

    def parse(self, name: str) -> dict[str, str] | None:
        """Return the values in the name of a topic of this family; None for another topic.

        Each value but the last ends at the first separator. A later one would leave less for the rest, so no other
        choice is tried, and the time is linear in the name.
        """
        if not self.fields:
            return {} if name == self.pattern else None
        before, *separators, after = self._pieces[::2]
        at, end = len(before), len(name) - len(after)
        if at >= end or not name.startswith(before) or not name.endswith(after):
            return None
        values = []
        for separator in separators:
            found = name.find(separator, at + 1, end)
            if found < 0:
                return None
            values.append(name[at:found])
            at = found + len(separator)
        return dict(zip(self.fields, [*values, name[at:end]], strict=True)) if at < end else None


@dataclass(frozen=True)
class Union(Audience):
    left: Audience
    right: Audience

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return self.left.admits(item, reader, known) or self.right.admits(item, reader, known)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        left, right = self.left.recipients(item, known, only), self.right.recipients(item, known, only)
        if left.open is True or right.open is True:
            return Recipients(open=True)  # everyone | x is everyone
        return Recipients(
            _merged(left.users, right.users), _merged(left.topics, right.topics), either(left.open, right.open)
        )

    def count(self, item: Item, size: SizeOf) -> int:
        return self.left.count(item, size) + self.right.count(item, size)

    def parts(self) -> Iterator[Audience]:
        yield self
        yield from self.left.parts()
        yield from self.right.parts()


def _merged(left: Mapping[str, ClaimCondition], right: Mapping[str, ClaimCondition]) -> dict[str, ClaimCondition]:
    found = dict(left)
    for name, condition in right.items():
        found[name] = either(found.get(name, False), condition)
    return found


@dataclass(frozen=True)
class Intersection(Audience):
    left: Audience
    right: Audience

    def admits(self, item: Item, reader: Reader, known: Knowledge) -> bool:
        return self.left.admits(item, reader, known) and self.right.admits(item, reader, known)

    def recipients(self, item: Item, known: Knowledge, only: str | None = None) -> Recipients:
        left, right = self.left.recipients(item, known, only), self.right.recipients(item, known, only)
        if (left.topics and (right.users or right.topics)) or (right.topics and left.users):
            raise ConfigurationError("the followers of a topic can be narrowed by claims only")
        users = {name: both(left.user(name), right.user(name)) for name in {**left.users, **right.users}}
        topics = {name: both(condition, right.open) for name, condition in left.topics.items()}
        topics |= {name: both(condition, left.open) for name, condition in right.topics.items()}
        return Recipients(_possible(users), _possible(topics), both(left.open, right.open))

    def count(self, item: Item, size: SizeOf) -> int:
        # Both sides are computed, so the larger one tells the work.
        return max(self.left.count(item, size), self.right.count(item, size))

    def parts(self) -> Iterator[Audience]:
        yield self
        yield from self.left.parts()
        yield from self.right.parts()


def _possible(conditions: Mapping[str, ClaimCondition]) -> dict[str, ClaimCondition]:
    return {name: condition for name, condition in conditions.items() if condition is not False}


nobody = Nobody()
everyone = Everyone()

AudienceOf = Audience | Callable[[Item], Audience]
"""An audience, or a function of the item that returns one."""


def user(attribute: str) -> Audience:
    """Return the audience of the user that an attribute names, or of each user of a list."""
    return User(attribute)


def claim(name: str) -> Audience:
    """Return the audience of all connections whose claim equals the item's attribute of the same name."""
    return Claim(name)


def topic(pattern: str, *, followers: Audience = nobody) -> Topic:
    """Return a family of topics, for `readers=….of("attribute")`. `App.topic` declares one that no table names."""
    return Topic(pattern, followers)


def resolve(declared: AudienceOf, item: Item) -> Audience:
    """Return the audience of an item. Raises whatever a function of the application raises."""
    return declared if isinstance(declared, Audience) else _audience(declared(item))
