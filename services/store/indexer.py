"""Indexes: a consumer group of the store carries each change of a table to the partitions of its index entries.

An entry lives in the partition of its index key, and goes there over a link, so repeated or late work does no harm.
A new index is filled from the items of each partition, and an index that is no longer declared is emptied in the same
way. No item is missed: either the walk finds it, or a change has removed it, and the indexer follows the changes.

If changes were trimmed unread, or a server fell back and lost index entries, indexes are repaired: entries without an
item are removed, then the index is filled again. Queries are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import structlog
from prometheus_client import Gauge

from tidewire.app import App
from tidewire.model.records import Change, Id, ItemRecord, Position, pack, unpack
from tidewire.process.partition.gaps import id_of, unbroken
from tidewire.process.partition.loop import Outcome
from tidewire.process.versions import Versions
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Batch, Effect, Owned, RedisCommand
from tidewire.redis.keys import ConsumerGroup, Home, PartitionField
from tidewire.redis.walk import walk

from .indexes import (
    Filling,
    Followed,
    Index,
    IndexEntry,
    Links,
    declared,
    entry_added,
    entry_removed,
    follow,
    place_of,
    wanted,
)

log = structlog.get_logger(__name__)

FILL_BATCH = 200
"""Items carried into an index, or out of it, between two batches of changes."""
NAMES_BATCH, ENTRIES_BATCH = 4, 32
"""Values of an index, and entries of each, checked between two batches. Records may be large."""
SCAN_S = 0.05
"""How long a search through keys may keep the indexer from changes."""
LOOK_S = 10.0

LAG = Gauge("tidewire_index_lag", "Seconds that the indexes are behind their tables.", ["partition"])


async def is_needed(app: App, backend: Backend) -> bool:
    """Whether there are indexes to keep or to empty."""
    if declared(app):
        return True
    partitions = range(backend.keys.partitions)
    return any([await backend.commands.hlen(backend.keys.indexes(partition)) for partition in partitions])


class IndexerTenure:
    """The indexer's work on one partition of the tables, while the store owns it."""

    def __init__(
        self, app: App, backend: Backend, partition: int, owned: Owned, versions: Versions | None = None
    ) -> None:
        self._app = app
        self._versions = versions
        self._backend = backend
        self._keys = backend.keys
        self._partition = partition
        self._owned = owned
        self._indexes: dict[Index, Filling] | None = None
        self._next: dict[Index, Filling] = {}
        self._followed: Followed | None = None  # None in a partition that no indexer has followed yet
        self._next_followed: Followed | None = None
        self._look_at = 0.0  # monotonic: when to read the destinations' generations again
        self._from: Id | None = None  # id of the newest change when this tenure began
        self._strays: AsyncIterator[list[IndexEntry]] | None = None
        self._steps = 0
        self._oldest: int | None = None  # time of the oldest change of the batch

    def destinations(self) -> Iterable[Home]:
        return [self._keys.home(partition) for partition in range(self._keys.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if self._indexes is None:
            self._indexes, self._followed = await self._stored(), await self._came_to()
            self._from = batch.last
        changes = [(id_, _change(fields)) for id_, fields in batch.entries]
        if self._versions:
            # Neither emptied nor skipped while a live store declares them.
            tables = {index.table for index in self._indexes} | {change.table for _, change in changes if change}
            unknown = frozenset(tables - self._app.tables.keys() - {""})
            await self._versions.leave_to_others(ConsumerGroup.INDEXER, self._partition, unknown)
        self._next = wanted(self._app, self._indexes)
        await self._repair_if_needed(batch.last, changes)
        links = await self._step(changes)
        for id_, change in changes:
            if change is None:
                continue
            position = Position(self._partition, change.generation, *id_)
            for to, effects in follow(self._app, self._keys, self._next, position, change).items():
                links.setdefault(to, []).extend(effects)
        if not changes:
            LAG.labels(self._partition).set(0)
        times = [change.at for _, change in changes if change]
        self._oldest = times[0] if times else None
        operations = self._operations()
        if not (changes or operations or self._strays):
            return None
        return Outcome(
            len(changes), operations, {self._keys.home(partition): [effects] for partition, effects in links.items()}
        )

    async def committed(self, *, confirmed: bool) -> None:
        self._indexes, self._followed = self._next, self._next_followed
        if self._oldest is not None:
            LAG.labels(self._partition).set(max(time.time() - self._oldest / 1000, 0))

    def _operations(self) -> list[RedisCommand]:
        """Return the stored form of the progress."""
        assert self._indexes is not None
        stored = self._keys.indexes(self._partition)
        changed = {index: filling for index, filling in self._next.items() if self._indexes.get(index) != filling}
        operations = [
            RedisCommand("HSET", stored, (index.field, filling.stored())) for index, filling in changed.items()
        ]
        operations += [
            RedisCommand("HDEL", stored, (index.field,)) for index in self._indexes.keys() - self._next.keys()
        ]
        if self._next_followed != self._followed:
            operations.append(
                RedisCommand("HSET", self._owned.home.partition, (PartitionField.INDEXED, pack(self._next_followed)))
            )
        return operations

    async def _stored(self) -> dict[Index, Filling]:
        """Return the indexes that this partition knows."""
        found: dict[Index, Filling] = {}
        for field, raw in (await self._backend.commands.hgetall(self._keys.indexes(self._partition))).items():
            table, partition, sort = unpack(field)
            found[Index(table, (partition, sort))] = Filling.of(unpack(raw))
        return found

    async def _came_to(self) -> Followed | None:
        raw = await self._backend.commands.hget(self._owned.home.partition, PartitionField.INDEXED)
        if raw is None:
            return None
        last, fell_back = unpack(raw)
        return Followed(id_of(last), tuple(fell_back))

    # ── repairs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _repair_if_needed(self, newest: Id, changes: Sequence[tuple[Id, Change | None]]) -> None:
        """Begin every index anew if changes were lost before they got here, or their effects were lost at a
        destination."""
        last = changes[-1][0] if changes else newest
        if self._followed is None:
            self._next_followed = Followed(last, await self._last_falls())
            return
        whole = unbroken(self._followed.last, changes) == len(changes) if changes else newest <= self._followed.last
        fell_back = self._followed.fell_back
        if time.monotonic() >= self._look_at:
            fell_back = await self._last_falls()
        self._next_followed = Followed(max(last, self._followed.last), fell_back)
        fallen = [partition for partition, at in enumerate(fell_back) if at != self._followed.fell_back[partition]]
        if whole and not fallen:
            return
        # Other destinations still have their entries, unless this partition itself fell back or missed changes.
        lost_in = fallen if whole and self._partition not in fallen else []
        reason = "an index's server has fallen back" if whole else "changes were trimmed unread"
        log.warning("indexes_repaired", partition=self._partition, reason=reason, destinations=lost_in or "all")
        self._strays = None
        self._next = {index: filling.anew(lost_in) for index, filling in self._next.items()}

    async def _last_falls(self) -> tuple[int, ...]:
        self._look_at = time.monotonic() + LOOK_S
        found = await self._backend.calls(
            ("HGET", home.partition, PartitionField.ALONE) for home in self.destinations()
        )
        return tuple(int(generation or 0) for generation in found)

    async def _step(self, changes: Sequence[tuple[Id, Change | None]]) -> Links:
        """Do one step for the first index that is not complete.

        Its effects are numbered after the last change's own.
        """
        links: Links = {}
        index = next((index for index, filling in sorted(self._next.items()) if not filling.done), None)
        generation = self._owned.fence.generation
        if index is None or self._followed is None or self._from is None:
            return links
        if self._followed.last < self._from:
            return links  # an earlier owner may have sent later effects, and this one would count as old
        if any(change and change.generation != generation for _, change in changes):
            return links  # effects of an earlier generation go first, because after this one they would count as old
        position = Position(self._partition, generation, *self._followed.last)
        entries = await (self._carry(index) if self._next[index].sound else self._weed(index))
        for entry in entries:
            # Greater than any number before, also of an earlier owner: epochs are times in ms, and no owner does a
            # thousand steps in one.
            self._steps += 1
            number = self._owned.fence.epoch * 1000 + self._steps
            links.setdefault(entry.partition, []).append(Effect(position, number, entry.operations))
        return links

    async def _carry(self, index: Index) -> list[IndexEntry]:
        """Carry the next items into the index, or out of it."""
        filling = self._next[index]
        found = await walk(self._backend, self._partition, index.table, filling.place, FILL_BATCH)
        if len(found) == FILL_BATCH:
            self._next[index] = filling._replace(place=found[-1][0])
        elif filling.add:
            self._next[index] = Filling(add=True, place=None, done=True)
            log.info("index_filled", table=index.table, attributes=index.attributes, partition=self._partition)
        else:
            del self._next[index]
        entries = (
            entry_added(self._keys, index, key, record)
            if filling.add
            else entry_removed(self._keys, index, key, record.item)
            for _, key, record in found
        )
        return [entry for entry in entries if entry and filling.concerns(entry.partition)]

    async def _weed(self, index: Index) -> list[IndexEntry]:
        """Remove the next entries without an item."""
        if index.table in self._app.tables:
            self._strays = self._strays or self._entries_without_item(index)
            async for entries in self._strays:
                return entries
        self._strays = None
        self._next[index] = self._next[index]._replace(sound=True)
        return []

    async def _entries_without_item(self, index: Index) -> AsyncIterator[list[IndexEntry]]:
        """Find entries of this partition's items, in any partition, that those items no longer have.

        It returns some at a time, and none if they take long to find, so that changes go on.
        """
        keys, names, filling = self._keys, list[bytes](), self._next[index]
        scanning = aiter(self._backend.scan(keys.index_pattern(*index)))
        name: asyncio.Future[bytes] | None = None
        try:
            while True:
                name = name or asyncio.ensure_future(anext(scanning))
                if not (await asyncio.wait({name}, timeout=SCAN_S))[0]:
                    yield []
                    continue
                found, name = name, None
                try:
                    names.append(found.result())
                except StopAsyncIteration:
                    break
                if not (keys.is_index(names[-1], *index) and filling.concerns(keys.partition_at(names[-1]))):
                    names.pop()  # the pattern is not exact, because a key may hold text that users write
                if len(names) == NAMES_BATCH:
                    async for strays in self._strays_of(index, names):
                        yield strays
                    names = []
            async for strays in self._strays_of(index, names):
                yield strays
        finally:
            if name:
                name.cancel()

    async def _strays_of(self, index: Index, names: Iterable[bytes]) -> AsyncIterator[list[IndexEntry]]:
        """Read the item after its entry. If it gains the entry later, a later change adds it again."""
        table, keys = self._app[index.table], self._keys
        places = dict.fromkeys(names, 0)
        while places:
            scans = (self._backend.commands.hscan(name, place, count=ENTRIES_BATCH) for name, place in places.items())
            pages: list[Any] = list(zip(places, await asyncio.gather(*scans), strict=True))
            entries = [
                (name, field, table.key_of(item), item)
                for name, (_, page) in pages
                for field, raw in page.items()
                if (item := ItemRecord(*unpack(raw)).item) is not None
            ]
            ours = [entry for entry in entries if keys.partition_of(entry[2].partition) == self._partition]
            items = [("HGET", keys.items(key.table, key.partition), key.field) for _, _, key, _ in ours]
            strays = []
            for (name, field, key, item), raw in zip(ours, await self._backend.calls(items), strict=True):
                where = place_of(keys, index, key, ItemRecord(*unpack(raw)).item if raw else None)
                if where is None or (where[1], where[3]) != (name, field):
                    stray = entry_removed(keys, index, key, item)
                    assert stray, "as it is an entry"
                    strays.append(stray)
            yield strays
            places = {name: place for name, (place, _) in pages if place}


def _change(fields: dict[bytes, bytes]) -> Change | None:
    """None for a change that was trimmed unread, which the store has counted."""
    return Change(*unpack(fields[b"r"])) if b"r" in fields else None
