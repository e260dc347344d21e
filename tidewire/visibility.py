"""What a member gains or loses sight of when a membership begins, changes or ends, as far as declarations tell. Pure.

The store reads what must be looked at into the membership's own change; the broadcaster tells the member.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tidewire.app import App, Membership, Table
from tidewire.audiences import Audience, Intersection, Members, Peers, Topic, Union
from tidewire.model.records import Item


class Sight(NamedTuple):
    """Tables, by what is to be done about them."""

    look: list[Table]
    """Partitioned by the group: each of its items there may have come into sight, or gone out of it."""
    gone: list[Table]
    """Partitioned by the group: none of its items is seen any more."""
    anywhere: list[Table]
    """Items of the group, or of its members, may lie at any key."""
    peers: list[Table]
    """Whose items show themselves to whoever shares a group with somebody."""
    topics: bool
    """Whether the member may no longer follow some topics."""
    peers_topics: bool
    """Whether, for some topics, those that it shares the group with may no longer follow them either."""


def sight(app: App, membership: Membership, old: Item | None, new: Item | None) -> Sight:
    """What follows from a membership item that was `old` and is `new`; either may be None."""
    of_peers = new is None and any(
        isinstance(part, Peers) and part.membership == membership.name
        for topic in app.topics.values()
        for part in topic.followers.parts()
    )
    found = Sight([], [], [], [], of_peers or _follows_less(app, membership, old, new), of_peers)
    for table in app.tables.values():
        if not isinstance(table.readers, Audience):
            # A function says what it wants of each item. Of the group it speaks where the table is partitioned by it.
            (found.look if table.key[0] == membership.key[0] else found.anywhere).append(table)
            continue
        affected = [part for part in _parts(table.readers, membership) if part.counts(old) != part.counts(new)]
        here = [part for part in affected if part.attribute == table.key[0]]
        if here:
            nothing = new is None or not any(part.counts(new) for part in here)
            (found.gone if nothing and _needs(table.readers, here, new) else found.look).append(table)
        if len(here) < len(affected):
            found.anywhere.append(table)
        if (old is None) != (new is None) and any(
            isinstance(part, Peers) and part.membership == membership.name for part in table.readers.parts()
        ):
            found.anywhere.append(table)
            found.peers.append(table)
    return found


def _parts(audience: Audience, membership: Membership) -> Iterator[Members]:
    for part in audience.parts():
        if isinstance(part, Members) and part.membership == membership.name:
            yield part


def _needs(audience: Audience, parts: list[Members], member: Item | None) -> bool:
    """Whether nobody is in the audience who is in none of these parts, of those who have that membership item."""
    if isinstance(audience, Intersection):
        return _needs(audience.left, parts, member) or _needs(audience.right, parts, member)
    if isinstance(audience, Union):
        return _needs(audience.left, parts, member) and _needs(audience.right, parts, member)
    return audience in parts and isinstance(audience, Members) and not audience.counts(member)


def _follows_less(app: App, membership: Membership, old: Item | None, new: Item | None) -> bool:
    topics: list[Topic] = list(app.topics.values())
    return any(
        part.counts(old) and not part.counts(new) for topic in topics for part in _parts(topic.followers, membership)
    )
