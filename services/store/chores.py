"""Chores: expiry, trimming of changes, and forgetting of versions. No I/O.

Each chore is part of the commit of a batch, like one more command. So none can interleave with a write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tidewire.app import CONNECTIONS, Membership
from tidewire.model.records import id_text
from tidewire.model.values import ItemKey, Scalar, name_of
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import PartitionField

from .appending import EXPIRY, append_change, expiry_of, keep_expiry, member_of
from .facts import CHORE_BATCH, ChangesFact, DueFact, Fact, FieldsFact, ItemFact, Stream, TombstonesFact
from .view import Gaps, View


def expire(view: View) -> bool:
    """Remove expired items. Returns whether there may be more."""
    due: list[ItemKey] = view.know(DueFact(view.situation.now))
    view.need(ItemFact(key) for key in due)
    gaps = Gaps()
    for key in due:
        table = view.app.tables.get(key.table)
        record = view.record(key)
        if table and record and record.item is not None and table.is_expired(record.item, view.situation.now):
            with gaps:
                append_change(view, EXPIRY, table, key, None)
        elif key not in view.written:  # the table has another `expires` attribute by now, or none
            at = expiry_of(table, record.item) if table and record else None
            view.effects.operations.append(keep_expiry(view.keys.expiries(view.situation.partition), key, at))
    gaps.close()
    return len(due) == CHORE_BATCH


class Trimmed(NamedTuple):
    lost: dict[str, int]
    """Changes that each group never read."""
    more: bool
    """Whether the stream still exceeds its memory, so that the next trim should come soon."""


def trim(view: View) -> Trimmed:
    """Trim the change stream behind its slowest group, and behind the retention time.

    Beyond its bound in entries, or four times its bound in bytes, unread changes are trimmed too, and counted.
    """
    situation = view.situation
    stream: Stream = view.know(ChangesFact())
    changes = view.keys.changes(situation.partition)
    assert situation.keep_since is not None
    oldest = min(situation.keep_since, stream.read_by_all)
    if oldest > stream.first:
        view.effects.operations.append(RedisCommand("XTRIM", changes, ("MINID", "=", id_text(oldest))))
    keep, more = stream.length, False
    if situation.keep_bytes and stream.size_bytes > situation.keep_bytes:
        keep = kept_by_bytes(stream, situation.keep_bytes)
        more = keep < stream.length
    if situation.keep_changes:
        keep = min(keep, situation.keep_changes)
    if keep >= stream.length:
        return Trimmed({}, more=False)
    # Changes that this commit appends also stay: they are not part of the measured stream.
    view.effects.operations.append(RedisCommand("XTRIM", changes, ("MAXLEN", "=", keep + view.appended)))
    # The server still counts changes as unread that were trimmed before. They were reported then.
    unread = {group: min(count, stream.length) for group, count in stream.unread.items()}
    return Trimmed({group: count - keep for group, count in unread.items() if count > keep}, more)


UNREAD_FACTOR = 4
"""Memory of unread changes, as a multiple of the bound of a change stream."""
STEPS = 4, 64
"""One trim removes a quarter of the excess by the average entry, and at least a 64th of the stream.

Entries differ in size. Trimming in steps, with a measurement after each, keeps about as many as fit.
"""


def kept_by_bytes(stream: Stream, max_bytes: int) -> int:
    """Return how many entries one trim keeps of a stream that exceeds `max_bytes` of memory."""
    length, size_bytes = stream.length, stream.size_bytes
    part, least = STEPS
    fit = length * max_bytes // size_bytes
    keep = length - max((length - fit) // part, length // least, 1)
    unread = min(max(stream.unread.values(), default=0), length) if stream.counted else length
    if keep >= unread:
        return keep
    # Changes that all groups have read go first. Unread ones go only beyond UNREAD_FACTOR times the bound.
    fit_unread = length * UNREAD_FACTOR * max_bytes // size_bytes
    return min(unread, max(fit_unread, keep))


def purge(view: View) -> tuple[int, bool]:
    """Forget the versions of items that were deleted before the oldest change.

    Partition-key values that this batch writes to are left for a later batch. Raises Missing.

    Returns:
        The floor under versions of new items, and whether there may be more to forget.
    """
    situation, floor = view.situation, view.situation.floor
    stream: Stream = view.know(ChangesFact())
    assert situation.keep_since is not None
    # Older than the oldest change, whichever bound has trimmed those before it.
    before = max(min(situation.keep_since, stream.read_by_all), stream.first)[0]
    dead: list[ItemKey] = view.know(TombstonesFact(before))
    busy = {(key.table, key.partition) for key in (*view.written, *view.effects.items)}
    may_be_more = len(dead) == CHORE_BATCH
    dead = [key for key in dead if (key.table, key.partition) not in busy]
    groups = Counter((key.table, key.partition) for key in dead)
    view.need(_of_tombstones(dead, groups))
    operations = view.effects.operations
    for key in dead:
        record = view.record(key)
        assert record is None or record.item is None, "a live item has no tombstone"
        if record and key.table != CONNECTIONS:
            floor = max(floor, record.version)
        operations.append(RedisCommand("HDEL", view.keys.items(key.table, key.partition), (key.field,)))
        operations.append(RedisCommand("ZREM", view.keys.tombstones(situation.partition), (member_of(key),)))
    for (table, partition), count in groups.items():
        if view.know(FieldsFact(table, partition)) <= count:
            values = view.keys.values(situation.partition, table)
            operations.append(RedisCommand("ZREM", values, (name_of(partition),)))
            operations += _forget_group(view, table, partition)
    if floor > situation.floor:
        operations.append(RedisCommand("HSET", view.keys.partition(situation.partition), (PartitionField.FLOOR, floor)))
    return floor, may_be_more


def _forget_group(view: View, table: str, group: Scalar) -> Iterable[RedisCommand]:
    """Return the commands that remove the state of a group without items and tombstones.

    Its changes have passed, or are lost.
    """
    if isinstance(view.app.tables.get(table), Membership):
        keys = view.keys
        versions = keys.group_versions(view.situation.partition)
        yield RedisCommand("HDEL", versions, (keys.group_field(table, group),))
        yield RedisCommand("DEL", keys.members(table, group), ())


def _of_tombstones(keys: Iterable[ItemKey], groups: Iterable[tuple[str, Scalar]]) -> Iterable[Fact]:
    yield from (ItemFact(key) for key in keys)
    yield from (FieldsFact(table, partition) for table, partition in groups)
