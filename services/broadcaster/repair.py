"""Repairing a partition whose broadcaster has missed changes: members are read from items, and all feeds begin anew.

Changes are missed where they were trimmed before they were read, and where a broadcaster passed changes of a table that
its application did not declare. The members of all groups are written in many small commits, so that no call to Redis
is large. The last commit says that the repair is done: a new owner begins again from the start until then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from tidewire.app import App, Membership
from tidewire.backend import Backend
from tidewire.functions import Operation
from tidewire.keys import value_of
from tidewire.records import Position, pack
from tidewire.walk import Place, walk

MEMBERS_BATCH = 200
"""Members that one commit of a repair writes at most."""
GROUPS_BATCH = 500
"""Groups that one commit of a repair clears at most."""
MAX_COMMIT_BYTES = 1 << 20
"""Bytes of membership items in one commit of a repair, about."""


class Repair(NamedTuple):
    """A repair under way."""

    position: Position
    """Feeds begin anew before this change: what they missed comes before it."""
    consumed: int
    """Entries of the batch to acknowledge at the end: the trimmed one that showed the gap, or none."""
    passed: tuple[int, int]
    """Id up to which all changes count as passed at the end."""
    pieces: AsyncIterator[list[Operation]]


async def members_as_they_are(app: App, backend: Backend, partition: int) -> AsyncIterator[list[Operation]]:
    """The operations that make the known members those of the items, in pieces of a bounded size.

    Items may be ahead of the changes that come next. Those are applied in order after that, and end in the same state.
    """
    for table in app.tables.values():
        if isinstance(table, Membership):
            async for piece in _cleared(backend, partition, table.name):
                yield piece
            async for piece in _written(backend, partition, table.name):
                yield piece


async def _cleared(backend: Backend, partition: int, membership: str) -> AsyncIterator[list[Operation]]:
    keys, last = backend.keys, b"-"
    while True:
        values = keys.values(partition, membership)
        names: Any = await backend.commands.zrangebylex(values, last, b"+", 0, GROUPS_BATCH)
        if not names:
            return
        last = b"(" + names[-1]
        yield [Operation("UNLINK", keys.members(membership, value_of(name)), ()) for name in names]


async def _written(backend: Backend, partition: int, membership: str) -> AsyncIterator[list[Operation]]:
    keys = backend.keys
    place: Place | None = None
    while found := await walk(backend, partition, membership, place, MEMBERS_BATCH):
        place = found[-1][0]
        piece: list[Operation] = []
        size_bytes = 0
        for _, key, record in found:
            item = pack(record.item)
            piece.append(Operation("HSET", keys.members(membership, key.partition), (pack(key.sort), item)))
            size_bytes += len(item)
            if size_bytes > MAX_COMMIT_BYTES:
                yield piece
                piece, size_bytes = [], 0
        if piece:
            yield piece
