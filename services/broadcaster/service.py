"""The broadcaster as a process: a worker whose partitions' streams are the changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import structlog
from prometheus_client import Counter, Histogram

from tidewire.app import BY_MEMBER, App, ItemKey, Membership, index_field
from tidewire.backend import Backend
from tidewire.functions import Append, Batch, Owned
from tidewire.keys import Scalar
from tidewire.lifecycle import Service
from tidewire.partition.loop import Outcome
from tidewire.partition.worker import Worker
from tidewire.records import Change, ItemRecord, unpack

from .decide import Decision, Group, GroupsOf, Members, decide, whole

log = structlog.get_logger(__name__)

GROUP = "broadcaster"
GROUPS_KEPT = 10_000
"""Groups whose members a partition's owner keeps in memory; beyond, it forgets all, and fetches what it needs."""

INDEX_LOOK_S, INDEX_PATIENCE_S = 0.01, 2.0

CHANGES = Counter("tidewire_broadcaster_changes_total", "Changes passed on.")
FAILED = Counter("tidewire_broadcaster_failed_total", "Changes whose audience could not be computed: nobody was told.")
LOST = Counter("tidewire_broadcaster_lost_total", "Change entries that were trimmed or unreadable.")
AGE_SECONDS = Histogram(
    "tidewire_broadcaster_age_seconds",
    "From a change's write to its feeds.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
)


class BroadcasterTenure:
    """The broadcaster's work on one partition while it owns it."""

    def __init__(self, app: App, backend: Backend, partition: int, owned: Owned) -> None:
        self._app = app
        self._backend = backend
        self._partition = partition
        self._owned = owned
        self._groups: dict[Group, Members] = {}  # of this partition, changed by nobody else
        self._decision = Decision()
        self._written: list[int] = []

    def destinations(self) -> list[bytes]:
        keys = self._backend.keys
        return [keys.links(partition) for partition in range(keys.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if not batch.entries:
            return None
        changes = [(id_, _change(fields)) for id_, fields in batch.entries]
        changes = changes[: whole(changes)]
        known: dict[Group | GroupsOf, Any] = {}
        known |= self._groups.items()
        generation = self._owned.fence.generation
        while isinstance(
            decided := decide(self._app, self._backend.keys, known, self._partition, generation, changes), set
        ):
            for need in decided:
                known[need] = await (self._members(need) if isinstance(need, Group) else self._groups_of(need))
        self._decision = decided
        if len(known) > GROUPS_KEPT:
            known = {}
        self._groups = {
            group: members for group, members in known.items() if isinstance(group, Group) and self._is_here(group)
        }
        for one in decided.indexed:
            await self._until_indexed(*one)
        self._written = [change.at for _, change in changes if change]
        return Outcome(len(changes), decided.operations, decided.links)

    async def committed(self, *, confirmed: bool) -> None:
        self._groups |= self._decision.groups
        FAILED.inc(self._decision.failed)
        CHANGES.inc(len(self._written))
        now = time.time() * 1000
        for at in self._written:
            AGE_SECONDS.observe(max(now - at, 0) / 1000)

    def _is_here(self, group: Group) -> bool:
        return self._backend.keys.partition_of(group.group) == self._partition

    async def _members(self, group: Group) -> Members:
        raw = await self._backend.commands.hgetall(self._backend.keys.members(group.membership, group.group))
        return {unpack(user): unpack(item) for user, item in raw.items()}

    async def _groups_of(self, need: GroupsOf) -> list[Scalar]:
        table = self._app[need.membership]
        items, _ = self._backend.keys.index(table.name, table.index(BY_MEMBER), need.user)
        records = [ItemRecord(*unpack(raw)) for raw in await self._backend.commands.hvals(items)]
        return [table.key_of(record.item).partition for record in records if record.item is not None]

    async def _until_indexed(self, table: Membership, key: ItemKey, present: bool) -> None:
        """Wait until the index of a user's groups has followed a membership's change: who is told then queries."""
        attributes = table.index(BY_MEMBER)
        items, _ = self._backend.keys.index(table.name, attributes, str(key.sort))
        field = index_field(key, table.key_object(key), attributes)
        for _ in range(int(INDEX_PATIENCE_S / INDEX_LOOK_S)):
            if bool(await self._backend.commands.hexists(items, field)) == present:
                return
            await asyncio.sleep(INDEX_LOOK_S)
        log.warning("index_behind", table=table.name, partition=self._partition)


def _change(fields: dict[bytes, bytes]) -> Change | None:
    """The change of an entry; None for one that was trimmed before it was read, or that nobody here wrote."""
    try:
        return Change(*unpack(fields[b"r"]))
    except Exception:
        LOST.inc()
        log.exception("change_lost")
        return None


def build(service: Service, app: App) -> Worker:
    """Wire the broadcaster into a service process."""
    backend = service.backend

    def tenure(partition: int, owned: Owned) -> BroadcasterTenure:
        return BroadcasterTenure(app, backend, partition, owned)

    async def link(links: bytes, source: str, epoch: int, appends: Sequence[Append]) -> None:
        await backend.functions.link_append(links, source, epoch, service.settings.resume_entries, appends)

    return service.work(
        Worker(
            GROUP, backend, service.registry, service.settings, stream=backend.keys.changes, tenure=tenure, link=link
        )
    )
