"""Several workers of one group over one partition, stepped by hand.

The loop is the production one. It runs as a bare coroutine, without an event loop: every call to Redis stops before it
is made, and again before its answer is seen. A test says who goes on, who is killed, who stays where it is (paused),
and whose call is made twice, as the client library does after a lost answer, at once or much later.

All entries go to the feeds of users in three partitions, and by the commit to a list in the source partition. Each
effect carries the number of its entry and the epoch of its owner.
"""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import ResponseError

from tidewire.errors import Fenced
from tidewire.model.feeds import chained, entry_of
from tidewire.model.records import Position, pack, unpack
from tidewire.process.partition.loop import Incomplete, Outcome, PartitionLoop
from tidewire.redis.functions import (
    VERSION,
    WHOLE,
    Append,
    Batch,
    FeedBounds,
    Functions,
    Owned,
    RedisCommand,
    Unit,
    body_id,
    feed_number,
    reference,
    referred,
)
from tidewire.redis.keys import Home, Keys

KEYS = Keys("t", 3)
SOURCE = 0
GROUP = "g"
STREAM = KEYS.changes(SOURCE)
LEASE = KEYS.lease(SOURCE, GROUP)
DONE = KEYS.members("done", next(n for n in range(100) if KEYS.partition_of(n) == SOURCE))


def users(partition: int, count: int) -> list[str]:
    return [user for user in (f"u{n}" for n in range(100)) if KEYS.partition_of(user) == partition][:count]


USERS = users(0, 2) + users(1, 1) + users(2, 1)
PASSING = [users(0, 4)[2:], users(1, 3)[2:], []]
"""By partition, the users that may or may not be readers of a change each time that it is decided."""
FEEDS = {user: KEYS.user_feed(user) for user in (*USERS, *PASSING[0], *PASSING[1])}
CLOSED = KEYS.user_feed(users(1, 2)[1])
EFFECTS = [[FEEDS[USERS[0]], FEEDS[USERS[1]]], [CLOSED, FEEDS[USERS[2]]], [FEEDS[USERS[3]]]]
"""By destination, the feeds of each entry."""
LEASE_MS = 60_000
"""Leases end when the test says so."""

Entry = tuple[tuple[int, int], dict[bytes, bytes]]


CALLS = ["lease_take", "lease_renew", "link_stamp", "batch", "link_append", "commit"]
STOPS = ["after lease_take", "after link_stamp", "before batch", "after batch", "before link_append"]
STOPS += ["after link_append", "before commit", "again commit", "after commit"]


class Got(NamedTuple):
    """Return the contents of a feed."""

    number: int
    epoch: int


@types.coroutine
def stop(reason: str) -> Generator[str, None, None]:
    """Hand the step back to the test."""
    yield reason


@types.coroutine
def in_any_order(calls: Iterable[Coroutine[Any, Any, Any]], chance: random.Random) -> Generator[str, None, None]:
    """Run all coroutines concurrently, each in single steps."""
    pending = list(calls)
    try:
        while pending:
            call = chance.choice(pending)
            try:
                yield call.send(None)
            except StopIteration:
                pending.remove(call)
    finally:
        for call in pending:
            call.close()


def unless_fenced(call: Callable[[], Any]) -> None:
    """A call whose answer is lost."""
    try:
        call()
    except ResponseError as error:
        if "FENCED" not in str(error):
            raise


def transactions(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    unit: list[Entry] = []
    for entry in entries:
        unit.append(entry)
        if entry[1][b"more"] == b"0":
            yield unit
            unit = []


class Gate:
    """Between a worker and Redis: `fcall` in steps, and sometimes made twice."""

    def __init__(self, server: Redis, strays: list[Callable[[], Any]]) -> None:
        self.server = server
        self.strays = strays  # copies of calls that are still on the wire
        self.repeats: dict[str, str] = {}
        """What happens to the next call of a function. "at once", "later": its answer is lost, and that of a second
        call is seen; "stray": a second copy, whose answer nobody waits for, arrives when the test says so."""

    async def fcall(self, function: str, numkeys: int, *args: Any) -> Any:
        called, function = function, function.removesuffix(f"_{VERSION}")
        await stop(f"before {function}")
        repeat = self.repeats.pop(function, None)
        call = functools.partial(self.server.fcall, called, numkeys, *args)
        if repeat == "stray":
            self.strays.append(call)
        elif repeat:
            unless_fenced(call)
            if repeat == "later":
                await stop(f"again {function}")
        answer = call()
        await stop(f"after {function}")
        return answer

    async def function_load(self, code: str, replace: bool = False) -> Any:
        raise AssertionError("the functions are there")


class Call(NamedTuple):
    """Bodies that are stored, then units that may refer to them."""

    bodies: list[tuple[bytes, bytes]]
    units: list[Unit]


async def append(functions: Functions, to: Home, source: str, epoch: int, call: Call) -> None:
    if call.bodies:
        await functions.body_put(to, 600_000, call.bodies)
    await functions.link_append(to, source, epoch, FeedBounds(1000, 1 << 20), call.units)


def feeds_of(partition: int, chance: random.Random) -> list[bytes]:
    """The readers of a change at a destination, in the order in which a unit is cut."""
    passing = [FEEDS[user] for user in PASSING[partition] if chance.random() < 0.5]
    return sorted(EFFECTS[partition] + passing, key=feed_number)


class ModelTenure:
    """Each entry goes to everyone, in the order of the stream; how many at a time, and in how many calls, varies.

    Two entries of which the first has `more` are a transaction: each feed gets both in one call.
    """

    def __init__(self, owned: Owned, chance: random.Random) -> None:
        self.owned = owned
        self.chance = chance

    def destinations(self) -> Iterable[Home]:
        return [KEYS.home(partition) for partition in range(KEYS.partitions)]

    async def decide(self, batch: Batch) -> Outcome | None:
        if not batch.entries:
            return None
        count = self.chance.randint(1, len(batch.entries))
        while batch.entries[count - 1][1][b"more"] == b"1":
            count += 1
            if count > len(batch.entries):
                assert not batch.at_end, "both entries of a transaction are appended at once"
                raise Incomplete
        taken = batch.entries[:count]
        links = {KEYS.home(partition): self.calls(partition, taken) for partition in range(KEYS.partitions)}
        return Outcome(len(taken), [RedisCommand("RPUSH", DONE, (fields[b"n"],)) for _, fields in taken], links)

    def calls(self, partition: int, taken: list[Entry]) -> list[Call]:
        calls = [Call([], [])]
        for entries in transactions(taken):
            position = Position(SOURCE, 0, *entries[-1][0])
            made = [self.made(id_, fields) for id_, fields in entries]
            feeds = feeds_of(partition, self.chance)
            cut = self.chance.randint(1, len(feeds))
            last = feed_number(feeds[cut - 1]) if cut < len(feeds) else WHOLE
            for part, upto in ((feeds[:cut], last), (feeds[cut:], WHOLE)):
                if calls[-1].units and self.chance.random() < 0.5:
                    calls.append(Call([], []))
                if part:
                    calls[-1].bodies.extend(body for _, body in made if body)
                    calls[-1].units.append(Unit(position, [one._replace(feeds=part) for one, _ in made], upto))
        return [call for call in calls if call.units]

    def made(self, id_: tuple[int, int], fields: dict[bytes, bytes]) -> tuple[Append, tuple[bytes, bytes] | None]:
        """An append to no feed yet, and its body where that is stored once."""
        position, body = Position(SOURCE, 0, *id_), pack([int(fields[b"n"]), self.owned.fence.epoch])
        if self.chance.random() < 0.7:
            return Append(position, body, len(body), ()), None
        name = body_id(position, body)
        return Append(position, reference(name), len(body), ()), (name, body)

    async def committed(self, *, confirmed: bool) -> None:
        pass


class Worker:
    """One process: takes the lease, works, renews it beside that, and starts over when it is fenced."""

    def __init__(self, model: Model, name: str) -> None:
        self.model = model
        self.name = name
        self.gate = Gate(model.server, model.strays)
        self.functions = Functions(self.gate)
        self.owned: Owned | None = None
        self.life = self.live()
        self.renewal: Coroutine[Any, Any, None] | None = None

    async def live(self) -> None:
        while True:
            try:
                await self.own()
            except Fenced:
                self.owned = None

    async def own(self) -> None:
        owned = await self.functions.lease_take(LEASE, KEYS.home(SOURCE), STREAM, GROUP, self.name, LEASE_MS)
        if owned is None:
            return
        self.owned = owned

        async def idle(_: tuple[int, int]) -> None:
            await stop("idle")

        loop = PartitionLoop(
            self.functions,
            self.owned,
            ModelTenure(self.owned, self.model.chance),
            source="g:0",
            idle=idle,
            batch=self.model.batch,
            link=functools.partial(append, self.functions),
            together=self.together,
        )
        await loop.run()

    async def together(self, calls: Iterable[Coroutine[Any, Any, Any]]) -> None:
        """The first time it is the stamps: once all are there, earlier owners must be silent."""
        await in_any_order(calls, self.model.chance)
        assert self.owned
        self.model.stamped(self.owned.fence.epoch)

    def step(self) -> str:
        """To its next stop."""
        return str(self.life.send(None))

    def renew(self) -> None:
        """A step of the renewal; where it is fenced, the work stops at once, wherever it is."""
        if self.renewal is None and self.owned:
            self.renewal = self.functions.lease_renew(self.owned, LEASE_MS)
        try:
            if self.renewal:
                self.renewal.send(None)
        except StopIteration:
            self.renewal = None
        except Fenced:
            self.kill()
            self.owned, self.life = None, self.live()

    def kill(self) -> None:
        self.life.close()
        if self.renewal:
            self.renewal.close()
            self.renewal = None


class Model:
    """The server's state, the workers, and what must be true."""

    def __init__(self, server: Redis, workers: int, batch: int, seed: int) -> None:
        self.server = server
        self.batch = batch
        self.chance = random.Random(seed)
        self.positions: list[str] = []  # of what was appended to the stream: the plain list
        self.names = 0
        self.strays: list[Callable[[], Any]] = []
        self.stamp: tuple[int, dict[str, int]] = (0, {})
        server.flushall()
        server.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        self.tags = {
            user: server.fcall(f"feed_open_{VERSION}", len(KEYS.home_of(feed)) + 1, *KEYS.home_of(feed), feed, 600_000)[
                2
            ].decode()
            for user, feed in FEEDS.items()
        }
        self.workers = [self.another() for _ in range(workers)]

    def another(self) -> Worker:
        self.names += 1
        return Worker(self, f"w{self.names}")

    def append(self) -> None:
        """Another entry, or two that are a transaction."""
        first, count = len(self.positions), 1 + (self.chance.random() < 0.3)
        pipeline = self.server.pipeline()
        for number in range(count):
            pipeline.xadd(STREAM, {"n": first + number, "more": int(number < count - 1)})
        ids: list[Any] = pipeline.execute()
        self.positions += [f"{SOURCE}-0-{id_.decode()}" for id_ in ids]

    def owner(self) -> Worker:
        """The one that took the lease last, as far as it knows."""
        return max(self.workers, key=lambda worker: worker.owned.fence.epoch if worker.owned else 0)

    def kill(self, worker: Worker) -> None:
        worker.kill()
        self.workers[self.workers.index(worker)] = self.another()

    def expire(self) -> None:
        self.server.hset(LEASE, "expires", 1)

    def deliver_stray(self) -> None:
        if self.strays:
            unless_fenced(self.strays.pop(self.chance.randrange(len(self.strays))))

    def stamped(self, epoch: int) -> None:
        if epoch > self.stamp[0]:
            self.stamp = (epoch, {user: len(entries) for user, entries in self.look()[0].items()})

    # ── what must be true ───────────────────────────────────────────────────────────────────────────────────────────

    def look(self) -> tuple[dict[str, list[Got]], list[int]]:
        """Return the contents of all feeds and the list at one moment. Checks that feeds are numbered and chained."""
        pipeline = self.server.pipeline(transaction=False)
        for key in FEEDS.values():
            pipeline.hget(KEYS.home_of(key).feeds, key)
            pipeline.xrange(key)
        pipeline.lrange(DONE, 0, -1)
        pipeline.exists(CLOSED)
        *replies, done, closed = pipeline.execute()
        assert not closed, "a closed feed was written to"
        feeds = {user: self.feed(user, *replies[2 * i : 2 * i + 2]) for i, user in enumerate(FEEDS)}
        return feeds, [int(number) for number in done]

    def feed(self, user: str, state: bytes, entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Got]:
        tag, found = self.tags[user], []
        for seq, (id_, fields) in enumerate(entries, 1):
            entry = entry_of(id_, fields[b"e"])
            assert entry.seq == seq, f"the feed of {user} has a hole before {id_!r}"
            tag = chained(tag, entry.position)
            assert entry.tag == tag, f"the tags of {user} do not chain at {seq}"
            name = referred(entry.body)
            body = entry.body if name is None else self.server.hget(KEYS.home_of(FEEDS[user]).bodies, name)
            assert body, f"{user} cannot read {entry.position}: its body is gone"
            got = Got(*unpack(body))
            assert entry.position == self.positions[got.number], f"{user} got {got.number} as {entry.position}"
            found.append(got)
        assert state[26:36] == tag.encode(), f"the state of {user}'s feed is not that of its last entry"
        return found

    def check(self) -> None:
        feeds, done = self.look()
        stamp, lengths = self.stamp
        for user in (user for some in PASSING for user in some):
            numbers = [got.number for got in feeds.pop(user)]
            assert numbers == sorted(set(numbers)), f"{user} (passing) got {numbers}: not each once, in order"
        for user, entries in feeds.items():
            numbers, epochs = [got.number for got in entries], [got.epoch for got in entries]
            assert numbers == list(range(len(numbers))), f"{user} got {numbers}: not each once, in order"
            assert epochs == sorted(epochs), f"{user} got {entries}: an earlier owner after a later one"
            late = [got for got in entries[lengths.get(user, 0) :] if got.epoch < stamp]
            assert not late, f"{user} got {late} of an earlier owner, after {stamp} had stamped all destinations"
            assert len(done) <= len(numbers), f"{user} got {len(numbers)} when {len(done)} were acknowledged"
        assert done == list(range(len(done))), f"committed {done}: not each once, in order"

    def finish(self) -> None:
        """Let a fresh worker finish, with all others continuing before it reads or after it is done; then check."""
        last = self.another()
        others = self.workers
        self.workers = [*others, last]
        self.expire()
        if self.chance.random() < 0.5:
            while last.step() != "before batch":
                pass
            self.go_on(others)
        while self.strays:
            self.deliver_stray()
        self.expire()
        self.complete(last)
        self.go_on(others)
        self.expire()
        self.go_on(others)
        while self.strays:
            self.deliver_stray()
        self.expire()
        self.complete(last)

    def go_on(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            polls = 0
            for _ in range(60):
                reason = worker.step()
                polls += reason == "before lease_take"
                if reason == "idle" or polls == 3:
                    break
            self.check()

    def complete(self, worker: Worker) -> None:
        """It comes to the end of the stream, in a bounded number of steps, and then all is as in the plain list."""
        for _ in range(100 + 60 * len(self.positions)):
            if worker.step() == "idle":
                break
        else:
            raise AssertionError(f"{worker.name} does not come to the end of {len(self.positions)} entries")
        self.check()
        feeds, done = self.look()
        for user in USERS:
            entries = feeds[user]
            assert len(entries) == len(self.positions), f"{user} misses entries after {len(entries)}"
        assert len(done) == len(self.positions), "something was never committed"
        pending: Any = self.server.xpending(STREAM, GROUP)
        assert pending["pending"] == 0, "something was never acknowledged"

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
