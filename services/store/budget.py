"""Budgets of commands: their limits, their costs so far, and which commands are too expensive for a shared batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from tidewire.errors import TooLarge
from tidewire.process.settings import Settings

Clock = Callable[[], float]
"""Returns seconds of CPU time of the thread. A busy machine does not make a command more expensive."""

MAX_SHARED_ROUNDS = 6
MAX_SHARED_FACTS = 256
MAX_SHARED_BYTES = 1 << 20
MAX_SHARED_CPU_S = 0.005
"""Maximum costs of a command that shares a batch. Beyond one, a read is detached, and a write gets a batch of
its own."""
MAX_BATCH_FACTS = 4096
"""Maximum facts that all commands of a batch ask for in one round."""
MAX_BATCH_CPU_S = 0.025
"""Maximum seconds of one pass over a batch. The rest comes with the next batch."""
FACTS_PER_MS = 100
READ_BYTES_PER_MS = 200_000
WRITTEN_BYTES_PER_MS = 50_000
"""Facts, fetched bytes, and bytes of changes on their way to the sockets, that cost about 1 ms beside the decision."""
CHECK_EVERY = 32
"""Evaluations of rules between two checks of the clock."""


class Exhausted(TooLarge):
    """A command has used up its budget."""


class Limits(NamedTuple):
    """The budget of one command; 0 lifts a bound. The settings `TIDEWIRE_COMMAND_<NAME>` have the same names."""

    rounds: int = 0
    """Rounds of fetching facts."""
    facts: int = 0
    """Items, pages and counts that are fetched."""
    evaluations: int = 0
    """Evaluations of rules: who may read, who may write."""
    bytes: int = 0
    """Bytes of the facts that are fetched and of the images that are built."""
    ms: int = 0
    """Milliseconds of CPU time."""

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(*(getattr(settings, f"command_{name}") for name in cls._fields))


UNLIMITED = Limits()
_NAMES = {
    "rounds": "rounds of reading",
    "facts": "facts to read",
    "evaluations": "evaluations of rules",
    "bytes": "bytes of items",
    "ms": "milliseconds of computing",
}


class Account:
    """The costs of one command. `Deciding` charges what it fetches, and the decision charges what it does."""

    def __init__(self, limits: Limits = UNLIMITED, clock: Clock = time.thread_time) -> None:
        self._limits = limits
        self._clock = clock
        self._begun_s: float | None = None
        self._cpu_s = 0.0
        self.rounds = self.facts = self.evaluations = self.size_bytes = 0
        self.must_not_share = False

    def begin(self) -> None:
        """Start the clock."""
        self._begun_s = self._clock()

    def pause(self) -> None:
        """Stop the clock."""
        self._cpu_s, self._begun_s = self.cpu_s, None

    @property
    def cpu_s(self) -> float:
        running_s = 0.0 if self._begun_s is None else self._clock() - self._begun_s
        return self._cpu_s + running_s

    def ask(self, facts: int) -> None:
        """Charge a round of facts, before it is fetched."""
        self.rounds += 1
        self.facts += facts

    def add_bytes(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes

    def cost_ms(self, written_bytes: int = 0) -> float:
        """Return the command's work so far, in ms of one core, about. It is what the gateway charges the user."""
        fetching_ms = self.facts / FACTS_PER_MS + self.size_bytes / READ_BYTES_PER_MS
        return round(1000 * self.cpu_s + fetching_ms + written_bytes / WRITTEN_BYTES_PER_MS, 3)

    def evaluate(self) -> None:
        """Charge an evaluation of a rule. Raises Exhausted."""
        self.evaluations += 1
        if self.evaluations % CHECK_EVERY == 0:
            self.check()

    def exhausted(self) -> str | None:
        """Return the name of an exceeded bound, or None."""
        if not any(self._limits):
            return None
        cpu_ms = int(1000 * self.cpu_s)
        spent = (self.rounds, self.facts, self.evaluations, self.size_bytes, cpu_ms)
        for name, used, limit in zip(Limits._fields, spent, self._limits, strict=True):
            if limit and used > limit:
                return name
        return None

    def check(self) -> None:
        """Raise Exhausted if a bound is exceeded. The message names it, its setting, and what to do."""
        if name := self.exhausted():
            limit = getattr(self._limits, name)
            raise Exhausted(
                f"the request needs more than {limit} {_NAMES[name]}, which is the limit for one request: ask for less "
                "at once, with a narrower query or fewer operations, or raise the server's setting "
                f"TIDEWIRE_COMMAND_{name.upper()}",
                limit=limit,
                bound=name,
            )

    @property
    def is_expensive(self) -> bool:
        """Whether the command must not share a batch with others."""
        return (
            self.must_not_share
            or self.rounds > MAX_SHARED_ROUNDS
            or self.facts > MAX_SHARED_FACTS
            or self.size_bytes > MAX_SHARED_BYTES
            or self.cpu_s > MAX_SHARED_CPU_S
        )


class Cut(NamedTuple):
    """The part of a batch to decide: its first `limit` commands, without the detached ones."""

    limit: int
    detached: frozenset[int]


def cut(
    accounts: Sequence[Account], detachable: Sequence[bool], needs: Mapping[int, Iterable[object]], cut_before: Cut
) -> Cut:
    """Take expensive commands out of a batch that must be decided again.

    An expensive read is detached. The batch ends before any other expensive command, which then gets a batch of its
    own. It also ends where its commands need too many facts together.
    """
    detached, facts = set(cut_before.detached), 0
    for number in range(cut_before.limit):
        if number in detached:
            continue
        if accounts[number].is_expensive:
            if detachable[number]:
                detached.add(number)
                continue
            return Cut(max(number, 1), frozenset(detached))
        facts += len(list(needs.get(number, ())))
        if facts > MAX_BATCH_FACTS and number:
            return Cut(number, frozenset(detached))
    return Cut(cut_before.limit, frozenset(detached))
