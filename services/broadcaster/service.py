"""The broadcaster as a process: a worker whose partitions' streams are the changes."""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog
from msgspec import Struct
from prometheus_client import Counter, Histogram
from redis.exceptions import RedisError

from tidewire.app import App, Membership
from tidewire.backend import Backend
from tidewire.functions import Batch, FeedBounds, Operation, Owned
from tidewire.keys import Home
from tidewire.lifecycle import Service
from tidewire.partition.gaps import id_of, unbroken
from tidewire.partition.loop import Decoder, Incomplete, Outcome
from tidewire.partition.worker import Worker
from tidewire.records import Change, Id, Position, pack, stream_id, unpack
from tidewire.versions import Versions

from .decide import Decision, Group, GroupsOf, deciding, whole
from .groups import Groups
from .indexed import IndexWait, last_of_peers, peer_memberships
from .repair import Repair, members_as_they_are
from .route import AppendUnits, Call, Feeds, StoreBodies

log = structlog.get_logger(__name__)

GROUP = "broadcaster"
MAX_DECIDE_S = 0.1
"""A batch whose decision takes longer ends with the change it is at. Turns of other work do not count."""
STEP_S = 0.002
"""Seconds of a decision after which other work of the process gets its turn."""
BODY_GRACE_MS = 60_000
"""Large bodies outlive the resume window by this time."""
SWEEP_S = 60.0

CHANGES = Counter("tidewire_broadcaster_changes_total", "Changes passed on.")
FAILED = Counter("tidewire_broadcaster_failed_total", "Changes whose audience could not be computed: nobody was told.")
GAPS = Counter("tidewire_broadcaster_gaps_total", "Times that changes were lost before they were read.")
LOST = Counter("tidewire_broadcaster_lost_total", "Change entries that were trimmed or unreadable.")
UNKNOWN = Counter("tidewire_broadcaster_unknown_tables_total", "Tables whose changes were passed without knowing them.")
AGE_SECONDS = Histogram(
    "tidewire_broadcaster_age_seconds",
    "From a change's write to its feeds.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
)

Changes = list[tuple[Id, Change | None]]


class BroadcasterTenure:
    """The broadcaster's work on one partition while it owns it."""

    def __init__(
        self, app: App, backend: Backend, versions: Versions, partition: int, owned: Owned, feeds: Feeds
    ) -> None:
        self._app = app
        self._feeds = feeds
        self._backend = backend
        self._versions = versions
        self._partition = partition
        self._owned = owned
        self._groups = Groups(app, backend, partition)
        self._known = self._groups.begin()
        self._peers = peer_memberships(app)
        self._index_wait = IndexWait(backend, partition)
        self._decoder = Decoder(_change)
        self._decision = Decision()
        self._written: list[int] = []
        self._passed: Id | None = None  # id of the last change that was passed on
        self._next_passed: Id = (0, 0)
        self._unknown: frozenset[str] = frozenset()
        """Tables and topics whose changes a broadcaster passed without knowing them, as the partition notes them."""
        self._next_unknown: frozenset[str] = frozenset()
        self._repair: Repair | None = None

    def destinations(self) -> list[Home]:
        keys = self._backend.keys
        return [keys.home(partition) for partition in range(keys.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if self._passed is None:
            self._passed, self._unknown = await self._begin()
        self._next_passed, self._next_unknown, self._written = self._passed, self._unknown, []
        self._decision = Decision()
        if self._repair is None and self._unknown & self._versions.names:
            self._repair = self._over_unknown(batch)
        if self._repair:
            return await self._step(self._repair)
        if not batch.entries:
            return None
        changes = self._decoder.entries(batch)
        sound = unbroken(self._passed, changes)
        if not sound:
            self._repair = self._over_gap(*changes[0])
            return await self._step(self._repair)
        count = whole(changes[:sound])
        if not count and sound == len(changes) and not batch.at_end:
            raise Incomplete
        return await self._pass_on(changes[: count or sound])

    async def _pass_on(self, changes: Changes) -> Outcome:
        """Who hears of these changes, and what."""
        unknown = await self._not_known(changes)
        self._known = self._groups.begin()
        versioned = self._versions.all_note_groups()
        while isinstance(decided := await self._decided(changes), set):
            self._known.fetched |= await self._groups.fetch(decided, versioned=versioned)
        self._decision = decided
        changes = changes[: decided.consumed]
        if (last := last_of_peers(self._peers, changes)) is not None:
            await self._index_wait.until(last)
        self._written = [change.at for _, change in changes if change]
        self._next_passed = changes[-1][0]
        self._next_unknown = self._unknown | unknown
        return Outcome(len(changes), [*decided.operations, *self._notes()], decided.links)

    async def _decided(self, changes: Changes) -> Decision | set[Group | GroupsOf]:
        """Decide in steps, between which other partitions of this process get their turn."""
        self._feeds.forget_some()
        steps = deciding(self._app, self._backend.keys, self._known, self._partition, changes, self._feeds)
        resumed, spent_s = time.perf_counter(), 0.0
        time_is_up: bool | None = None  # a generator takes nothing else at first
        while True:
            try:
                steps.send(time_is_up)
            except StopIteration as end:
                found: Decision | set[Group | GroupsOf] = end.value
                return found
            step_s = time.perf_counter() - resumed
            if step_s > STEP_S:  # a turn of the event loop costs more than most steps
                spent_s += step_s
                await asyncio.sleep(0)
                resumed = time.perf_counter()
            time_is_up = spent_s > MAX_DECIDE_S

    async def committed(self, *, confirmed: bool) -> None:
        for name in self._next_unknown - self._unknown:
            UNKNOWN.inc()
            log.error("passed_without_knowing", table=name, partition=self._partition)
        self._passed, self._unknown = self._next_passed, self._next_unknown
        self._groups.keep(self._known, self._decision.groups)
        FAILED.inc(self._decision.failed)
        CHANGES.inc(len(self._written))
        now = time.time() * 1000
        for at in self._written:
            AGE_SECONDS.observe(max(now - at, 0) / 1000)

    async def _begin(self) -> tuple[Id, frozenset[str]]:
        """What the partition notes of how far its broadcasters have come."""
        passed, unknown = await self._backend.commands.hmget(self._owned.home.partition, "passed", "unknown")
        return stream_id(passed) if passed else (0, 0), frozenset(unpack(unknown)) if unknown else frozenset()

    def _notes(self) -> list[Operation]:
        """The same, as it will be."""
        partition, (ms, seq) = self._owned.home.partition, self._next_passed
        notes = [Operation("HSET", partition, ("passed", f"{ms}-{seq}"))]
        if self._next_unknown != self._unknown:
            notes.append(Operation("HSET", partition, ("unknown", pack(sorted(self._next_unknown)))))
        return notes

    async def _not_known(self, changes: Changes) -> frozenset[str]:
        """Tables and topics that these changes concern and this application lacks. Raises Declined."""
        tables = {change.table for _, change in changes if change and change.event != "SEND"}
        unknown = frozenset(tables - self._app.tables.keys())
        memberships = {name for name in tables - unknown if isinstance(self._app.tables[name], Membership)}
        if memberships:
            # Read after the changes: a table that is declared later had no items when they were made.
            unknown |= await self._versions.dependents_of(memberships)
        await self._versions.leave_to_others(GROUP, self._partition, unknown)
        return unknown

    # ── repairs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _over_gap(self, id_: Id, change: Change | None) -> Repair:
        """Changes were trimmed before they were read: whom they concerned is not known any more."""
        GAPS.inc()
        log.error("changes_lost", partition=self._partition, after=self._passed, before=id_)
        # A trimmed entry that is still pending is passed itself; otherwise what comes before the first change.
        lost = change is None
        passed = id_ if change is None or change.previous is None else id_of(change.previous)
        generation = self._owned.fence.generation if change is None else change.generation
        return self._repair_at(Position(self._partition, generation, *id_), int(lost), passed)

    def _over_unknown(self, batch: Batch) -> Repair:
        """A predecessor passed changes of a table that it did not know and this application declares."""
        log.warning("repair_of_unknown", partition=self._partition, tables=sorted(self._unknown & self._versions.names))
        assert self._passed is not None
        generation = self._owned.fence.generation
        if not batch.entries:
            # Nothing can be below the id that follows the last one, and the next change is not below it.
            ms, seq = batch.last
            return self._repair_at(Position(self._partition, generation, ms, seq + 1), 0, self._passed)
        id_, fields = batch.entries[0]
        change = _change(fields)
        position = Position(self._partition, change.generation if change else generation, *id_)
        return self._repair_at(position, 0, self._passed)

    def _repair_at(self, position: Position, consumed: int, passed: Id) -> Repair:
        self._groups.forget()
        self._known = self._groups.begin()
        pieces = members_as_they_are(self._app, self._backend, self._partition)
        return Repair(position, consumed, passed, pieces)

    async def _step(self, repair: Repair) -> Outcome:
        """The next piece of a repair. Feeds begin anew after the last one: whoever queries then finds the new state."""
        piece = await anext(repair.pieces, None)
        if piece is not None:
            return Outcome(0, piece)
        self._repair = None
        self._next_passed = repair.passed
        self._next_unknown = self._unknown - self._versions.names
        links: dict[Home, list[Reset]] = {home: [Reset(repair.position)] for home in self.destinations()}
        return Outcome(repair.consumed, self._notes(), links)


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
    versions = Versions(app, backend, service.registry)
    service.at_start(versions.publish)
    service.run(versions.run)
    service.tell(versions.describe)

    def tenure(partition: int, owned: Owned) -> BroadcasterTenure:
        return BroadcasterTenure(app, backend, versions, partition, owned, feeds)

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
            GROUP,
            backend,
            service.registry,
            service.settings,
            stream=backend.keys.changes,
            tenure=tenure,
            link=link,
            versions=versions,
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
