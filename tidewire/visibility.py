"""Which tables a membership's change shows to its member or hides, as far as the declarations tell. No I/O.

The store puts the items to compare into the membership's own change. The broadcaster compares them, and delivers ENTER
and LEAVE to the member.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tidewire.app import App, Membership, Table
from tidewire.audiences import Audience, Intersection, Members, Peers, Topic, Union
from tidewire.model.records import Item


class Visibility(NamedTuple):
    """Tables, by what a membership's change does to the member's view of them."""

    compare: list[Table]
    """Partitioned by the group: each item of the group may have become visible or invisible."""
    hidden: list[Table]
    """Partitioned by the group: no item of the group is visible any more."""
    anywhere: list[Table]
    """Items of the group or its members may have any key, so the member must query."""
    peers: list[Table]
    """Readers are users who share a group: the other members must query too."""
    topics: bool
    """Whether the member may no longer follow some topics."""
    peers_topics: bool
    """Whether the other members of the group may no longer follow some topics either."""


def visibility(app: App, membership: Membership, old: Item | None, new: Item | None) -> Visibility:
    """Return what a membership item shows and hides that was `old` and is `new`. Either may be None."""
    of_peers = new is None and any(
        isinstance(part, Peers) and part.membership == membership.name
        for topic in app.topics.values()
        for part in topic.followers.parts()
    )
    found = Visibility([], [], [], [], of_peers or _follows_less(app, membership, old, new), of_peers)
    for table in app.tables.values():
        if not isinstance(table.readers, Audience):
            # A function can return any audience. Only a table that is partitioned by the group can be compared.
            (found.compare if table.key[0] == membership.key[0] else found.anywhere).append(table)
            continue
        affected = [part for part in _parts(table.readers, membership) if part.counts(old) != part.counts(new)]
        here = [part for part in affected if part.attribute == table.key[0]]
        if here:
            nothing = new is None or not any(part.counts(new) for part in here)
            (found.hidden if nothing and _needs(table.readers, here, new) else found.compare).append(table)
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
    """Whether a user with that membership item is in the audience only through one of these parts."""
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
