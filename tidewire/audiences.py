"""Who may see or write an item: expressions over the item, declared once, evaluated by store and broadcaster.

The store asks of one user (`admits`); the broadcaster asks for all (`recipients`). Both are given what they know of
memberships by an object with the methods of `Knowledge`; neither does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tidewire.errors import ConfigurationError
from tidewire.keys import Scalar
from tidewire.records import Item


class Knowledge(Protocol):
    """What is known of groups. A method may raise to say that it must be fetched first."""

    def member(self, membership: str, group: Scalar, user: str) -> Item | None:
        """The membership item of that user, or None."""

    def members(self, membership: str, group: Scalar) -> Mapping[str, Item]:
        """All membership items of the group, by user."""

    def vacant(self, membership: str, group: Scalar) -> bool:
        """Whether the group has no members."""


class Recipients(NamedTuple):
    """The feeds a change goes to."""

    users: frozenset[str]
    everyone: bool = False


NO_RECIPIENTS = Recipients(frozenset())


class Audience:
    """Base of all audiences. `a | b` is either, `a & b` both."""

    def __or__(self, other: Audience) -> Audience:
        return Union(self, _audience(other))

    def __and__(self, other: Audience) -> Audience:
        return Intersection(self, _audience(other))

    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        raise NotImplementedError

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        raise NotImplementedError


def _audience(value: Any) -> Audience:
    if not isinstance(value, Audience):
        raise ConfigurationError(f"an audience was expected (user(…), members.of(…), everyone, nobody), not {value!r}")
    return value


@dataclass(frozen=True)
class Nobody(Audience):
    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        return False

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        return NO_RECIPIENTS


@dataclass(frozen=True)
class Everyone(Audience):
    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        return True

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        return Recipients(frozenset(), everyone=True)


@dataclass(frozen=True)
class User(Audience):
    """The user, or the list of users, that an attribute names."""

    attribute: str

    def _named(self, item: Item) -> frozenset[str]:
        value = item.get(self.attribute)
        values = value if isinstance(value, list) else [value]
        return frozenset(name for name in values if isinstance(name, str))

    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        return user in self._named(item)

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        return Recipients(self._named(item))


def _group(item: Item, attribute: str) -> Scalar | None:
    value = item.get(attribute)
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Members(Audience):
    """The members of the group that an attribute names; with `values`, those whose membership item has them."""

    membership: str
    attribute: str
    values: tuple[tuple[str, Any], ...] = ()

    def _counts(self, member: Item | None) -> bool:
        return member is not None and all(member.get(name) == value for name, value in self.values)

    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        group = _group(item, self.attribute)
        return group is not None and self._counts(known.member(self.membership, group, user))

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        group = _group(item, self.attribute)
        if group is None:
            return NO_RECIPIENTS
        members = known.members(self.membership, group)
        # A member is a user, whose name is a string; the store lets no other one in.
        return Recipients(frozenset(u for u, member in members.items() if isinstance(u, str) and self._counts(member)))


@dataclass(frozen=True)
class Vacant(Audience):
    """Anyone, while the group has no members. It can be asked of a user, but names nobody to send to."""

    membership: str
    attribute: str

    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        group = _group(item, self.attribute)
        return group is not None and known.vacant(self.membership, group)

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        return NO_RECIPIENTS


@dataclass(frozen=True)
class Union(Audience):
    left: Audience
    right: Audience

    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        return self.left.admits(item, user, known) or self.right.admits(item, user, known)

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        left, right = self.left.recipients(item, known), self.right.recipients(item, known)
        if left.everyone or right.everyone:
            return Recipients(frozenset(), everyone=True)  # everyone | x is everyone
        return Recipients(left.users | right.users)


@dataclass(frozen=True)
class Intersection(Audience):
    left: Audience
    right: Audience

    def admits(self, item: Item, user: str, known: Knowledge) -> bool:
        return self.left.admits(item, user, known) and self.right.admits(item, user, known)

    def recipients(self, item: Item, known: Knowledge) -> Recipients:
        left, right = self.left.recipients(item, known), self.right.recipients(item, known)
        if left.everyone:
            return right
        return left if right.everyone else Recipients(left.users & right.users)


nobody = Nobody()
everyone = Everyone()

AudienceOf = Audience | Callable[[Item], Audience]
"""An audience, or a function of the item that returns one."""


def user(attribute: str) -> Audience:
    """The user, or list of users, named by that attribute of the item."""
    return User(attribute)


def resolve(declared: AudienceOf, item: Item) -> Audience:
    """The audience of an item. What a function of the application raises, this raises."""
    return declared if isinstance(declared, Audience) else _audience(declared(item))
