"""The store's own history, read while it is written: at the end, the beginning of a bounded stream may be trimmed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from redis.exceptions import RedisError

from tidewire.model.records import Change, id_text, stream_id, unpack
from tidewire.redis.backend import Backend

from .check import Report
from .expect import Written
from .images import slim

READ_PAUSE_S = 1.0
READ_BATCH = 40
"""Entries of one read. With both images of a large item in each that is about 20 MB."""

Id = tuple[int, int]


class Historian:
    """Follows the change streams of all partitions. Images are kept slim."""

    def __init__(self, partitions: int) -> None:
        self._found: list[dict[Id, Written]] = [{} for _ in range(partitions)]
        self._last: list[Id] = [(0, 0)] * partitions

    @property
    def changes(self) -> int:
        return sum(map(len, self._found))

    def history(self) -> list[Written]:
        """All changes, in the order of each partition."""
        return [
            one for partition in self._found for _, one in sorted(partition.items(), key=lambda pair: pair[1].place)
        ]

    async def run(self, backend: Backend) -> None:
        """Read until cancelled. Retries while a server does not answer."""
        while True:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self.read(backend)
            await asyncio.sleep(READ_PAUSE_S)

    async def read(self, backend: Backend) -> None:
        """Read new entries. If the last one has gone, as after a failover, compare the whole stream."""
        for partition, found in enumerate(self._found):
            stream, last = backend.keys.changes(partition), id_text(self._last[partition])
            if found and not await backend.commands.xrange(stream, last, last):
                await self._compare(backend, partition)
            some: Any
            while some := await backend.commands.xrange(stream, f"({id_text(self._last[partition])}", "+", READ_BATCH):
                self._keep(partition, some)

    async def _compare(self, backend: Any, partition: int) -> None:
        """Forget entries that the stream has lost: those missing between entries that it has."""
        stream, found = backend.keys.changes(partition), self._found[partition]
        there: set[Id] = set()
        low = "-"
        while some := await backend.commands.xrange(stream, low, "+", READ_BATCH):
            there.update(stream_id(id_) for id_, _ in some)
            low = f"({some[-1][0].decode()}"
            self._keep(partition, some)
        first = min(there, default=(0, 0))
        for id_ in [id_ for id_ in found if id_ >= first and id_ not in there]:
            del found[id_]
        self._last[partition] = max(found, default=(0, 0))

    def _keep(self, partition: int, entries: Any) -> None:
        found = self._found[partition]
        for raw_id, fields in entries:
            change, id_ = Change(*unpack(fields[b"r"])), stream_id(raw_id)
            if change.event != "SEND":
                change = change._replace(new=slim(change.new), old=slim(change.old))
            found[id_] = Written(partition, (change.generation, *id_), change._replace(opens=None))
            self._last[partition] = id_

    def check_whole(self, report: Report) -> None:
        """Check that each change's predecessor was read. If one was trimmed unread, no comparison is possible."""
        for partition, found in enumerate(self._found):
            for one in found.values():
                previous = tuple(one.change.previous or (0, 0))
                if previous != (0, 0) and previous not in found:
                    report.add(
                        "history", f"partition {partition}", f"the change before {one.place} was not read in time"
                    )


async def read_history(backend: Backend) -> list[Written]:
    """All changes that the streams still have."""
    historian = Historian(backend.keys.partitions)
    await historian.read(backend)
    return historian.history()
