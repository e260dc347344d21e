"""What indexes there are, how far each is filled, and which entries a change adds and removes. No I/O.

An entry of an index lies in the partition of its index key. `indexer.py` carries it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tidewire.app import App, index_field, index_key
from tidewire.model.records import Change, Id, Item, ItemRecord, Position, pack
from tidewire.model.values import ItemKey
from tidewire.redis.functions import Effect, RedisCommand
from tidewire.redis.keys import Keys
from tidewire.redis.walk import WalkPosition


class Index(NamedTuple):
    """An index as it is stored in Redis, which does not have its name."""

    table: str
    attributes: tuple[str, str]

    @property
    def field(self) -> bytes:
        return pack([self.table, *self.attributes])


class Filling(NamedTuple):
    """How far this partition's items have filled or emptied an index."""

    add: bool
    place: WalkPosition | None  # the last item that was carried; None at the start
    done: bool = False
    sound: bool = True  # False: entries without an item must be removed before it is filled
    only_in: tuple[int, ...] = ()
    """The partitions whose entries are repaired. Empty means all."""

    @classmethod
    def of(cls, stored: Sequence[Any]) -> Filling:
        found = cls(*stored)
        place = None if found.place is None else WalkPosition(*found.place)
        return found._replace(place=place, only_in=tuple(found.only_in))

    def stored(self) -> bytes:
        return pack(self if self.only_in else self[:4])

    def anew(self, lost_in: Iterable[int]) -> Filling:
        """Begin a repair in these partitions, or in all if there are none, and go on wherever a repair is under way."""
        partitions = tuple(sorted(lost_in))
        if not self.done:
            partitions = tuple(sorted({*partitions, *self.only_in})) if partitions and self.only_in else ()
        return Filling(self.add, None, sound=False, only_in=partitions)

    def concerns(self, partition: int) -> bool:
        return not self.only_in or partition in self.only_in


class Followed(NamedTuple):
    """The state of this partition's indexes."""

    last: Id  # id of the last change that was followed
    fell_back: tuple[int, ...]
    """When each destination last fell back without the others. Either it or this partition may then lack entries."""


def declared(app: App) -> set[Index]:
    """Return the indexes that the application declares."""
    return {Index(table.name, attributes) for table in app.tables.values() for attributes in table.indexes.values()}


def wanted(app: App, found: Mapping[Index, Filling]) -> dict[Index, Filling]:
    """The indexes to work on: those that the application declares, and those that must be emptied."""
    here = declared(app)
    result = dict(found)
    for index in here | found.keys():
        filling = found.get(index)
        if filling is None or filling.add != (index in here):
            result[index] = Filling(index in here, None, sound=filling is None or filling.sound)
    return result


class IndexEntry(NamedTuple):
    """The entry of one item in an index, and its place."""

    partition: int
    operations: tuple[RedisCommand, ...]


def entry_added(keys: Keys, index: Index, key: ItemKey, record: ItemRecord) -> IndexEntry | None:
    """Return the entry of an item, or None if the item is not in the index."""
    where = place_of(keys, index, key, record.item)
    if where is None:
        return None
    partition, items, order, field = where
    return IndexEntry(
        partition, (RedisCommand("HSET", items, (field, pack(record))), RedisCommand("ZADD", order, ("0", field)))
    )


def entry_removed(keys: Keys, index: Index, key: ItemKey, item: Item | None) -> IndexEntry | None:
    """Return what removes the entry of an item, or None if the item was not in the index."""
    where = place_of(keys, index, key, item)
    if where is None:
        return None
    partition, items, order, field = where
    return IndexEntry(partition, (RedisCommand("HDEL", items, (field,)), RedisCommand("ZREM", order, (field,))))


def place_of(keys: Keys, index: Index, key: ItemKey, item: Item | None) -> tuple[int, bytes, bytes, bytes] | None:
    """Return the partition, items, order and field of an item's entry, or None if the item is not in the index."""
    values = index_key(item, index.attributes) if item is not None else None
    if item is None or values is None:
        return None
    items, order = keys.index(index.table, index.attributes, values[0])
    return keys.partition_of(values[0]), items, order, index_field(key, item, index.attributes)


Links = dict[int, list[Effect]]
"""Effects on index entries, by the partition of the entries."""


def follow(app: App, keys: Keys, indexes: Mapping[Index, Filling], position: Position, change: Change) -> Links:
    """The effects of one change on its table's indexes: remove the old image's entry, add the new one's."""
    links: Links = {}
    key_values = list(change.key.values())
    key = ItemKey(change.table, key_values[0], key_values[1] if len(key_values) > 1 else None)
    number = 0
    for index in sorted(indexes):
        if index.table != change.table:
            continue
        removed = entry_removed(keys, index, key, change.old)
        added = None
        if change.new is not None and indexes[index].add:
            added = entry_added(keys, index, key, ItemRecord(change.version, change.at, change.by, change.new))
        for entry in (removed, added):
            number += 1
            if entry:
                links.setdefault(entry.partition, []).append(Effect(position, number, entry.operations))
    return links
