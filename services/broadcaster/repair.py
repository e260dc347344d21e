"""Repairing a partition whose broadcaster has missed changes: members are read from items, and all feeds begin anew.

Changes are missed where they were trimmed before they were read, and where a broadcaster passed changes of a table that
its application did not declare. A repair has three steps:

1. The members of groups are written as the items have them, in many small commits, so that no call to Redis is large.
   The items may be ahead of the changes that come next.
2. Changes up to the one that was the last when the items had been read are passed without telling anybody. Membership
   changes among them are applied in order, so the members are in the end exactly those at that change.
3. All feeds begin anew behind that change. Readers query, and find a state that contains it.

The first commit notes that a repair is under way and the last one removes the note: a new owner begins again from the
start until then.
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
"""Members that one commit of a repair writes at most."""
GROUPS_BATCH = 500
"""Groups that one commit of a repair clears at most."""
MAX_COMMIT_BYTES = 1 << 20
"""Bytes of membership items in one commit of a repair, about."""


class Repair:
    """A repair under way. `memberships` are those whose members are not known."""

    def __init__(self, app: App, backend: Backend, partition: int, memberships: Iterable[str]) -> None:
        self._pieces = members_as_they_are(app, backend, partition, memberships)
        self.until: Id | None = None
        """Changes up to this id are passed without telling anybody; None while members are being written."""

    async def piece(self, last: Id) -> list[RedisCommand] | None:
        """The next operations of the first step; None at its end. `last` is the id of the newest change by now."""
        piece = await anext(self._pieces, None)
        if piece is None and self.until is None:
            self.until = last
        return piece


def applied(app: App, keys: Keys, changes: Iterable[tuple[Id, Change | None]]) -> list[RedisCommand]:
    """The operations that apply membership changes to the known members."""
    found = []
    for _, change in changes:
        table = app.tables.get(change.table) if change else None
        if change and isinstance(table, Membership):
            found.append(member_operation(keys, table, change))
    return found


async def members_as_they_are(
    app: App, backend: Backend, partition: int, memberships: Iterable[str]
) -> AsyncIterator[list[RedisCommand]]:
    """The operations that make the known members those of the items, in pieces of a bounded size."""
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
