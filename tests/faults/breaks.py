"""Guards of Tidewire, each taken out by changing one line, and what the checker must then find."""

from __future__ import annotations

from typing import NamedTuple

from .bounds import MAX_BYTES
from .pace import ALL, Pace, with_parts
from .schedule import Fault


class Break(NamedTuple):
    """One line that is changed, the faults that show it, and the kinds of violations of which one must be found."""

    file: str
    line: str
    instead: str
    faults: list[Fault]
    finds: set[str]
    pace: Pace = ALL
    partitions: int = 8
    topology: str = "embedded"
    max_bytes: dict[str, int] = MAX_BYTES
    also: tuple[tuple[str, str, str], ...] = ()
    """(file, line, instead) of further changes, where one guard covers for another."""
    environment: tuple[tuple[str, str], ...] = ()
    """Settings that bring a bound within reach of a short run."""
    seconds: float = 0.0
    """Length of a run; 0 for five seconds after the last fault."""

    @property
    def changes(self) -> list[tuple[str, str, str]]:
        return [(self.file, self.line, self.instead), *self.also]

    @property
    def lasts_s(self) -> float:
        return self.seconds or self.faults[-1].at_s + self.faults[-1].lasts_s + 5


def again(kind: str, service: str | None, count: int, lasts_s: float = 0.0, every_s: float = 3.0) -> list[Fault]:
    """Return faults of one kind that hit two processes in turn."""
    return [Fault(3.0 + number * every_s, kind, service, number % 2, lasts_s) for number in range(count)]


QUIET = Pace({"note": 0.25, "message": 0.1}, reads_s=(60.0, 90.0), notes=10_000, flees=True)
"""Few changes, so that from one partition to another there is nothing for long."""
STAYING = ALL._replace(reads_s=(60.0, 90.0))
"""Readers stay connected, so no new connection repairs what the old one missed."""
PROBED = with_parts(["probes"], STAYING)
"""Each partition is probed, `connections` and memory are watched."""


def attacked_by(*attacks: str, depth: int, mob: int = ALL.mob) -> Pace:
    """A probed pace with an attacker that sends only these kinds of requests, one round after another."""
    pace = STAYING._replace(attacks=attacks, attack_depth=depth, mob=mob, expensive_pause_s=0.0)
    return with_parts(["probes", "expensive"], pace)


BREAKS = {
    "a link takes again what it has taken": Break(
        "tidewire/redis/lua/feed.lua",
        "    local is_new = order > 0 or (order == 0 and effect[4] > after)\n",
        "    local is_new = true\n    after = NOTHING\n",
        again("swallow_link", "broadcaster", 8),
        {"double"},
    ),
    "a new owner does not stamp its epoch": Break(
        "tidewire/process/partition/loop.py",
        "self._announce(to) for to in self._tenure.destinations())",
        "self._announce(to) for to in self._tenure.destinations()[:0])",
        again("hold_note", "broadcaster", 5, lasts_s=9.5, every_s=22.0),
        {"leak"},
        QUIET,
        partitions=64,
    ),
    "nothing is fenced": Break(
        "tidewire/redis/lua/generation.lua",
        "  return now ~= known or redis.call('HGET', keys[3], 'epoch') ~= epoch\n",
        "  return false\n",
        again("hold_commit", "store", 5, lasts_s=6.0, every_s=8.0),
        {"double", "disorder", "loss", "reset"},  # it depends on whose ids are the greater
    ),
    "what is pending is not read again": Break(
        "tidewire/redis/lua/stream.lua",
        "  local from = after\n",
        "  local from = '>'\n",
        again("swallow_read", "broadcaster", 6),
        {"reset"},  # the gap is noticed: no reader is left with it
    ),
    "holes are not filled": Break(
        "services/gateway/feeds.py",
        "        REPAIRED.inc()\n",
        "        return\n",
        again("cut", "gateway", 6, lasts_s=1.0),
        {"loss"},
        STAYING,
    ),
    "feeds of a change that is sent in pieces are told apart by something else than their numbers": Break(
        "tidewire/redis/lua/link.lua",
        "  return tonumber(string.sub(redis.sha1hex(feed), 1, 13), 16)\n",
        "  return 0\n",
        [],
        {"loss"},
        with_parts(["crowd"], STAYING._replace(crowd=9000, hall_stays_s=(1.0, 6.0))),
        partitions=2,
        seconds=25.0,
    ),
    "a transaction does not say that more of it follows": Break(
        "services/broadcaster/decide.py",
        '                frame["more"] = True\n',
        "                pass\n",
        [],
        {"unit"},
        ALL._replace(rates=ALL.rates | {"pair": 2.0}),
        seconds=15.0,
    ),
    "a partition whose loop failed is left alone for long": Break(
        "tidewire/process/partition/worker.py",
        "            self._retry_at[partition] = time.monotonic() + 0.5\n",
        "            self._retry_at[partition] = time.monotonic() + 40.0\n",
        again("cut", "store", 6, lasts_s=1.0, every_s=5.0),
        {"pause"},
        PROBED,
    ),
    "a connection is not written to `connections`": Break(
        "services/gateway/presence.py",
        '        self._begin(self._write(connection, "put", {"table": CONNECTIONS, "item": item}))\n',
        "        return\n",
        [],
        {"absence"},
        PROBED,
        seconds=25.0,
    ),
    "everybody is dead whose word has expired": Break(
        "tidewire/process/liveness.py",
        "service for service, at in self._suspected.items() if begun_s - at >= CONFIRMED_LEASES * self._lease_s",
        "service for service, gone in expired.items() if gone",
        [Fault(6.0 + 25.0 * number, "stall_redis", None, 0, 6.0 + number) for number in range(3)],
        {"absence", "socket"},
        PROBED,
        also=(
            (
                "tidewire/redis/lua/service.lua",
                "  if not expires or expires > now then return 0 end\n",
                "  if not expires then return 0 end\n",
            ),
        ),
        seconds=80.0,
    ),
    "no command has a budget, and none is decided apart": Break(
        "services/store/budget.py",
        "        if not any(self._limits):\n",
        "        if True:\n",
        [],
        {"late", "pause"},
        with_parts(["probes", "expensive"], STAYING),
        also=(
            ("services/store/budget.py", "            self.must_not_share\n", "            False\n"),
            *(
                ("services/store/budget.py", line, "\n")
                for line in (
                    "            or self.rounds > MAX_SHARED_ROUNDS\n",
                    "            or self.facts > MAX_SHARED_FACTS\n",
                    "            or self.size_bytes > MAX_SHARED_BYTES\n",
                    "            or self.cpu_s > MAX_SHARED_CPU_S\n",
                )
            ),
        ),
        seconds=60.0,
    ),
    "changes of unknown tables are passed by processes that do not know them": Break(
        "services/broadcaster/service.py",
        "        await self._versions.leave_to_others(ConsumerGroup.BROADCASTER, self._partition, unknown)\n"
        "        return unknown\n",
        "        return frozenset()\n",
        [Fault(3.0, "roll_forward", None, 0, 0.0)],
        {"loss", "leak"},
        with_parts(["probes", "next"], STAYING._replace(stays_s=(1.0, 4.0))),
        seconds=60.0,
    ),
    "every batch waits for the index, and in vain": Break(
        "services/broadcaster/indexed.py",
        "        deadline = time.monotonic() + (0 if self._behind else INDEX_PATIENCE_S)\n"
        "        while await self._position() < id_:\n",
        "        deadline = time.monotonic() + INDEX_PATIENCE_S\n        while True:\n",
        [],
        {"pause"},
        with_parts(["probes", "flap"], STAYING._replace(flap_pause_s=(0.0, 1.0))),
        seconds=60.0,
    ),
    "a worker does not look behind an exception group": Break(
        "tidewire/process/partition/worker.py",
        "            cause = _cause(error)\n",
        "            cause = error\n",
        again("hold_link", "broadcaster", 6, lasts_s=6.0, every_s=9.0),
        {"death"},
    ),
    "nobody looks whether a master was replaced": Break(
        "tidewire/redis/masters.py",
        "                await self._look()\n            await asyncio.sleep(0.1)",
        "                pass\n            await asyncio.sleep(0.1)",
        again("hang_master", None, 3, every_s=20.0),
        {"pause"},
        PROBED,
        topology="cluster",
        also=(
            (
                "tidewire/redis/subscriber.py",
                "        if message is None and not self._received and silent_s > MAX_SILENCE_S:\n",
                "        if False:\n",
            ),
        ),
    ),
    "a batch of a broadcaster ends by count alone, and gives nobody a turn": Break(
        "services/broadcaster/service.py",
        "        if step_s > STEP_S:  # a turn of the event loop costs more than most steps\n",
        "        if False:\n",
        [],
        {"pause", "memory"},
        attacked_by("names", depth=20),
        also=(
            (
                "services/broadcaster/decide.py",
                "self.router.appends >= MAX_BATCH_APPENDS or self.router.size_bytes >= MAX_BATCH_BYTES",
                "False",
            ),
        ),
        seconds=60.0,
    ),
    "a call appends without a bound": Break(
        "services/broadcaster/route.py",
        "MAX_CALL_APPENDS = 500\n",
        "MAX_CALL_APPENDS = 1 << 40\n",
        [],
        {"pause", "late"},
        attacked_by("rants", depth=1, mob=10_000),
        also=(("services/broadcaster/route.py", "MAX_CALL_BYTES = 1 << 18\n", "MAX_CALL_BYTES = 1 << 40\n"),),
        seconds=90.0,
    ),
    "answers that nobody reads are not bounded": Break(
        "services/gateway/budget.py",
        "            if limit and held and held + size_bytes > limit:\n",
        "            if False:\n",
        [],
        {"memory"},
        attacked_by("unread", depth=10),
        max_bytes=MAX_BYTES | {"gateway": 200 << 20},
        environment=(("TIDEWIRE_LIMIT_WORK_MS_PER_S", "0"),),
        seconds=60.0,
    ),
    "a connection is not asked again whether it may follow its topics": Break(
        "services/gateway/subscriptions.py",
        "        if self._recheck_due:\n            return",
        "        if True:\n            return",
        [],
        {"leak"},
        with_parts(["flap"], STAYING._replace(flap_pause_s=(8.0, 12.0))),
        seconds=60.0,
    ),
    "a change stream is bounded in entries alone": Break(
        "services/store/chores.py",
        "    if situation.keep_bytes and stream.size_bytes > situation.keep_bytes:\n",
        "    if False:\n",
        [],
        {"memory"},
        with_parts(["probes", "expensive"], STAYING._replace(expensive_pause_s=0.0)),
        max_bytes=MAX_BYTES | {"redis": 160 << 20},
        environment=(("TIDEWIRE_CHANGES_BYTES", str(8 << 20)), ("TIDEWIRE_LIMIT_WORK_MS_PER_S", "0")),
        seconds=180.0,
    ),
}
