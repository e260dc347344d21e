"""Indexes: each change of a table carried to where its index entries lie, by a consumer group of the store's own.

An entry lies in the partition of its index key, and goes there over a link, so that repeated or late work does no harm.
An index that is new is filled from the items of each partition, one that is declared no more is emptied in the same
way: an item is either there, and found, or was removed by a change, which passes by.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import structlog
from prometheus_client import Gauge

from tidewire.app import App, ItemKey, index_field, index_key
from tidewire.backend import Backend
from tidewire.functions import Batch, Effect, Operation, Owned
from tidewire.keys import Home, Keys
from tidewire.partition.loop import Outcome
from tidewire.records import Change, Item, ItemRecord, Position, pack, unpack
from tidewire.walk import Place, walk

log = structlog.get_logger(__name__)

GROUP = "indexer"
FILL_AT_A_TIME = 200
"""Items that are carried into a new index between two batches of changes."""

LAG = Gauge("tidewire_index_lag", "Seconds that the indexes are behind their tables.", ["partition"])


class Index(NamedTuple):
    """An index as it lies in Redis: its name is of no account."""

    table: str
    attributes: tuple[str, str]

    @property
    def field(self) -> bytes:
        return pack([self.table, *self.attributes])


class Filling(NamedTuple):
    """How far an index is filled, or emptied, from this partition's items."""

    add: bool
    place: Place | None  # the last item that was carried; None at the start
    done: bool = False


def declared(app: App) -> set[Index]:
    return {Index(table.name, attributes) for table in app.tables.values() for attributes in table.indexes.values()}


async def is_needed(app: App, backend: Backend) -> bool:
    """Whether there are indexes to be kept, or some that are to be emptied."""
    if declared(app):
        return True
    partitions = range(backend.keys.partitions)
    return any([await backend.commands.hlen(backend.keys.indexes(partition)) for partition in partitions])


class Entry(NamedTuple):
    """What an index has of one item, and where."""

    partition: int
    operations: tuple[Operation, ...]


def entry_added(keys: Keys, index: Index, key: ItemKey, record: ItemRecord) -> Entry | None:
    """None for an item that is not in the index."""
    where = _where(keys, index, key, record.item)
    if where is None:
        return None
    partition, items, order, field = where
    return Entry(partition, (Operation("HSET", items, (field, pack(record))), Operation("ZADD", order, ("0", field))))


def entry_removed(keys: Keys, index: Index, key: ItemKey, item: Item | None) -> Entry | None:
    where = _where(keys, index, key, item)
    if where is None:
        return None
    partition, items, order, field = where
    return Entry(partition, (Operation("HDEL", items, (field,)), Operation("ZREM", order, (field,))))


def _where(keys: Keys, index: Index, key: ItemKey, item: Item | None) -> tuple[int, bytes, bytes, bytes] | None:
    values = index_key(item, index.attributes) if item is not None else None
    if item is None or values is None:
        return None
    items, order = keys.index(index.table, index.attributes, values[0])
    return keys.partition_of(values[0]), items, order, index_field(key, item, index.attributes)


def follow(app: App, keys: Keys, indexes: Mapping[Index, Filling], position: Position, change: Change) -> Links:
    """What one change does to the indexes of its table: the old image's entry goes, the new one's comes."""
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


Links = dict[int, list[Effect]]


class IndexerTenure:
    """The indexer's work on one partition of the tables while it owns it."""

    def __init__(self, app: App, backend: Backend, partition: int, owned: Owned) -> None:
        self._app = app
        self._backend = backend
        self._keys = backend.keys
        self._partition = partition
        self._owned = owned
        self._indexes: dict[Index, Filling] | None = None
        self._next: dict[Index, Filling] = {}
        self._at: tuple[int, int] | None = None  # id of the last change that was followed
        self._next_at = (0, 0)
        self._steps = 0
        self._oldest: int | None = None  # time of the oldest change of the batch

    def destinations(self) -> Iterable[Home]:
        return [self._keys.home(partition) for partition in range(self._keys.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if self._indexes is None:
            self._indexes = await self._found()
        links: Links = {}
        self._next = dict(self._indexes)
        if not batch.entries:
            self._at = batch.last  # nothing is pending and nothing is new
            LAG.labels(self._partition).set(0)
        if self._at is not None:
            links = await self._fill(self._at)
        for id_, change in _changes(batch):
            position = Position(self._partition, change.generation, *id_)
            for to, effects in follow(self._app, self._keys, self._next, position, change).items():
                links.setdefault(to, []).extend(effects)
        changed = {index: filling for index, filling in self._next.items() if self._indexes.get(index) != filling}
        gone = self._indexes.keys() - self._next.keys()
        if not batch.entries and not changed and not gone:
            return None
        self._next_at = batch.entries[-1][0] if batch.entries else batch.last
        times = [change.at for _, change in _changes(batch)]
        self._oldest = times[0] if times else None
        stored = self._keys.indexes(self._partition)
        operations = [Operation("HSET", stored, (index.field, pack(filling))) for index, filling in changed.items()]
        operations += [Operation("HDEL", stored, (index.field,)) for index in gone]
        return Outcome(
            len(batch.entries),
            operations,
            {self._keys.home(partition): [effects] for partition, effects in links.items()},
        )

    async def committed(self, *, confirmed: bool) -> None:
        self._indexes, self._at = self._next, self._next_at
        if self._oldest is not None:
            LAG.labels(self._partition).set(max(time.time() - self._oldest / 1000, 0))

    async def _found(self) -> dict[Index, Filling]:
        """The indexes as this partition knows them, and as the application wants them."""
        found: dict[Index, Filling] = {}
        for field, raw in (await self._backend.commands.hgetall(self._keys.indexes(self._partition))).items():
            table, partition, sort = unpack(field)
            add, place, done = unpack(raw)
            found[Index(table, (partition, sort))] = Filling(add, None if place is None else Place(*place), done)
        wanted = declared(self._app)
        for index in wanted | found.keys():
            filling = found.get(index)
            if filling is None or filling.add != (index in wanted):
                found[index] = Filling(index in wanted, None)
        return found

    async def _fill(self, at: tuple[int, int]) -> Links:
        """One step for the first index that is not filled yet: it counts as more of the last change's effects."""
        links: Links = {}
        index = next((index for index, filling in sorted(self._next.items()) if not filling.done), None)
        if index is None:
            return links
        filling = self._next[index]
        found = await walk(self._backend, self._partition, index.table, filling.place, FILL_AT_A_TIME)
        position = Position(self._partition, self._owned.fence.generation, *at)
        for place, key, record in found:
            entry = (
                entry_added(self._keys, index, key, record)
                if filling.add
                else entry_removed(self._keys, index, key, record.item)
            )
            filling = filling._replace(place=place)
            if entry:
                # Greater than any number before, also under an earlier owner: epochs are times in ms, and no owner
                # makes a thousand of these in one.
                self._steps += 1
                number = self._owned.fence.epoch * 1000 + self._steps
                links.setdefault(entry.partition, []).append(Effect(position, number, entry.operations))
        if len(found) == FILL_AT_A_TIME:
            self._next[index] = filling
        elif filling.add:
            self._next[index] = filling._replace(place=None, done=True)
            log.info("index_filled", table=index.table, attributes=index.attributes, partition=self._partition)
        else:
            del self._next[index]
        return links


def _changes(batch: Batch) -> Iterable[tuple[tuple[int, int], Change]]:
    for id_, fields in batch.entries:
        if b"r" in fields:  # else it was trimmed unread: the store has counted it
            yield id_, Change(*unpack(fields[b"r"]))
