"""Decides a batch of commands: fetches facts until they suffice, within the budgets of the commands.

An expensive command does not delay the others: a read is detached, and a write gets a batch of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from redis.exceptions import OutOfMemoryError

from tidewire.app import App
from tidewire.model.records import Command
from tidewire.redis.backend import Backend

from .budget import UNLIMITED, Account, Clock, Cut, Limits, cut
from .bulk import LOAD, SWEEP
from .decide import CHORES, Decision, Needs, decide, foresee
from .facts import Fact, KindFact, Sizes, Value
from .fetching import fetch, settle_kind
from .memory import Memory
from .view import Situation

FORESEEN_BATCH = 128
MAX_FORESEEN_BYTES = 8 << 20
"""Maximum bytes of the items that the commands of a batch name.

They are fetched for FORESEEN_BATCH commands at a time.
"""
DETACHABLE = ("get", "query")


class Deciding:
    """The deciding of one batch."""

    def __init__(
        self,
        app: App,
        backend: Backend,
        memory: Memory,
        commands: Sequence[Command | None],
        situation: Situation,
        limits: Limits,
        clock: Clock = time.thread_time,
    ) -> None:
        self._app = app
        self._backend = backend
        self._memory = memory
        self._commands = commands
        self._situation = situation
        self._clock = clock
        self._limits = limits
        self._begun_s = time.monotonic()
        self._facts: dict[Fact, Value] = {}
        # The senders bound the commands of services.
        self._accounts = [
            Account(UNLIMITED if command is None or command.action in (SWEEP, LOAD) else limits, clock)
            for command in commands
        ]
        self._detachable = [command is not None and command.action in DETACHABLE for command in commands]
        self._cut = Cut(len(commands), frozenset())

    @property
    def kinds(self) -> dict[str, str]:
        """The known kinds of sort keys, by table."""
        facts = self._facts.items()
        return {fact.table: str(kind) for fact, kind in facts if isinstance(fact, KindFact) and kind is not None}

    async def decision(self) -> Decision:
        """Return the decision, which may consume only the first commands."""
        await self._foresee()
        while True:
            found = self._decide()
            if not isinstance(found, Decision):
                await self._fetch(found)
            elif await self._settled(found):
                return found
            await asyncio.sleep(0)  # other partitions get their turn between two passes

    def _decide(self) -> Decision | Needs:
        waited_ms = int(1000 * (time.monotonic() - self._begun_s))
        full = self._memory.full(self._situation.partition)
        return decide(
            self._app,
            self._backend.keys,
            self._facts,
            self._commands[: self._cut.limit],
            replace(self._situation, waited_ms=waited_ms, full=full),
            self._accounts,
            self._cut.detached,
            self._clock,
        )

    async def _foresee(self) -> None:
        sizes: Sizes = {}
        for begin in range(0, len(self._commands), FORESEEN_BATCH):
            some = self._commands[begin : begin + FORESEEN_BATCH]
            facts = foresee(self._app, some, self._situation)
            self._facts |= await fetch(self._backend, self._situation.partition, facts - self._facts.keys(), sizes)
            if sum(sizes.values()) > MAX_FORESEEN_BYTES:
                self._cut = Cut(begin + len(some), frozenset())
                break

    async def _fetch(self, needs: Needs) -> None:
        """Fetch one round of facts for the commands that stay in the batch, and charge them."""
        wanted = set(needs.get(CHORES, ()))
        charged = {number: facts for number, facts in needs.items() if number != CHORES}
        for number, facts in charged.items():
            self._accounts[number].ask(len(facts))
        self._cut = cut(self._accounts, self._detachable, charged, self._cut)
        charged = {
            number: facts
            for number, facts in charged.items()
            if number < self._cut.limit and number not in self._cut.detached and not self._accounts[number].exhausted()
        }
        for facts in charged.values():
            wanted |= facts
        sizes: Sizes = {}
        max_bytes = self._limits.bytes if self._cut.limit == 1 else 0
        self._facts |= await fetch(self._backend, self._situation.partition, wanted, sizes, max_bytes=max_bytes)
        for number, facts in charged.items():
            self._accounts[number].add_bytes(sum(sizes.get(fact, 0) for fact in facts))

    async def _settled(self, decision: Decision) -> bool:
        """Settle the kinds of sort keys.

        Returns False if another partition was first; its kind is a fact from then on.
        """
        agreed = True
        for table, kind in decision.kinds.items():
            try:
                settled = await settle_kind(self._backend, table, kind)
            except OutOfMemoryError:
                self._memory.refused(self._situation.partition)
                return False
            self._facts[KindFact(table)] = settled
            agreed &= settled == kind
        return agreed
