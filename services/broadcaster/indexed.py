"""Waiting for the indexer: the index of a user's groups must contain a membership before the user is told of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import structlog
from prometheus_client import Counter

from tidewire.app import App
from tidewire.audiences import Audience, Peers
from tidewire.model.records import Change, Id, unpack
from tidewire.redis.backend import Backend
from tidewire.redis.keys import PartitionField

log = structlog.get_logger(__name__)

INDEX_LOOK_S, INDEX_PATIENCE_S = 0.01, 2.0
"""Seconds between two reads of the indexer's position, and the maximum wait for one batch."""

BEHIND = Counter("tidewire_broadcaster_index_behind_total", "Times that a batch waited for the indexer in vain.")


def peer_memberships(app: App) -> frozenset[str]:
    """Return the memberships through which `peers` audiences see items or follow topics."""
    audiences = [table.readers for table in app.tables.values()]
    audiences += [topic.followers for topic in app.topics.values()]
    parts = (part for audience in audiences if isinstance(audience, Audience) for part in audience.parts())
    return frozenset(part.membership for part in parts if isinstance(part, Peers))


def last_of_peers(memberships: frozenset[str], changes: Iterable[tuple[Id, Change | None]]) -> Id | None:
    """Return the id of the last change that begins or ends one of these memberships."""
    found = None
    for id_, change in changes:
        if change and change.table in memberships and (change.old is None) != (change.new is None):
            found = id_
    return found


class IndexWait:
    """Waits once for each batch, however many changes it has.

    The indexer commits its position after its entries have arrived. After one wait in vain, a batch only reads the
    position until the indexer has caught up. So a dead indexer delays a partition once.
    """

    def __init__(self, backend: Backend, partition: int) -> None:
        self._backend = backend
        self._partition = partition
        self._behind = False

    async def until(self, id_: Id) -> None:
        """Wait until the indexer has followed a change."""
        deadline = time.monotonic() + (0 if self._behind else INDEX_PATIENCE_S)
        while await self._position() < id_:
            if time.monotonic() >= deadline:
                if not self._behind:
                    log.warning("index_behind", partition=self._partition, waited_s=INDEX_PATIENCE_S)
                    BEHIND.inc()
                self._behind = True
                return
            await asyncio.sleep(INDEX_LOOK_S)
        self._behind = False

    async def _position(self) -> Id:
        raw = await self._backend.commands.hget(self._backend.keys.partition(self._partition), PartitionField.INDEXED)
        if raw is None:
            return (0, 0)
        ms, seq = unpack(raw)[0]
        return ms, seq
