"""The store as a process: a worker whose partitions' streams are the commands."""

from __future__ import annotations

import time

import structlog
from prometheus_client import Counter, Histogram
from redis.exceptions import ResponseError

from tidewire.app import App
from tidewire.backend import Backend
from tidewire.bus import send_replies
from tidewire.functions import Batch, Operation, Owned
from tidewire.lifecycle import Service
from tidewire.partition.loop import Outcome
from tidewire.partition.worker import Worker
from tidewire.records import Command, stream_id, unpack
from tidewire.settings import Settings

from .decide import Decision, Situation, decide
from .facts import Fact, Value, fetch

log = structlog.get_logger(__name__)

GROUP = "store"

COMMANDS = Counter("tidewire_store_commands_total", "Commands decided.")
CHANGES = Counter("tidewire_store_changes_total", "Changes appended.")
ERRORS = Counter("tidewire_store_errors_total", "Commands answered with an error.", ["code"])
UNREADABLE = Counter("tidewire_store_unreadable_total", "Command entries that could not be read, and were skipped.")
DECIDE_SECONDS = Histogram("tidewire_store_decide_seconds", "From a batch to its decision, fetches included.")


class StoreTenure:
    """The store's work on one partition while it owns it. It alone writes there, so what it fetched stays true."""

    def __init__(self, app: App, backend: Backend, settings: Settings, partition: int, owned: Owned) -> None:
        self._app = app
        self._backend = backend
        self._settings = settings
        self._partition = partition
        self._owned = owned
        self._last: tuple[int, int] | None = None  # id of the partition's last change
        self._decision = Decision()

    def destinations(self) -> tuple[bytes, ...]:
        return ()

    async def decide(self, batch: Batch) -> Outcome:
        begun = time.perf_counter()
        if self._last is None:
            self._last = await self._last_change()
        situation = Situation(
            self._partition, self._owned.fence.generation, batch.now, self._last, self._settings.limit_item_bytes
        )
        commands = [_command(fields) for _, fields in batch.entries]
        facts: dict[Fact, Value] = {}
        while isinstance(decided := decide(self._app, self._backend.keys, facts, commands, situation), set):
            facts |= await fetch(self._backend, self._app, self._partition, decided)
        self._decision = decided
        consumed_to = batch.entries[decided.consumed - 1][0]
        # Commands are of no use once acknowledged: trimmed behind the one reader, never deleted.
        trim = Operation("XTRIM", self._owned.stream, ("MINID", "=", f"{consumed_to[0]}-{consumed_to[1] + 1}"))
        DECIDE_SECONDS.observe(time.perf_counter() - begun)
        return Outcome(decided.consumed, [*decided.operations, trim])

    async def committed(self) -> None:
        decision = self._decision
        self._last = decision.last
        COMMANDS.inc(decision.consumed)
        CHANGES.inc(decision.changes)
        for code in decision.errors:
            ERRORS.labels(code).inc()
        await send_replies(self._backend, decision.replies)

    async def _last_change(self) -> tuple[int, int]:
        try:
            stream = await self._backend.commands.xinfo_stream(self._backend.keys.changes(self._partition))
        except ResponseError as error:
            if "no such key" not in str(error).lower():
                raise
            return (0, 0)
        return stream_id(stream["last-generated-id"])


def _command(fields: dict[bytes, bytes]) -> Command | None:
    """The command of an entry; None for one that nobody here wrote."""
    try:
        return Command(*unpack(fields[b"r"]))
    except Exception:
        UNREADABLE.inc()
        log.exception("command_unreadable")
        return None


def build(service: Service, app: App) -> Worker:
    """Wire the store into a service process."""
    backend, settings = service.backend, service.settings

    def tenure(partition: int, owned: Owned) -> StoreTenure:
        return StoreTenure(app, backend, settings, partition, owned)

    return service.work(Worker(GROUP, backend, service.registry, settings, stream=backend.keys.commands, tenure=tenure))
