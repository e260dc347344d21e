"""Groups appends into function calls, one partition each, bounded in appends and bytes. No I/O."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import NamedTuple

from tidewire.model.records import Position
from tidewire.redis.functions import LARGE_BODY_BYTES, WHOLE, Append, Unit, body_id, feed_number, reference
from tidewire.redis.keys import Home, Keys

MAX_CALL_APPENDS = 500
MAX_CALL_BYTES = 1 << 18
"""Maximum appends of one call, and maximum bytes that they write.

A feed gets all of a transaction in one call, even if that exceeds them.
"""
MAX_COPIED_BYTES = 65536
"""Maximum bytes of all copies of one body in a partition. A larger body is stored once, and entries refer to it."""
MAX_FEEDS_CACHED = 200_000
"""Maximum destinations that a process caches. At this number the whole cache is dropped."""
STEP_FEEDS = 1000
"""Destinations that one step handles, in about 1 ms. Other work of the process gets its turn between two steps."""


class Destination:
    """The feed of a user or a topic. Each has one object, which is compared by identity."""

    __slots__ = ("is_topic", "key", "name", "partition")

    def __init__(self, name: str, *, is_topic: bool, partition: int, key: bytes) -> None:
        self.name = name
        self.is_topic = is_topic
        self.partition = partition
        self.key = key

    def __repr__(self) -> str:
        return f"<{'topic' if self.is_topic else 'user'} {self.name}>"


class Destinations:
    """A cache of destinations. To make a key costs more than to look it up."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._users: dict[str, Destination] = {}
        self._topics: dict[str, Destination] = {}

    def __len__(self) -> int:
        return len(self._users) + len(self._topics)

    def user(self, name: str) -> Destination:
        return self._users.get(name) or self._new(self._users, name, self._keys.user_feed(name), is_topic=False)

    def topic(self, name: str) -> Destination:
        return self._topics.get(name) or self._new(self._topics, name, self._keys.topic_feed(name), is_topic=True)

    def _new(self, known: dict[str, Destination], name: str, key: bytes, *, is_topic: bool) -> Destination:
        feed = known[name] = Destination(name, is_topic=is_topic, partition=self._keys.partition_of(name), key=key)
        return feed


class DestinationCache:
    """The destinations that a process has met, bounded in number."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._feeds = Destinations(keys)

    def begin(self) -> Destinations:
        """Return the cache for one batch.

        A full cache is replaced as a whole. Batches of other partitions keep the old one, because within a batch each
        feed must be one object.
        """
        if len(self._feeds) > MAX_FEEDS_CACHED:
            self._feeds = Destinations(self._keys)
        return self._feeds


class StoreBodies(NamedTuple):
    """A call that stores bodies, to which appends of later calls to the same partition refer."""

    bodies: list[tuple[bytes, bytes]]  # (id, body)


class AppendUnits(NamedTuple):
    """A call that appends units."""

    units: list[Unit]

    @property
    def appends(self) -> int:
        return sum(len(append.feeds) for unit in self.units for append in unit.appends)


LinkCall = StoreBodies | AppendUnits


class DestinationCalls:
    """The calls to one partition, in their order."""

    def __init__(self) -> None:
        self._rounds: list[tuple[dict[bytes, bytes], list[Unit]]] = []  # bodies, then the units that refer to them
        self._appends = self._bytes = 0

    def add(self, unit: Unit, bodies: Mapping[bytes, bytes]) -> None:
        """Add a unit to the last call, or to a new one if the last would exceed its bounds."""
        appends = sum(len(append.feeds) for append in unit.appends)
        size_bytes = sum(len(append.feeds) * len(append.body) for append in unit.appends)
        self._appends += appends
        self._bytes += size_bytes
        if not self._rounds or self._appends > MAX_CALL_APPENDS or self._bytes > MAX_CALL_BYTES:
            self._rounds.append(({}, []))
            self._appends, self._bytes = appends, size_bytes
        known, units = self._rounds[-1]
        known |= bodies
        units.append(unit)

    def all(self) -> list[LinkCall]:
        found: list[LinkCall] = []
        for bodies, units in self._rounds:
            found += _stored(bodies)
            found.append(AppendUnits(units))
        return found


def _stored(bodies: Mapping[bytes, bytes]) -> Iterable[StoreBodies]:
    some: list[tuple[bytes, bytes]] = []
    size_bytes = 0
    for id_, body in bodies.items():
        if some and size_bytes + len(body) > MAX_CALL_BYTES:
            yield StoreBodies(some)
            some, size_bytes = [], 0
        some.append((id_, body))
        size_bytes += len(body)
    if some:
        yield StoreBodies(some)


class Router:
    """Collects the appends of a batch, by destination partition."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._calls: dict[int, DestinationCalls] = {}
        self.appends = 0
        self.size_bytes = 0
        """Bytes that the appends write, including bodies that are stored once."""

    def links(self) -> dict[Home, list[LinkCall]]:
        return {self._keys.home(partition): calls.all() for partition, calls in self._calls.items()}

    def add(self, position: Position, appends: Mapping[int, list[Append]]) -> Generator[None, None, None]:
        """Add a unit whose last change has `position`. Appends, by partition, are in the order of changes."""
        for partition, some in appends.items():
            shortened, bodies = refer(some)
            self.appends += sum(len(append.feeds) for append in shortened)
            self.size_bytes += sum(len(append.feeds) * len(append.body) for append in shortened)
            self.size_bytes += sum(map(len, bodies.values()))
            calls = self._calls.setdefault(partition, DestinationCalls())
            for unit in split(position, shortened):
                calls.add(unit, bodies)
                yield


def refer(appends: list[Append]) -> tuple[list[Append], dict[bytes, bytes]]:
    """Replace bodies whose copies would take too much by references. Returns the appends, and those bodies by id."""
    # The more changes a transaction has, the less each may take, because a feed gets all of them in one call.
    max_bytes = MAX_COPIED_BYTES // (1 + len(appends) // 16)
    found: list[Append] = []
    bodies: dict[bytes, bytes] = {}
    for append in appends:
        if append.size_bytes > LARGE_BODY_BYTES and append.size_bytes * len(append.feeds) > max_bytes:
            id_ = body_id(append.position, append.body)
            bodies[id_] = append.body
            append = append._replace(body=reference(id_))  # noqa: PLW2901 - the same append, shortened
        found.append(append)
    return found, bodies


def split(position: Position, appends: list[Append]) -> Iterable[Unit]:
    """Cut a unit into pieces of bounded size, by the numbers of the feeds. All appends to a feed are in one piece."""
    total = sum(len(append.feeds) for append in appends)
    total_bytes = sum(len(append.feeds) * len(append.body) for append in appends)
    if total <= MAX_CALL_APPENDS and total_bytes <= MAX_CALL_BYTES:
        yield Unit(position, appends)
        return
    costs: dict[bytes, list[int]] = {}  # by feed: appends, and their bytes
    for append in appends:
        for feed in append.feeds:
            cost = costs.setdefault(feed, [0, 0])
            cost[0] += 1
            cost[1] += len(append.body)
    numbers = sorted((feed_number(feed), feed) for feed in costs)
    some: set[bytes] = set()
    count = size_bytes = 0
    previous = -1
    for number, feed in numbers:
        more, more_bytes = costs[feed]
        is_full = count + more > MAX_CALL_APPENDS or size_bytes + more_bytes > MAX_CALL_BYTES
        if some and is_full and number != previous:  # feeds with equal numbers stay together
            yield Unit(position, _for(some, appends), previous)
            some, count, size_bytes = set(), 0, 0
        some.add(feed)
        count += more
        size_bytes += more_bytes
        previous = number
    yield Unit(position, _for(some, appends), WHOLE)


def _for(feeds: set[bytes], appends: list[Append]) -> list[Append]:
    """Return the appends to these feeds. Equal lists of feeds are one object, which a call carries once."""
    lists: dict[tuple[bytes, ...], list[bytes]] = {}
    found = []
    for append in appends:
        if some := tuple(feed for feed in append.feeds if feed in feeds):
            found.append(append._replace(feeds=lists.setdefault(some, list(some))))
    return found
