"""Several workers of one group over one partition, stepped by hand.

The loop is the production one. It runs as a bare coroutine, without an event loop: every call to Redis stops before it
is made, and again before its answer is seen. A test says who goes on, who is killed, who stays where it is (paused),
and whose call is made twice, as the client library does after a lost answer, at once or much later.

Three users' feeds lie in three partitions, which all entries go to; a list in the source partition is written by the
commit. Each effect carries the number of its entry and the epoch of its owner.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Coroutine, Generator, Iterable
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from tidewire.errors import Fenced
from tidewire.feeds import chained
from tidewire.functions import Append, Batch, Functions, Operation, Owned
from tidewire.keys import Keys
from tidewire.partition.loop import Outcome, PartitionLoop
from tidewire.records import Position, pack, unpack

KEYS = Keys("t", 3)
SOURCE = 0
GROUP = "g"
STREAM = KEYS.changes(SOURCE)
LEASE = KEYS.lease(SOURCE, GROUP)
DONE = KEYS.members("done", next(n for n in range(100) if KEYS.partition_of(n) == SOURCE))
USERS = [next(f"u{n}" for n in range(100) if KEYS.partition_of(f"u{n}") == partition) for partition in range(3)]
FEEDS = {user: KEYS.user_feed(user) for user in USERS}
CLOSED = KEYS.user_feed(next(f"c{n}" for n in range(100) if KEYS.partition_of(f"c{n}") == 1))
LEASE_MS = 60_000
"""Leases end when the test says so."""


@types.coroutine
def stop(reason: str) -> Generator[str, None, None]:
    """Hand the step back to the test."""
    yield reason


class Gate:
    """Between a worker and Redis: `fcall` in three steps, and sometimes made twice."""

    def __init__(self, server: Redis, late: list[tuple[Any, ...]]) -> None:
        self.server = server
        self.late = late  # calls that are on the wire a second time
        self.repeat: str | None = None  # "now" or "late": what happens to the next call

    async def fcall(self, function: str, numkeys: int, *args: Any) -> Any:
        await stop(f"before {function}")
        answer = self.server.fcall(function, numkeys, *args)
        if self.repeat == "now":
            answer = self.server.fcall(function, numkeys, *args)
        elif self.repeat == "late" and function not in ("lease_take", "batch"):
            # A late second lease_take or batch has an answer that nobody waits for any more, and no effect of ours.
            self.late.append((function, numkeys, *args))
        self.repeat = None
        await stop(f"after {function}")
        return answer

    async def function_load(self, code: str, replace: bool = False) -> Any:
        raise AssertionError("the functions are there")


class ModelTenure:
    """Each entry goes to every user, in the order of the stream; at most `most` entries at a time."""

    def __init__(self, owned: Owned, most: int) -> None:
        self.owned = owned
        self.most = most

    def destinations(self) -> Iterable[bytes]:
        return [KEYS.links(partition) for partition in range(KEYS.partitions)]

    async def decide(self, batch: Batch) -> Outcome:
        taken = batch.entries[: self.most]
        links: dict[bytes, list[list[Append]]] = {}
        operations = []
        for id_, fields in taken:
            body = pack([int(fields[b"n"]), self.owned.fence.epoch])
            position = Position(SOURCE, 0, *id_)
            for partition, user in enumerate(USERS):
                calls = links.setdefault(KEYS.links(partition), [[]])
                if partition == 1:  # two effects of one change at one destination, in two calls
                    calls[-1].append(Append(position, 1, body, (CLOSED,)))
                    calls.append([Append(position, 2, body, (FEEDS[user],))])
                else:
                    calls[-1].append(Append(position, 1, body, (FEEDS[user],)))
            operations.append(Operation("RPUSH", DONE, (fields[b"n"],)))
        return Outcome(len(taken), operations, links)

    async def committed(self) -> None:
        pass


async def in_turn(calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
    for call in calls:
        await call


class Worker:
    """One process: takes the lease, works, and starts over when it is fenced."""

    def __init__(self, model: Model, name: str, most: int) -> None:
        self.model = model
        self.name = name
        self.most = most
        self.gate = Gate(model.server, model.late)
        self.functions = Functions(self.gate)
        self.owned: Owned | None = None
        self.life = self.live()

    async def live(self) -> None:
        while True:
            try:
                await self.own()
            except Fenced:
                self.owned = None

    async def own(self) -> None:
        fence = await self.functions.lease_take(LEASE, KEYS.partition(SOURCE), self.name, LEASE_MS)
        if fence is None:
            return
        self.owned = Owned(LEASE, KEYS.partition(SOURCE), STREAM, GROUP, fence)

        async def idle(_: tuple[int, int]) -> None:
            await stop("idle")

        loop = PartitionLoop(
            self.functions,
            self.owned,
            ModelTenure(self.owned, self.most),
            source="g:0",
            idle=idle,
            batch=3,
            most_entries=1000,
            together=self.stamped,
        )
        await loop.run()

    async def stamped(self, calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
        """In turn. The first time it is the stamps: once all are there, earlier owners must be silent."""
        await in_turn(calls)
        assert self.owned
        self.model.stamped(self.owned.fence.epoch)

    def step(self) -> str:
        """To its next stop."""
        return str(self.life.send(None))

    def kill(self) -> None:
        self.life.close()


class Model:
    """The servers' state, the workers, and what must be true."""

    def __init__(self, server: Redis, workers: int, most: int) -> None:
        self.server = server
        self.most = most
        self.appended = 0
        self.names = 0
        self.late: list[tuple[Any, ...]] = []
        self.stamp: tuple[int, dict[str, int]] = (0, {})
        server.flushall()
        server.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        for state, feed in FEEDS.values():
            server.fcall("feed_open", 2, state, feed, 600_000)
        self.workers = [self.another() for _ in range(workers)]

    def another(self) -> Worker:
        self.names += 1
        return Worker(self, f"w{self.names}", self.most)

    def append(self) -> None:
        self.server.xadd(STREAM, {"n": self.appended})
        self.appended += 1

    def kill(self, index: int) -> None:
        self.workers[index].kill()
        self.workers[index] = self.another()

    def expire(self) -> None:
        self.server.hset(LEASE, "expires", 1)

    def deliver_late(self) -> None:
        """The second copy of a call arrives."""
        if self.late:
            function, numkeys, *args = self.late.pop(0)
            with contextlib.suppress(ResponseError):  # FENCED, most often
                self.server.fcall(function, numkeys, *args)

    def stamped(self, epoch: int) -> None:
        if epoch > self.stamp[0]:
            self.stamp = (epoch, {user: len(self.feed(user)) for user in USERS})

    # ── what must be true ───────────────────────────────────────────────────────────────────────────────────────────

    def feed(self, user: str) -> list[tuple[int, int]]:
        """(number, epoch) of a feed's entries; that they are numbered and chained is checked in passing."""
        state, key = FEEDS[user]
        entries: Any = self.server.xrange(key)
        tag = self.server.fcall("feed_read", 2, state, key, 0, 0)[2].decode()
        previous = None
        for seq, (id_, fields) in enumerate(entries, 1):
            assert id_ == b"%d-0" % seq, f"the feed of {user} has a hole before {id_!r}"
            if previous is not None:
                expected = chained(previous, fields[b"p"].decode())
                assert fields[b"t"].decode() == expected, f"the tags of {user} do not chain at {seq}"
            previous = fields[b"t"].decode()
        assert previous in (None, tag), f"the state of {user}'s feed is not that of its last entry"
        return [(number, epoch) for number, epoch in (unpack(fields[b"b"]) for _, fields in entries)]

    def check(self) -> None:
        for user in USERS:
            entries = self.feed(user)
            numbers = [number for number, _ in entries]
            assert numbers == list(range(len(numbers))), f"{user} got {numbers}: not each once, in order"
            epoch, lengths = self.stamp
            late = [entry for entry in entries[lengths.get(user, 0) :] if entry[1] < epoch]
            assert not late, f"{user} got {late} from an earlier owner, after {epoch} had stamped all destinations"
        done = [int(number) for number in self.server.lrange(DONE, 0, -1)]
        assert done == list(range(len(done))), f"committed {done}: not each once, in order"
        assert not self.server.exists(*CLOSED), "a closed feed was written to"

    def finish(self) -> None:
        """Let all go on, take the lease from whoever has it, and look at the end."""
        while self.late:
            self.deliver_late()
        for _ in range(2):
            for worker in self.workers:
                for _ in range(40):
                    worker.step()
            self.expire()
        last = self.another()
        self.workers.append(last)
        self.expire()
        for _ in range(60 + 60 * self.appended):
            last.step()
            if self.server.llen(DONE) == self.appended and not self.pending():
                break
        self.check()
        for user in USERS:
            assert len(self.feed(user)) == self.appended, f"{user} misses entries after {len(self.feed(user))}"
        assert self.server.llen(DONE) == self.appended, "something was never committed"
        assert self.pending() == 0, "something was never acknowledged"

    def pending(self) -> int:
        found: Any = self.server.xpending(STREAM, GROUP)
        return int(found["pending"])

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
