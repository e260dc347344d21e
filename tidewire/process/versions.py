"""Several versions of an application on one stage: which live processes know which tables and topics.

During a roll-out, a worker may read a change of a table that only the other version declares. If it acknowledged the
change, no reader would receive it. So it declines the partition, and a worker that knows the table takes it. Each
process publishes the digest of its application and the partitions that it declines. The stage keeps the names behind
each digest.

A name is that of a table, or `topic:` with the pattern of a family of topics.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Collection, Iterable
from typing import Any

import structlog
from prometheus_client import Counter
from redis.exceptions import RedisError

from tidewire.app import App
from tidewire.audiences import Audience, AudienceOf, Followers, Members, Peers, Topic, nobody
from tidewire.errors import Declined
from tidewire.model.records import pack, text, unpack
from tidewire.process.registry import Registration, Registry
from tidewire.redis.backend import Backend
from tidewire.redis.keys import ServiceKind

log = structlog.get_logger(__name__)

DECLINED = Counter("tidewire_partitions_declined_total", "Partitions left to a worker that knows more.", ["group"])

TOPIC = "topic:"
"""Prefix of the name of a family of topics. No table's name contains a colon."""
ANY = "*"
"""Stands for any membership: `readers` is a function, which may return an audience of any membership."""

CHECK_S = 10.0
"""Seconds between two checks which applications are still in use."""

Names = frozenset[str]


def dependents(app: App) -> dict[str, list[str]]:
    """Return each table and family of topics, with the memberships that its audience depends on."""
    found = {name: _memberships(table.readers) for name, table in app.tables.items()}
    return found | {TOPIC + topic.pattern: _memberships(topic.followers) for topic in app.topics.values()}


def _memberships(audience: AudienceOf) -> list[str]:
    if not isinstance(audience, Audience):
        return [ANY]
    found: set[str] = set()
    for part in audience.parts():
        if isinstance(part, Members | Peers):
            found.add(part.membership)
        elif isinstance(part, Followers):
            found.update(_memberships(part.topic.followers))
    return sorted(found)


def digest_of(names: Iterable[str]) -> str:
    return hashlib.sha256(pack(sorted(names))).hexdigest()[:16]


class Versions:
    """What this process and the others declare, and which partitions each of them declines."""

    def __init__(self, app: App, backend: Backend, registry: Registry) -> None:
        self._backend = backend
        self._registry = registry
        self._dependents = dependents(app)
        self.names: Names = frozenset(self._dependents)
        self.digest = digest_of(self.names)
        self._known: dict[str, Names] = {self.digest: self.names}
        self._declined: dict[str, dict[int, Names]] = {}

    def describe(self) -> dict[str, Any]:
        """Return what the registration publishes: the digest, and the declined partitions."""
        declines = {
            group: {partition: sorted(names) for partition, names in partitions.items()}
            for group, partitions in self._declined.items()
            if partitions
        }
        return {"application": self.digest} | ({"declines": declines} if declines else {})

    async def publish(self) -> None:
        """Write to the stage what this application declares, before the first item or change is read.

        Nothing is written if the stage knows it: a server that is full refuses it, and a service must start there.
        """
        commands, dependents = self._backend.commands, self._backend.keys.dependents()
        stored = await commands.hgetall(dependents)
        packed: dict[Any, Any] = {name: pack(on) for name, on in self._dependents.items()}
        if new := {name: raw for name, raw in packed.items() if stored.get(name.encode()) != raw}:
            await commands.hset(dependents, mapping=new)
        await self._look()

    async def run(self) -> None:
        """Remove digests that no live process has named for a while, until cancelled."""
        suspects: set[str] = set()
        while True:
            await asyncio.sleep(CHECK_S)
            with contextlib.suppress(RedisError, OSError):
                await self._look()
                live = {service.info.get("application") for service in self._registry.services.values()}
                unnamed = self._known.keys() - live - {self.digest}
                for digest in unnamed & suspects:
                    await self._backend.commands.hdel(self._backend.keys.applications(), digest)
                    del self._known[digest]
                # A process that has just started may not be registered yet, so a digest must be unused twice.
                suspects = unnamed - suspects

    async def dependents_of(self, memberships: Collection[str]) -> Names:
        """Return the stage's tables and topics, unknown to this application, that depend on one of these
        memberships."""
        found: set[str] = set()
        for raw, on in (await self._backend.commands.hgetall(self._backend.keys.dependents())).items():
            name = text(raw)
            if name not in self.names and not {*memberships, ANY}.isdisjoint(unpack(on)):
                found.add(name)
        return frozenset(found)

    async def leave_to_others(self, group: str, partition: int, unknown: Names) -> None:
        """Raise Declined if a live process of this kind knows all of these names, and does not decline the partition
        too."""
        if unknown and any(service.info.get("application") not in self._known for service in self._others()):
            await self._look()
        if unknown and self._somebody_knows(group, partition, unknown):
            raise Declined(unknown)

    def unknown_topic(self, topic: str) -> Names:
        """Return the families, known to other live processes, that contain a topic."""
        theirs = {name for service in self._others() for name in self._of(service)} - self.names
        patterns = (name.removeprefix(TOPIC) for name in theirs if name.startswith(TOPIC))
        return frozenset(TOPIC + pattern for pattern in patterns if Topic(pattern, nobody).parse(topic) is not None)

    # ── which partitions are declined ───────────────────────────────────────────────────────────────────────────────

    def decline(self, group: str, partition: int, names: Names) -> None:
        DECLINED.labels(group).inc()
        log.warning("partition_declined", group=group, partition=partition, unknown=sorted(names))
        self._declined.setdefault(group, {})[partition] = names

    def declined(self, group: str) -> set[int]:
        """Return partitions that this process must not take: it, or one with the same application, has declined them.

        This ends when no live process knows the names. The process then marks the table and continues.
        """
        mine = self._declined.setdefault(group, {})
        for partition, names in list(mine.items()):
            if not self._somebody_knows(group, partition, names):
                del mine[partition]
        theirs = self._declined_by_others(group)
        return mine.keys() | {partition for partition, names in theirs.items() if not names <= self.names}

    def offered(self, group: str) -> set[int]:
        """Return partitions that others decline and that this process can take, beyond its fair share."""
        theirs = self._declined_by_others(group)
        offered = {partition for partition, names in theirs.items() if names <= self.names}
        return offered - self._declined.get(group, {}).keys()

    def all_note_groups(self) -> bool:
        """Whether the release of every live store notes the version of a group with each membership's change."""
        stores = [self._registry.services[id_] for id_ in self._registry.live(ServiceKind.STORE)]
        return bool(stores) and all("application" in store.info for store in stores)

    def _declined_by_others(self, group: str) -> dict[int, Names]:
        found: dict[int, Names] = {}
        for service in self._others():
            for partition, names in _declines(service, group).items():
                found[partition] = found.get(partition, frozenset()) | names
        return found

    def _somebody_knows(self, group: str, partition: int, names: Names) -> bool:
        """Whether a live process of this kind knows the names, and will take the partition.

        Of two processes that decline a partition to each other, the one with the lower id takes it.
        """
        return any(
            names <= self._of(service)
            and (partition not in _declines(service, group) or service.id < self._registry.id)
            for service in self._others()
        )

    def _others(self) -> list[Registration]:
        registry = self._registry
        return [registry.services[id_] for id_ in registry.live(registry.kind) if id_ != registry.id]

    def _of(self, service: Registration) -> Names:
        return self._known.get(str(service.info.get("application")), frozenset())

    async def _look(self) -> None:
        """Read the names behind each digest. Write the own one again, because another process may have removed it."""
        commands, applications = self._backend.commands, self._backend.keys.applications()
        found = await commands.hgetall(applications)
        if self.digest.encode() not in found:
            await commands.hset(applications, self.digest, pack(sorted(self.names)))
        self._known |= {text(digest): frozenset(unpack(raw)) for digest, raw in found.items()}


def _declines(service: Registration, group: str) -> dict[int, Names]:
    declined = service.info.get("declines", {}).get(group, {})
    return {int(partition): frozenset(names) for partition, names in declined.items()}
