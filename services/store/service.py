"""The store process: a worker over the command streams of its partitions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import structlog
from prometheus_client import Counter, Histogram
from redis.exceptions import ResponseError

from tidewire.app import App
from tidewire.errors import ConfigurationError, Timeout
from tidewire.model.records import Command, Declaration, Reply, id_text, pack, stream_id, unpack
from tidewire.process.bus import Answers
from tidewire.process.lifecycle import Service
from tidewire.process.partition.loop import Decoder, Outcome
from tidewire.process.partition.worker import Worker
from tidewire.process.settings import Settings
from tidewire.process.versions import Versions
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Batch, Owned, RedisCommand, Wait
from tidewire.redis.keys import ConsumerGroup, Home, PartitionField

from .batches import Deciding
from .budget import Limits
from .decide import Decision
from .expiries import Expiries
from .indexer import IndexerTenure, is_needed
from .memory import Memory
from .reads import Read, Reads
from .spread import Spread
from .view import Situation

log = structlog.get_logger(__name__)

GATEWAYS_KEPT = 1000
"""Maximum gateways whose last command number a partition's owner caches. At this number the cache is dropped."""
EXPIRE_EVERY_S = 1.0
TRIM_EVERY_S = 10.0
"""Seconds between two trims of a change stream; at most a tenth of the retention time."""
EARLY_PART = 4
"""Changes are also trimmed after appends of this fraction of their bound in bytes."""

COMMANDS = Counter("tidewire_store_commands_total", "Commands decided.")
CHANGES = Counter("tidewire_store_changes_total", "Changes appended.")
ERRORS = Counter("tidewire_store_errors_total", "Commands answered with an error.", ["code"])
LOST = Counter("tidewire_store_changes_lost_total", "Changes trimmed before a group had read them.", ["group"])
UNCONFIRMED = Counter("tidewire_store_unconfirmed_total", "Writes that were not confirmed as durable in time.")
UNREADABLE = Counter("tidewire_store_unreadable_total", "Command entries that could not be read, and were skipped.")
DECIDE_SECONDS = Histogram("tidewire_store_decide_seconds", "From a batch to its decision, fetches included.")


class StoreTenure:
    """The work of the store on one partition that it owns. Only the owner writes there, so its facts stay true."""

    def __init__(
        self,
        app: App,
        backend: Backend,
        settings: Settings,
        answers: Answers,
        partition: int,
        owned: Owned,
        *,
        memory: Memory | None = None,
        reads: Reads | None = None,
        spread: Spread | None = None,
        versions: Versions | None = None,
    ) -> None:
        self._app = app
        self._versions = versions
        self._backend = backend
        self._answers = answers
        self._settings = settings
        self._partition = partition
        self._owned = owned
        self._last: tuple[int, int] | None = None  # id of the partition's last change
        self._floor = 0
        self._kinds: dict[str, str] = {}
        self._last_numbers: dict[str, int] = {}
        self._decoder = Decoder(_command)
        self._decision = Decision()
        self._memory = memory or Memory(backend)
        self._reads = reads or Reads(app, backend, settings, answers)
        self._spread = spread or Spread(app, backend)
        self._limits = Limits.of(settings)
        self._situation: Situation | None = None
        self._begun_s = 0.0
        self._appended_bytes = 0  # bytes of changes appended since the last trim, about
        self._wait = wait_for(settings)
        self._expires = any(table.expires for table in app.tables.values())
        self._expiries = Expiries(app, backend, partition)
        self._expire_at = self._trim_at = 0.0  # monotonic seconds
        self._expire_every_s = EXPIRE_EVERY_S
        self._trim_every_s = min(TRIM_EVERY_S, max(settings.changes_retention_s / 10, 0.2))

    def destinations(self) -> tuple[Home, ...]:
        return ()

    async def decide(self, batch: Batch) -> Outcome | None:
        begun = time.perf_counter()
        expire = self._expires and begun >= self._expire_at
        trim = begun >= self._trim_at or self._appended_bytes > self._settings.changes_bytes / EARLY_PART > 0
        noted = await self._expiries.step()
        if not (batch.entries or expire or trim or noted):
            return None
        if self._last is None:
            self._last = await self._last_change()
            self._floor = int(await self._backend.commands.hget(self._owned.home.partition, PartitionField.FLOOR) or 0)
        situation = Situation(
            self._partition,
            self._owned.fence.generation,
            batch.now,
            self._last,
            self._settings.limit_item_bytes,
            floor=self._floor,
            kinds=self._kinds,
            last_numbers=self._last_numbers,
            expire=expire,
            keep_since=(batch.now - int(1000 * self._settings.changes_retention_s), 0) if trim else None,
            keep_changes=self._settings.changes_max,
            keep_bytes=self._settings.changes_bytes,
        )
        commands = [command for _, command in self._decoder.entries(batch)]
        if self._versions:
            unknown = unknown_names(self._app, self._versions, commands)
            await self._versions.leave_to_others(ConsumerGroup.STORE, self._partition, unknown)
        deciding = Deciding(self._app, self._backend, self._memory, commands, situation, self._limits)
        self._situation, self._begun_s = situation, time.monotonic()
        self._decision = decided = await deciding.decision()
        self._kinds |= deciding.kinds
        if expire and not decided.more_to_expire:
            self._expire_at = begun + self._expire_every_s
        if trim:
            self._trim_at = begun + (0 if decided.more_to_forget or decided.more_to_trim else self._trim_every_s)
            self._appended_bytes = 0
        self._appended_bytes += decided.size_bytes
        operations = [*noted, *decided.operations]
        if decided.consumed:
            ms, seq = batch.entries[decided.consumed - 1][0]
            # Acknowledged commands are useless. They are trimmed behind their only reader.
            operations.append(RedisCommand("XTRIM", self._owned.stream, ("MINID", "=", id_text((ms, seq + 1)))))
        DECIDE_SECONDS.observe(time.perf_counter() - begun)
        if not operations:
            return None
        return Outcome(decided.consumed, operations, wait=self._wait if decided.writes else None)

    async def committed(self, *, confirmed: bool) -> None:
        decision = self._decision
        self._last, self._floor = decision.last, decision.floor
        if len(self._last_numbers) > GATEWAYS_KEPT:
            self._last_numbers = {}
        self._last_numbers |= decision.last_numbers
        for group, count in decision.lost.items():
            LOST.labels(group).inc(count)
            log.error("changes_trimmed_unread", partition=self._partition, group=group, count=count)
        COMMANDS.inc(decision.consumed)
        CHANGES.inc(decision.changes)
        for code in decision.errors:
            ERRORS.labels(code).inc()
        replies = decision.replies if confirmed else unconfirmed(decision)
        self._answers.send(self._spread.charged(replies, decision.changes_of))
        for command, last in decision.detached:
            assert self._situation
            situation = replace(self._situation, last=last, keep_since=None, expire=False)
            self._reads.add(Read(command, situation, self._owned, self._begun_s))

    async def _last_change(self) -> tuple[int, int]:
        try:
            stream = await self._backend.commands.xinfo_stream(self._backend.keys.changes(self._partition))
        except ResponseError as error:
            if "no such key" not in str(error).lower():
                raise
            return (0, 0)
        return stream_id(stream["last-generated-id"])


def wait_for(settings: Settings) -> Wait | None:
    """Return the confirmation that a commit waits for before its writes are acknowledged."""
    timeout_ms = int(1000 * settings.durable_timeout_s)
    if settings.durability == "fsync":
        return Wait(("WAITAOF", 1, 0, timeout_ms), 1)
    if settings.durability == "replicated":
        return Wait(("WAIT", settings.replicas, timeout_ms), settings.replicas)
    return None


def unconfirmed(decision: Decision) -> dict[str, list[Reply]]:
    """Return the replies of an unconfirmed commit, in which each write ends with a time-out."""
    error = Timeout("the write was not confirmed as durable in time: repeat it with the same request id").as_frame(None)
    answers = {name: list(replies) for name, replies in decision.replies.items()}
    for name, replies in answers.items():
        for at, reply in enumerate(replies):
            if (name, reply.number) in decision.writes and reply.error is None:
                replies[at] = reply._replace(result=None, error=error)
                UNCONFIRMED.inc()
    return answers


def _command(fields: dict[bytes, bytes]) -> Command | None:
    """Decode the command of an entry; None if it is malformed."""
    try:
        return Command(*unpack(fields[b"r"]))
    except Exception:
        UNREADABLE.inc()
        log.exception("command_unreadable")
        return None


def unknown_names(app: App, versions: Versions, commands: Iterable[Command | None]) -> frozenset[str]:
    """Return the tables and topics that commands name and this application does not declare."""
    tables, topics = set[str](), set[str]()
    for command in commands:
        body: Any = command.body if command else {}
        parts = body.get("operations")
        for part in (body, *(parts if isinstance(parts, list) else ())):
            if isinstance(part, dict) and isinstance(name := part.get("table"), str):
                tables.add(name)
        if isinstance(topic := body.get("topic"), str) and not app.families(topic):
            topics |= versions.unknown_topic(topic)
    return frozenset(tables - app.tables.keys()) | topics


def build(service: Service, app: App) -> Worker:
    """Add the store to a service process."""
    backend, settings = service.backend, service.settings
    answers = Answers(backend)
    service.at_drain(answers.sent)
    versions = Versions(app, backend, service.registry)
    service.run(versions.run)
    service.tell(versions.describe)
    memory, reads, spread = Memory(backend), Reads(app, backend, settings, answers), Spread(app, backend)
    service.run(memory.run)
    service.run(spread.run)
    service.at_drain(reads.drain)

    def tenure(partition: int, owned: Owned) -> StoreTenure:
        return StoreTenure(
            app,
            backend,
            settings,
            answers,
            partition,
            owned,
            memory=memory,
            reads=reads,
            spread=spread,
            versions=versions,
        )

    def indexer(partition: int, owned: Owned) -> IndexerTenure:
        return IndexerTenure(app, backend, partition, owned, versions)

    async def start() -> None:
        await check_durability(backend, settings)
        await declare_tables(backend, app)
        await versions.publish()
        indexed = await is_needed(app, backend)
        for partition in range(backend.keys.partitions):
            # From now on, changes that one of these groups has not read are kept, within the bounds.
            changes = backend.keys.changes(partition)
            await backend.ensure_group(changes, ConsumerGroup.BROADCASTER)
            if indexed:
                await backend.ensure_group(changes, ConsumerGroup.INDEXER)
            else:
                await backend.commands.xgroup_destroy(changes, ConsumerGroup.INDEXER)
        if indexed:
            service.run(indexing.run)
            service.at_drain(indexing.drain)

    service.at_start(start)
    indexing = Worker(
        ConsumerGroup.INDEXER,
        backend,
        service.registry,
        settings,
        stream=backend.keys.changes,
        tenure=indexer,
        link=backend.functions.link_apply,
        versions=versions,
    )
    return service.work(
        Worker(
            ConsumerGroup.STORE,
            backend,
            service.registry,
            settings,
            stream=backend.keys.commands,
            tenure=tenure,
            versions=versions,
        )
    )


async def check_durability(backend: Backend, settings: Settings) -> None:
    """Check that the server supports the chosen durability. Raises ConfigurationError."""
    if settings.durability == "fsync":
        try:
            for partition in range(backend.keys.partitions):  # each partition may be on another server
                await backend.wait(("WAITAOF", 1, 0, 1), backend.keys.partition(partition))
        except ResponseError as error:
            raise ConfigurationError(
                f"--durability fsync: the server cannot say what is on its disk ({error}): it must be Redis 7.2 or "
                "newer, or Valkey, with appendonly yes"
            ) from None


async def declare_tables(backend: Backend, app: App) -> None:
    """Write the declared tables to the stage.

    Raises ConfigurationError if a table's key differs from that of its items.
    """
    stored = await backend.commands.hgetall(backend.keys.tables())
    for table in app.tables.values():
        raw = stored.get(table.name.encode())
        if raw is not None and (key := tuple(Declaration(*unpack(raw)).key)) != table.key:
            raise ConfigurationError(
                f"table {table.name!r} has the key {table.key}, and in stage {backend.keys.stage!r} its items were "
                f"written with the key {key}: give it another name, or use another --stage"
            )
        declaration = Declaration(table.key, table.stream_view, table.expires, dict(table.indexes))
        if raw != pack(declaration):
            await backend.commands.hset(backend.keys.tables(), table.name, pack(declaration))
