"""The broadcaster as a process: a worker whose partitions' streams are the changes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import structlog
from msgspec import Struct
from prometheus_client import Counter, Histogram
from redis.exceptions import RedisError

from tidewire.app import BY_MEMBER, App, ItemKey, Membership, index_field
from tidewire.backend import Backend
from tidewire.functions import Batch, FeedBounds, Operation, Owned
from tidewire.keys import Home, Scalar, value_of
from tidewire.lifecycle import Service
from tidewire.partition.gaps import id_of, unbroken
from tidewire.partition.loop import Incomplete, Outcome
from tidewire.partition.worker import Worker
from tidewire.records import Change, Id, ItemRecord, Position, pack, stream_id, unpack
from tidewire.walk import Place, walk

from .decide import Decision, Group, GroupsOf, Known, Members, deciding, whole
from .route import AppendUnits, Call, Feeds, StoreBodies

log = structlog.get_logger(__name__)

GROUP = "broadcaster"
GROUPS_KEPT = 10_000
"""Groups whose members a partition's owner keeps in memory; beyond, it forgets all, and fetches what it needs."""

MAX_DECIDE_S = 0.1
"""A batch whose decision takes longer ends with the change it is at."""
BODY_GRACE_MS = 60_000
"""Large bodies outlive the resume window by this time."""
MEMBERS_AT_A_TIME = 1000
INDEX_LOOK_S, INDEX_PATIENCE_S = 0.01, 2.0
SWEEP_S = 60.0

CHANGES = Counter("tidewire_broadcaster_changes_total", "Changes passed on.")
FAILED = Counter("tidewire_broadcaster_failed_total", "Changes whose audience could not be computed: nobody was told.")
GAPS = Counter("tidewire_broadcaster_gaps_total", "Times that changes were lost before they were read.")
LOST = Counter("tidewire_broadcaster_lost_total", "Change entries that were trimmed or unreadable.")
AGE_SECONDS = Histogram(
    "tidewire_broadcaster_age_seconds",
    "From a change's write to its feeds.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
)


class BroadcasterTenure:
    """The broadcaster's work on one partition while it owns it."""

    def __init__(self, app: App, backend: Backend, partition: int, owned: Owned, feeds: Feeds) -> None:
        self._app = app
        self._feeds = feeds
        self._backend = backend
        self._partition = partition
        self._owned = owned
        self._groups: dict[Group, Members] = {}  # of this partition, changed by nobody else
        self._decision = Decision()
        self._written: list[int] = []
        self._passed: tuple[int, int] | None = None  # id of the last change that was passed on
        self._next_passed = (0, 0)

    def destinations(self) -> list[Home]:
        keys = self._backend.keys
        return [keys.home(partition) for partition in range(keys.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if not batch.entries:
            return None
        if self._passed is None:
            self._passed = await self._last_passed()
        changes = [(id_, _change(fields)) for id_, fields in batch.entries]
        sound = unbroken(self._passed, changes)
        if not sound:
            return await self._over_the_gap(*changes[0])
        count = whole(changes[:sound])
        if not count and sound == len(changes) and not batch.at_end:
            raise Incomplete
        changes = changes[: count or sound]
        known: dict[Group | GroupsOf, Any] = {}
        known |= self._groups.items()
        while isinstance(decided := await self._decided(known, changes), set):
            for need in decided:
                known[need] = await (self._members(need) if isinstance(need, Group) else self._groups_of(need))
        changes = changes[: decided.consumed]
        self._decision = decided
        if len(known) > GROUPS_KEPT:
            known = {}
        self._groups = {
            group: members for group, members in known.items() if isinstance(group, Group) and self._is_here(group)
        }
        for one in decided.indexed:
            await self._until_indexed(*one)
        self._written = [change.at for _, change in changes if change]
        self._next_passed = changes[-1][0]
        return Outcome(len(changes), [*decided.operations, self._passes(self._next_passed)], decided.links)

    async def _decided(
        self, known: Known, changes: Sequence[tuple[Id, Change | None]]
    ) -> Decision | set[Group | GroupsOf]:
        """Decide in steps, between which other partitions of this process get their turn."""
        self._feeds.forget_some()
        steps = deciding(self._app, self._backend.keys, known, self._partition, changes, self._feeds)
        until = time.monotonic() + MAX_DECIDE_S
        step: bool | None = None
        while True:
            try:
                steps.send(step)
            except StopIteration as end:
                found: Decision | set[Group | GroupsOf] = end.value
                return found
            await asyncio.sleep(0)
            step = time.monotonic() > until

    async def committed(self, *, confirmed: bool) -> None:
        self._passed = self._next_passed
        self._groups |= self._decision.groups
        FAILED.inc(self._decision.failed)
        CHANGES.inc(len(self._written))
        now = time.time() * 1000
        for at in self._written:
            AGE_SECONDS.observe(max(now - at, 0) / 1000)

    # ── gaps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _last_passed(self) -> tuple[int, int]:
        found = await self._backend.commands.hget(self._owned.home.partition, "passed")
        return stream_id(found) if found else (0, 0)

    def _passes(self, id_: tuple[int, int]) -> Operation:
        return Operation("HSET", self._owned.home.partition, ("passed", f"{id_[0]}-{id_[1]}"))

    async def _over_the_gap(self, id_: tuple[int, int], change: Change | None) -> Outcome:
        """Changes were trimmed before they were read: whom they concerned is not known any more.

        The members are taken from the items as they are, which may be ahead of what comes next. All feeds begin anew,
        after that: whoever queries then finds a state in which all of it has been done.
        """
        GAPS.inc()
        log.error("changes_lost", partition=self._partition, after=self._passed, before=id_)
        # An entry that is trimmed itself is passed; else what comes before the first one that is there.
        lost = change is None
        self._next_passed = id_ if change is None or change.previous is None else id_of(change.previous)
        self._decision, self._written, self._groups = Decision(), [], {}
        operations = await self._members_as_they_are()
        generation = self._owned.fence.generation if change is None else change.generation
        reset = Reset(Position(self._partition, generation, *id_))
        links: dict[Home, list[Reset]] = {home: [reset] for home in self.destinations()}
        return Outcome(int(lost), [*operations, self._passes(self._next_passed)], links)

    async def _members_as_they_are(self) -> list[Operation]:
        operations: list[Operation] = []
        keys = self._backend.keys
        for table in self._app.tables.values():
            if not isinstance(table, Membership):
                continue
            names: Any = await self._backend.commands.zrange(keys.values(self._partition, table.name), 0, -1)
            for name in names:
                operations.append(Operation("DEL", keys.members(table.name, value_of(name)), ()))
            place: Place | None = None
            while found := await walk(self._backend, self._partition, table.name, place, MEMBERS_AT_A_TIME):
                place = found[-1][0]
                for _, key, record in found:
                    member = (pack(key.sort), pack(record.item))
                    operations.append(Operation("HSET", keys.members(table.name, key.partition), member))
        return operations

    def _is_here(self, group: Group) -> bool:
        return self._backend.keys.partition_of(group.group) == self._partition

    async def _members(self, group: Group) -> Members:
        """Of a group of this partition, as its changes have passed here; of another, as its items are.

        Who is told of a membership there may query at once, and then must hear of every change: those who look after it
        later must find it, and not what its broadcaster has yet to commit.
        """
        keys = self._backend.keys
        if self._is_here(group):
            raw = await self._backend.commands.hgetall(keys.members(group.membership, group.group))
            return {unpack(user): unpack(item) for user, item in raw.items()}
        raw = await self._backend.commands.hgetall(keys.items(group.membership, group.group))
        items = [ItemRecord(*unpack(record)).item for record in raw.values()]
        table = self._app[group.membership]
        return {item[table.key[1]]: item for item in items if item is not None}

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


class Reset(Struct):
    """All feeds of a destination begin anew: what they missed before this change is not known."""

    position: Position


def _change(fields: dict[bytes, bytes]) -> Change | None:
    """The change of an entry; None for one that was trimmed before it was read, or that nobody here wrote."""
    if b"r" not in fields:
        LOST.inc()
        return None
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
        return BroadcasterTenure(app, backend, partition, owned, feeds)

    feeds = Feeds(backend.keys)
    bounds = FeedBounds(service.settings.resume_entries, service.settings.resume_bytes)
    body_ttl_ms = int(1000 * service.settings.resume_window_s) + BODY_GRACE_MS

    async def link(to: Home, source: str, epoch: int, call: Call | Reset) -> None:
        match call:
            case AppendUnits(units):
                await backend.functions.link_append(to, source, epoch, bounds, units)
            case StoreBodies(bodies):
                await backend.functions.body_put(to, body_ttl_ms, bodies)
            case Reset(position=position):
                await backend.functions.link_reset(to, source, epoch, position)

    worker = service.work(
        Worker(
            GROUP, backend, service.registry, service.settings, stream=backend.keys.changes, tenure=tenure, link=link
        )
    )

    async def sweep() -> None:
        """Forget feeds that have closed, where this worker is at home. Who does it, and how often, is all the same."""
        while True:
            await asyncio.sleep(min(SWEEP_S, service.settings.resume_window_s))
            for partition in worker.partitions:
                with contextlib.suppress(RedisError, OSError):
                    await backend.functions.feeds_sweep(backend.keys.home(partition))

    service.run(sweep)
    return worker
