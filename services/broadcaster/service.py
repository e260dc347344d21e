"""The broadcaster process: a worker over the change streams of its partitions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Generator
from typing import TypeVar
from weakref import WeakKeyDictionary

import structlog
from msgspec import Struct
from prometheus_client import Counter, Histogram
from redis.exceptions import RedisError

from tidewire.app import App, Membership
from tidewire.model.records import Change, Id, Position, id_text, pack, stream_id, unpack
from tidewire.process.lifecycle import Service
from tidewire.process.partition.gaps import unbroken
from tidewire.process.partition.loop import Decoder, Incomplete, Outcome
from tidewire.process.partition.worker import Worker
from tidewire.process.versions import Versions
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Batch, FeedBounds, Owned, RedisCommand
from tidewire.redis.keys import ConsumerGroup, Home, PartitionField

from .decide import Routing, Steps, deciding, whole
from .groups import Groups
from .indexed import IndexWait, last_of_peers, peer_memberships
from .repair import Repair, applied
from .route import AppendUnits, DestinationCache, LinkCall, StoreBodies

log = structlog.get_logger(__name__)

MAX_DECIDE_S = 0.1
"""Maximum seconds of deciding a batch, without the turns of other work.

Beyond it, the batch ends with its current change.
"""
STEP_S = 0.002
"""Seconds of deciding after which other work of the process gets its turn."""
LARGE_CALL_APPENDS = 100
LARGE_CALLS = 2
"""Maximum calls of more than so many appends that a node of Redis has before it at once, for each broadcaster.

Other requests to the node wait for them. Two keep it busy.
"""
BODY_GRACE_MS = 60_000
"""How long, in ms, large bodies outlive the resume window."""
SWEEP_S = 60.0

CHANGES = Counter("tidewire_broadcaster_changes_total", "Changes passed on.")
FAILED = Counter("tidewire_broadcaster_failed_total", "Evaluations of `readers` that failed.")
GAPS = Counter("tidewire_broadcaster_gaps_total", "Times that changes were lost before they were read.")
LOST = Counter("tidewire_broadcaster_lost_total", "Change entries that were trimmed or unreadable.")
UNKNOWN = Counter("tidewire_broadcaster_unknown_tables_total", "Tables whose changes were passed without knowing them.")
AGE_SECONDS = Histogram(
    "tidewire_broadcaster_age_seconds",
    "Time from a change's write to its append to the feeds.",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
)

Changes = list[tuple[Id, Change | None]]
T = TypeVar("T")


async def in_turns(steps: Generator[None, bool | None, T]) -> T:
    """Do all steps, and return what they return. Between two, other tasks of this process get their turn.

    Steps are told at each resumption whether they have taken `MAX_DECIDE_S`, and should end.
    """
    resumed, spent_s = time.perf_counter(), 0.0
    time_is_up: bool | None = None  # a generator accepts only None at first
    while True:
        try:
            steps.send(time_is_up)
        except StopIteration as end:
            result: T = end.value
            return result
        step_s = time.perf_counter() - resumed
        if step_s > STEP_S:  # a turn of the event loop costs more than most steps
            spent_s += step_s
            await asyncio.sleep(0)
            resumed = time.perf_counter()
        time_is_up = spent_s > MAX_DECIDE_S


class BroadcasterTenure:
    """The work of the broadcaster on one partition that it owns."""

    def __init__(
        self, app: App, backend: Backend, versions: Versions, partition: int, owned: Owned, feeds: DestinationCache
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
        self._decision = Routing()
        self._written: list[int] = []
        self._passed: Id | None = None  # id of the last change that was passed on
        self._next_passed: Id = (0, 0)
        self._unknown: frozenset[str] = frozenset()
        """Tables and topics whose changes were passed without knowing them, as the partition notes."""
        self._next_unknown: frozenset[str] = frozenset()
        self._repair: Repair | None = None
        self._repair_noted = False
        """Whether the partition notes a repair in progress."""

    def destinations(self) -> list[Home]:
        keys = self._backend.keys
        return [keys.home(partition) for partition in range(keys.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if self._passed is None:
            self._passed, self._unknown, self._repair_noted = await self._begin()
        self._next_passed, self._next_unknown, self._written = self._passed, self._unknown, []
        self._decision = Routing()
        changes = self._decoder.entries(batch)
        if self._repair is None:
            self._repair = self._needed_repair(changes)
        if self._repair:
            return await self._step(self._repair, batch, changes)
        if not changes:
            return None
        sound = unbroken(self._passed, changes)
        count = whole(changes[:sound])
        if not count and sound == len(changes) and not batch.at_end:
            raise Incomplete
        return await self._pass_on(changes[: count or sound])

    async def _pass_on(self, changes: Changes) -> Outcome:
        """Decide who receives these changes."""
        unknown = await self._not_known(changes)
        self._known = self._groups.begin()
        versioned = self._versions.all_note_groups()
        while isinstance(decided := await in_turns(self._deciding(changes)), set):
            self._known.fetched |= await self._groups.fetch(decided, versioned=versioned)
        self._decision = decided
        changes = changes[: decided.consumed]
        if (last := last_of_peers(self._peers, changes)) is not None:
            await self._index_wait.until(last)
        self._written = [change.at for _, change in changes if change]
        self._next_passed = changes[-1][0]
        self._next_unknown = self._unknown | unknown
        return Outcome(len(changes), [*decided.operations, *self._notes()], decided.links)

    def _deciding(self, changes: Changes) -> Steps:
        feeds = self._feeds.begin()
        return deciding(self._app, self._backend.keys, self._known, self._partition, changes, feeds)

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

    async def _begin(self) -> tuple[Id, frozenset[str], bool]:
        """Read the notes of the partition: the last change that passed, unknown tables, and whether a repair is in
        progress."""
        fields = (PartitionField.PASSED, PartitionField.UNKNOWN, PartitionField.REPAIR)
        passed, unknown, repair = await self._backend.commands.hmget(self._owned.home.partition, *fields)
        names = frozenset(unpack(unknown)) if unknown else frozenset[str]()
        return stream_id(passed) if passed else (0, 0), names, repair is not None

    def _notes(self) -> list[RedisCommand]:
        """Return the commands that update these notes."""
        partition = self._owned.home.partition
        notes = [RedisCommand("HSET", partition, (PartitionField.PASSED, id_text(self._next_passed)))]
        if self._next_unknown != self._unknown:
            notes.append(RedisCommand("HSET", partition, (PartitionField.UNKNOWN, pack(sorted(self._next_unknown)))))
        return notes

    async def _not_known(self, changes: Changes) -> frozenset[str]:
        """Return tables and topics that these changes concern and this application lacks. Raises Declined."""
        tables = {change.table for _, change in changes if change and change.event != "SEND"}
        unknown = frozenset(tables - self._app.tables.keys())
        memberships = {name for name in tables - unknown if isinstance(self._app.tables[name], Membership)}
        if memberships:
            # Read after the changes: a table that is declared later had no items when these were made.
            unknown |= await self._versions.dependents_of(memberships)
        await self._versions.leave_to_others(ConsumerGroup.BROADCASTER, self._partition, unknown)
        return unknown

    # ── repairs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _needed_repair(self, changes: Changes) -> Repair | None:
        assert self._passed is not None
        memberships = {name for name, table in self._app.tables.items() if isinstance(table, Membership)}
        if changes and not unbroken(self._passed, changes):
            # Changes were trimmed unread, and nothing tells whom they concerned.
            GAPS.inc()
            log.error("changes_lost", partition=self._partition, after=self._passed, before=changes[0][0])
        elif self._repair_noted:
            log.warning("repair_resumed", partition=self._partition)
        elif unknown := self._unknown & self._versions.names:
            # A former owner passed changes of a table that it did not know. This application declares it.
            log.warning("repair_of_unknown", partition=self._partition, tables=sorted(unknown))
            memberships &= unknown
        else:
            return None
        self._groups.forget()
        self._known = self._groups.begin()
        return Repair(self._app, self._backend, self._partition, memberships)

    async def _step(self, repair: Repair, batch: Batch, changes: Changes) -> Outcome:
        """Decide the next commit of a repair."""
        partition, notes = self._owned.home.partition, list[RedisCommand]()
        if not self._repair_noted:
            notes = [RedisCommand("HSET", partition, (PartitionField.REPAIR, "1"))]
            self._repair_noted = True
        if (piece := await repair.piece(batch.last)) is not None:
            return Outcome(0, [*notes, *piece])
        until = repair.until
        assert until is not None
        silent = [one for one in changes if one[0] <= until]
        if silent:
            self._next_passed = silent[-1][0]
        self._next_unknown |= self._untold(silent)
        operations = [*notes, *applied(self._app, self._backend.keys, silent)]
        if silent and len(silent) == len(changes) and silent[-1][0] < until:
            return Outcome(len(silent), [*operations, *self._notes()])
        self._next_passed = max(self._next_passed, until)
        self._next_unknown -= self._versions.names
        self._repair, self._repair_noted = None, False
        # The position is after everything that destinations have taken, and not above the next change.
        reset = FeedReset(Position(self._partition, self._owned.fence.generation, until[0], until[1] + 1))
        links: dict[Home, list[FeedReset]] = {home: [reset] for home in self.destinations()}
        operations += [*self._notes(), RedisCommand("HDEL", partition, (PartitionField.REPAIR,))]
        return Outcome(len(silent), operations, links)

    def _untold(self, changes: Changes) -> frozenset[str]:
        """Return the tables of changes that this application does not declare."""
        return frozenset(change.table for _, change in changes if change and change.event != "SEND") - set(
            self._app.tables
        )


class FeedReset(Struct):
    """A call that resets all feeds of a destination, because changes before `position` were not delivered."""

    position: Position


def _change(fields: dict[bytes, bytes]) -> Change | None:
    """Decode the change of an entry; None if it was trimmed unread, or is malformed."""
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
    """Add the broadcaster to a service process."""
    backend = service.backend
    versions = Versions(app, backend, service.registry)
    service.at_start(versions.publish)
    service.run(versions.run)
    service.tell(versions.describe)

    def tenure(partition: int, owned: Owned) -> BroadcasterTenure:
        return BroadcasterTenure(app, backend, versions, partition, owned, feeds)

    feeds = DestinationCache(backend.keys)
    bounds = FeedBounds(service.settings.resume_entries, service.settings.resume_bytes)
    body_ttl_ms = int(1000 * service.settings.resume_window_s) + BODY_GRACE_MS

    large_calls: WeakKeyDictionary[object, asyncio.Semaphore] = WeakKeyDictionary()

    def turn(to: Home, call: AppendUnits) -> contextlib.AbstractAsyncContextManager[None]:
        """The turn of a call at the node of its destination. Small ones need none."""
        if call.appends <= LARGE_CALL_APPENDS:
            return contextlib.nullcontext()
        return large_calls.setdefault(backend.node_of(to.partition), asyncio.Semaphore(LARGE_CALLS))

    async def link(to: Home, source: str, epoch: int, call: LinkCall | FeedReset) -> None:
        match call:
            case AppendUnits(units):
                async with turn(to, call):
                    await backend.functions.link_append(to, source, epoch, bounds, units)
            case StoreBodies(bodies):
                await backend.functions.body_put(to, body_ttl_ms, bodies)
            case FeedReset(position=position):
                await backend.functions.link_reset(to, source, epoch, position)

    worker = service.work(
        Worker(
            ConsumerGroup.BROADCASTER,
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
        """Remove the states of closed feeds in the owned partitions. It does no harm if several workers do it."""
        while True:
            await asyncio.sleep(min(SWEEP_S, service.settings.resume_window_s))
            for partition in worker.partitions:
                with contextlib.suppress(RedisError, OSError):
                    await backend.functions.feeds_sweep(backend.keys.home(partition))

    service.run(sweep)
    return worker
