"""The Lua functions of lua/*.lua, each behind one typed method, and what it takes to call them safely.

A call may be repeated by the client library after it was done (a reply lost to a time-out): each function gives the
same answer again, or recognises the repeat. A node that does not know the library gets it, and the call is repeated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

import structlog
from prometheus_client import Counter
from redis.exceptions import ResponseError

from tidewire.errors import Fenced
from tidewire.model.feeds import FeedEntry, FeedState, entry_of
from tidewire.model.records import Id, Position, stream_id
from tidewire.redis.keys import Home

PARTS = ("base", "generation", "lease", "stream", "link", "feed", "page", "service")
"""Files of lua/ in the order in which they are joined: a local function is known from its own line on."""

_TEXT = "\n".join(files("tidewire.redis.lua").joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in PARTS)
VERSION = hashlib.sha1(_TEXT.encode(), usedforsecurity=False).hexdigest()[:8]
"""In the names of library and functions: a server refuses a second library that has a function of the same name."""
LIBRARY = f"tidewire_{VERSION}"
SOURCE = f"#!lua name={LIBRARY}\n" + _TEXT.replace("@VERSION@", VERSION)

log = structlog.get_logger(__name__)

LOADED = Counter("tidewire_functions_loaded_total", "Times that a node had to be given the function library.")

Arg = bytes | str | int


def versioned(function: str) -> str:
    """The name under which the server knows a function of this release."""
    return f"{function}_{VERSION}"


class Calls(Protocol):
    """What is needed of a Redis client. Tests put themselves between the steps here."""

    def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any: ...

    def function_load(self, code: str, replace: bool = False) -> Any: ...


class Fence(NamedTuple):
    """What proves ownership: the lease's epoch, and the partition's generation at that time."""

    epoch: int
    generation: int


class Owned(NamedTuple):
    """The keys of a partition that a worker owns for its group, and the fence."""

    lease: bytes
    home: Home
    stream: bytes
    group: str
    fence: Fence
    fell: tuple[int, ...] = ()
    """What was left of the changes at each fall back of the server: generation after it, ms, seq, …"""

    @property
    def keys(self) -> tuple[bytes, ...]:
        return self.home.partition, self.home.changes, self.lease


class Batch(NamedTuple):
    """Entries of a stream that are pending for a group, the oldest first."""

    now: int  # ms since 1970, the server's
    last: Id  # id of the stream's last entry
    entries: list[tuple[Id, dict[bytes, bytes]]]
    at_end: bool = False
    """Whether the stream had no entry after these when it was asked for more."""


class RedisCommand(NamedTuple):
    """One Redis command of a commit: its key is declared, its arguments are few (unpack holds about 8,000)."""

    command: str
    key: bytes
    args: tuple[Arg, ...]


class Wait(NamedTuple):
    """What a commit waits for on the connection that wrote: WAIT or WAITAOF, and how many must have confirmed."""

    command: tuple[Arg, ...]
    needed: int


Confirmed = Callable[[tuple[Arg, ...], Wait], Awaitable[tuple[Any, int]]]
"""Makes a call, then waits on the same connection: (the call's answer, how many confirmed). An error is an answer."""


CALL_KEPT_MS = 120_000
"""How long a sender's last `enqueue` is remembered: longer than the client library repeats it."""
WHOLE = 1 << 52
"""Greater than the number of any feed."""

LARGE_BODY_BYTES = 1024
"""A body above this size may be stored once in its destination, with entries that refer to it."""


def feed_number(feed: bytes) -> int:
    """The number that orders feeds within one effect. The same as `feed_number` in lua/link.lua."""
    return int(hashlib.sha1(feed, usedforsecurity=False).hexdigest()[:13], 16)


class Append(NamedTuple):
    """An entry on its way into feeds of one destination partition."""

    position: Position
    body: bytes  # or a reference to one, as `reference` makes it
    size_bytes: int  # of the body, also where it is referred to
    feeds: Sequence[bytes]


class Unit(NamedTuple):
    """Appends that a feed gets together: of one change, or of all changes of a transaction.

    A unit may be spread over several calls, in the order of the feeds' numbers: each call has all for the feeds up to
    `upto`, the last one is WHOLE. So a unit that is decided again, and may then find other readers, goes to each once.
    """

    position: Position  # of its last change
    appends: Sequence[Append]
    upto: int = WHOLE


def body_id(position: Position, body: bytes) -> bytes:
    """The id of a body that is stored once in a destination: a digest, so that storing it twice does no harm."""
    digest = hashlib.sha1(str(position).encode() + body, usedforsecurity=False)
    return digest.hexdigest()[:20].encode()


def reference(id_: bytes) -> bytes:
    """What an entry has in the place of its body."""
    return b"@" + id_


def referred(body: bytes) -> bytes | None:
    """The id of the body that an entry refers to; None where the entry has its body."""
    return body[1:] if body[:1] == b"@" else None


class FeedBounds(NamedTuple):
    """What a feed keeps at most, about."""

    entries: int
    bytes: int


class Stamp(NamedTuple):
    """A new owner of a source, as it announces itself to destinations."""

    source: str
    epoch: int
    fell: tuple[int, ...] = ()  # as in Owned


class StreamBounds(NamedTuple):
    """The most that a stream holds before nothing more is added."""

    entries: int
    bytes: int


class Call(NamedTuple):
    """What makes a repeated `enqueue` known: the sender's key in the stream's slot, and a number above all before."""

    sent: bytes
    number: int


class Effect(NamedTuple):
    """What one change does in another partition, where it is taken once."""

    position: Position
    number: int  # of the effect within the change, from 1 on
    operations: tuple[RedisCommand, ...]


class Beat(NamedTuple):
    """The answer to a service's beat."""

    swept: bool
    now: int  # ms since 1970, the server's
    server: bytes  # its replication id, which changes when it restarts or fails over; empty where there is no INFO
    services: dict[str, tuple[int, bytes]]  # expiry in ms and information, of dead ones too


class Functions:
    """The calls. Each raises `Fenced` where the fence refuses it, and redis-py's errors otherwise."""

    def __init__(self, redis: Calls, confirmed: Confirmed | None = None) -> None:
        self._redis = redis
        self._confirmed = confirmed

    async def load(self) -> None:
        await self._redis.function_load(SOURCE, replace=True)

    async def _call(self, name: str, keys: Sequence[bytes], *args: Arg, fcall: Any = None) -> Any:
        fcall, name = fcall or self._redis.fcall, versioned(name)
        try:
            try:
                return await fcall(name, len(keys), *keys, *args)
            except ResponseError as error:
                if "function not found" not in str(error).lower():
                    raise
            LOADED.inc()
            log.warning("functions_loaded", library=LIBRARY)  # a node that was added, or has lost what it had
            await self.load()
            return await fcall(name, len(keys), *keys, *args)
        except ResponseError as error:
            if "FENCED" in str(error):
                raise Fenced(f"{name}: another worker owns this partition") from None
            raise

    # ── leases ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def lease_take(
        self, lease: bytes, home: Home, stream: bytes, group: str, owner: str, length_ms: int
    ) -> Owned | None:
        """Take the lease, with a new epoch; None while another holds it."""
        keys = (home.partition, home.changes, lease)
        epoch, generation, _, _, fell = await self._call("lease_take", keys, owner, length_ms)
        if not int(epoch):
            return None
        return Owned(lease, home, stream, group, Fence(int(epoch), int(generation)), tuple(map(int, fell.split())))

    async def lease_renew(self, owned: Owned, length_ms: int) -> None:
        await self._call("lease_renew", owned.keys, *owned.fence, length_ms)

    async def lease_release(self, owned: Owned) -> None:
        await self._call("lease_release", owned.keys, *owned.fence)

    # ── the partition's stream ──────────────────────────────────────────────────────────────────────────────────────

    async def batch(self, owned: Owned, count: int, size_bytes: int, after: Id = (0, 0)) -> Batch:
        """What is pending for the group after an id, then what is new. A repeated call gives the same entries.

        At most `count` entries, and no more of them once they have `size_bytes`.
        """
        keys, start = (*owned.keys, owned.stream), f"{after[0]}-{after[1]}"
        return _batch(await self._call("batch", keys, *owned.fence, owned.group, start, count, size_bytes))

    async def commit(
        self,
        owned: Owned,
        number: int,
        acknowledged: Iterable[tuple[int, int]],
        operations: Iterable[RedisCommand],
        wait: Wait | None = None,
        *,
        count: int,
        size_bytes: int,
        after: Id = (0, 0),
    ) -> tuple[bool, Batch]:
        """All operations and the acknowledgement, once for each call number; and what comes next, as `batch` gives it.

        With `after`, what comes after that id: the caller has the entries up to it. False with it when all is done, but
        what was to be waited for has not confirmed it in time.
        """
        ids = [f"{ms}-{seq}" for ms, seq in acknowledged]
        keys = [*owned.keys, owned.stream]
        index: dict[bytes, int] = {key: i for i, key in enumerate(keys, 1)}
        start = f"{after[0]}-{after[1]}"
        args: list[Arg] = [*owned.fence, owned.group, start, count, size_bytes, number, len(ids), *ids]
        _declare(operations, keys, index, args)
        if wait is None:
            return True, _batch(await self._call("commit", keys, *args))
        assert self._confirmed, "only a real server has WAIT"
        confirmed = 0

        async def fcall(name: str, numkeys: int, *given: Arg) -> Any:
            nonlocal confirmed
            assert self._confirmed
            answer, confirmed = await self._confirmed(("FCALL", name, numkeys, *given), wait)
            if isinstance(answer, Exception):
                raise answer
            return answer

        found = _batch(await self._call("commit", keys, *args, fcall=fcall))
        return confirmed >= wait.needed, found

    async def enqueue(self, stream: bytes, call: Call, bounds: StreamBounds, records: Sequence[bytes]) -> int:
        """Add records as far as there is room; how many were added. A repeated call gives the first one's answer."""
        args: tuple[Arg, ...] = (call.number, *bounds, CALL_KEPT_MS, *records)
        return int(await self._call("enqueue", (stream, call.sent), *args))

    async def ensure_group(self, stream: bytes, group: str) -> None:
        """Create the consumer group, from the stream's beginning, unless it is there."""
        await self._call("ensure_group", (stream,), group)

    async def answer(self, stream: bytes, bounds: StreamBounds, ttl_ms: int, record: bytes) -> None:
        """Add an answer, dropping the oldest beyond the bounds. Repeating it adds it twice."""
        await self._call("answer", (stream,), *bounds, ttl_ms, record)

    # ── links ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def link_stamp(self, to: Home, stamps: Sequence[Stamp]) -> list[bool]:
        """Announce new owners of sources at a destination, before their first read. False for each that is fenced."""
        args: list[Arg] = []
        for stamp in stamps:
            args += (stamp.source, stamp.epoch, len(stamp.fell), *stamp.fell)
        return [answer == b"OK" for answer in await self._call("link_stamp", to, *args)]

    async def body_put(self, to: Home, ttl_ms: int, bodies: Iterable[tuple[bytes, bytes]]) -> None:
        """Store bodies that entries refer to, by id, for that long at most."""
        args = [part for body in bodies for part in body]
        await self._call("body_put", to, ttl_ms, *args)

    async def body_get(self, home: Home, ids: Sequence[bytes]) -> list[bytes | None]:
        """The bodies of these ids; None for each that is gone."""
        return [body or None for body in await self._call("body_get", home, *ids)]

    async def link_append(self, to: Home, source: str, epoch: int, most: FeedBounds, units: Iterable[Unit]) -> int:
        """Append to the open ones of the feeds what they have not had yet; how many entries that was."""
        keys, index = list(to), dict[int, int]()
        args: list[Arg] = [source, epoch, *most]
        for unit in units:
            args += (*unit.position[1:], unit.upto, len(unit.appends))
            for append in unit.appends:
                # The changes of a transaction mostly go to the same feeds, which the decision keeps in one list.
                start = index.setdefault(id(append.feeds), len(keys) - len(to) + 1)
                if start > len(keys) - len(to):
                    keys += append.feeds
                args += (str(append.position), append.body, append.size_bytes, start, len(append.feeds))
        return int(await self._call("link_append", keys, *args))

    async def link_reset(self, to: Home, source: str, epoch: int, position: Position) -> None:
        """Let all feeds there begin anew, as changes of the source before that position were lost."""
        await self._call("link_reset", to, source, epoch, *position[1:])

    async def link_apply(self, to: Home, source: str, epoch: int, effects: Iterable[Effect]) -> None:
        """Do in another partition what has not been done there yet."""
        keys: list[bytes] = list(to)
        index = {key: at for at, key in enumerate(keys, 1)}
        args: list[Arg] = [source, epoch]
        for effect in effects:
            operations: list[Arg] = []
            _declare(effect.operations, keys, index, operations)
            args += [*effect.position[1:], effect.number, len(operations), *operations]
        await self._call("link_apply", keys, *args)

    # ── feeds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def feed_open(self, home: Home, feed: bytes, window_ms: int) -> FeedState:
        """Open the feed, or keep it open, for that long."""
        epoch, seq, tag = await self._call("feed_open", (*home, feed), window_ms)
        return FeedState(epoch.decode(), int(seq), tag.decode())

    async def feed_read(
        self, home: Home, feed: bytes, after: int, count: int, size_bytes: int
    ) -> tuple[FeedState, list[FeedEntry]]:
        """The feed's state and, of the same moment, its entries after a seq. A closed feed has the epoch ''.

        Fewer entries than `count`, though there are more, when their bodies would have more than `size_bytes`.
        """
        epoch, seq, tag, raw = await self._call("feed_read", (*home, feed), after, count, size_bytes)
        return FeedState(epoch.decode(), int(seq), tag.decode()), [_entry(id_, fields) for id_, fields in raw]

    async def feeds_sweep(self, home: Home) -> None:
        """Forget feeds that have closed, and bodies whose time is over."""
        places = [b"0", b"0"]
        while any(places):
            places = await self._call("feeds_sweep", home, *places)

    # ── the store's reads ───────────────────────────────────────────────────────────────────────────────────────────

    async def page(
        self, order: bytes, items: bytes, low: bytes, high: bytes, *, reverse: bool, count: int, size_bytes: int
    ) -> tuple[list[tuple[bytes, bytes]], bool]:
        """(sort bytes, record) between two ZRANGEBYLEX bounds, at most `count`; whether `size_bytes` cut it."""
        cut, *flat = await self._call("page", (order, items), low, high, int(reverse), count, size_bytes)
        return list(zip(flat[::2], flat[1::2], strict=True)), bool(cut)

    # ── live services ───────────────────────────────────────────────────────────────────────────────────────────────

    async def service_beat(
        self, services: bytes, swept: bytes, service: str, length_ms: int, information: bytes
    ) -> Beat:
        """Renew a service's word, unless it was swept, and list all services."""
        raw = await self._call("service_beat", (services, swept), service, length_ms, information)
        marked, now, server, *flat = raw
        words = {id_.decode(): split_beat(word) for id_, word in zip(flat[::2], flat[1::2], strict=True)}
        return Beat(bool(marked), int(now), server, words)

    async def service_sweep(self, services: bytes, swept: bytes, service: str, kept_ms: int) -> bool:
        """Mark a gateway as swept, before its connections are removed; False when its word is valid again."""
        return bool(await self._call("service_sweep", (services, swept), service, kept_ms))

    async def service_forget(self, services: bytes, service: str) -> None:
        """Take a service off the list, unless its word is valid again."""
        await self._call("service_forget", (services,), service)


def _declare(operations: Iterable[RedisCommand], keys: list[bytes], index: dict[bytes, int], args: list[Arg]) -> None:
    """Append operations to a call's arguments, and the keys that they add to its keys."""
    for operation in operations:
        at = index.setdefault(operation.key, len(keys) + 1)
        if at > len(keys):
            keys.append(operation.key)
        args += (len(operation.args), operation.command, at)
        args += operation.args


def split_beat(value: bytes | str) -> tuple[int, bytes]:
    value = value.encode() if isinstance(value, str) else value
    expiry, _, information = value.partition(b" ")
    return int(expiry), information


def _batch(raw: Any) -> Batch:
    now, last, entries = raw
    return Batch(int(now), stream_id(last), [(stream_id(id_), _fields(fields)) for id_, fields in entries])


def _fields(raw: Any) -> dict[bytes, bytes]:
    """An entry's fields; {} where it was trimmed while it was pending."""
    return dict(zip(raw[::2], raw[1::2], strict=True)) if raw else {}


def _entry(id_: bytes, fields: list[bytes]) -> FeedEntry:
    return entry_of(id_, fields[1])
