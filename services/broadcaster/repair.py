"""The repair of a partition whose broadcaster has missed changes.

It misses changes that were trimmed unread, and those of tables that its application did not declare. A repair has three
steps:

1. The members of groups are rebuilt from the items, in many small commits, so that no call to Redis is large. The
   items may be ahead of the changes that come next.
2. All changes up to the newest one at the end of step 1 are passed without delivery. Membership changes among them are
   applied in order, so that the members are exactly those at that change.
3. All feeds are reset after that change. Readers query, and find a state that contains it.

The first commit notes the repair, and the last one removes the note. Until then, a new owner begins the repair again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from tidewire.app import App, Membership
from tidewire.model.records import Change, Id, pack
from tidewire.model.values import value_of
from tidewire.redis.backend import Backend
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import Keys
from tidewire.redis.walk import WalkPosition, walk

from .decide import member_operation

MEMBERS_BATCH = 200
"""Maximum members that one commit of a repair writes."""
GROUPS_BATCH = 500
"""Maximum groups that one commit of a repair clears."""
MAX_COMMIT_BYTES = 1 << 20
"""Maximum bytes of membership items in one commit of a repair, about."""


class Repair:
    """A repair in progress. `memberships` are those whose members must be rebuilt."""

    def __init__(self, app: App, backend: Backend, partition: int, memberships: Iterable[str]) -> None:
        self._pieces = members_as_they_are(app, backend, partition, memberships)
        self.until: Id | None = None
        """Changes up to this id are passed without delivery; None during step 1."""

    async def piece(self, last: Id) -> list[RedisCommand] | None:
        """Return the next commands of step 1; None at its end. `last` is the id of the newest change."""
        piece = await anext(self._pieces, None)
        if piece is None and self.until is None:
            self.until = last
        return piece


def applied(app: App, keys: Keys, changes: Iterable[tuple[Id, Change | None]]) -> list[RedisCommand]:
    """Return the commands that apply membership changes to the members."""
    found = []
    for _, change in changes:
        table = app.tables.get(change.table) if change else None
        if change and isinstance(table, Membership):
            found.append(member_operation(keys, table, change))
    return found


async def members_as_they_are(
    app: App, backend: Backend, partition: int, memberships: Iterable[str]
) -> AsyncIterator[list[RedisCommand]]:
    """Yield the commands that rebuild the members from the items, in pieces of bounded size."""
    names = frozenset(memberships)
    for table in app.tables.values():
        if table.name in names and isinstance(table, Membership):
            async for piece in _cleared(backend, partition, table.name):
                yield piece
            async for piece in _written(backend, partition, table.name):
                yield piece


async def _cleared(backend: Backend, partition: int, membership: str) -> AsyncIterator[list[RedisCommand]]:
    keys, last = backend.keys, b"-"
    while True:
        values = keys.values(partition, membership)
        names: Any = await backend.commands.zrangebylex(values, last, b"+", 0, GROUPS_BATCH)
        if not names:
            return
        last = b"(" + names[-1]
        yield [RedisCommand("UNLINK", keys.members(membership, value_of(name)), ()) for name in names]


async def _written(backend: Backend, partition: int, membership: str) -> AsyncIterator[list[RedisCommand]]:
    keys = backend.keys
    place: WalkPosition | None = None
    while found := await walk(backend, partition, membership, place, MEMBERS_BATCH):
        place = found[-1][0]
        piece: list[RedisCommand] = []
        size_bytes = 0
        for _, key, record in found:
            item = pack(record.item)
            piece.append(RedisCommand("HSET", keys.members(membership, key.partition), (pack(key.sort), item)))
            size_bytes += len(item)
            if size_bytes > MAX_COMMIT_BYTES:
                yield piece
                piece, size_bytes = [], 0
        if piece:
            yield piece
