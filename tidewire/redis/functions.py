"""The Lua functions of lua/*.lua, each behind one typed method.

The client library repeats a call whose answer was lost. Each function then gives the same answer again, or recognizes
the repeat. If a node does not know the library, the call loads it and is repeated.
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
from tidewire.model.records import Id, Position, id_text, stream_id
from tidewire.redis.keys import Home

PARTS = ("base", "generation", "lease", "stream", "link", "feed", "page", "service", "credential")
"""Files of lua/ in the order in which they are joined: Lua knows a local function only below its definition."""

_TEXT = "\n".join(files("tidewire.redis.lua").joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in PARTS)
VERSION = hashlib.sha1(_TEXT.encode(), usedforsecurity=False).hexdigest()[:8]
"""Part of the names of library and functions. A server refuses a second library with a function of the same name."""
LIBRARY = f"tidewire_{VERSION}"
SOURCE = f"#!lua name={LIBRARY}\n" + _TEXT.replace("@VERSION@", VERSION)

log = structlog.get_logger(__name__)

LOADED = Counter("tidewire_functions_loaded_total", "Times that a node was given the function library.")

Arg = bytes | str | int


def versioned(function: str) -> str:
    """Return the name under which the server knows a function of this release."""
    return f"{function}_{VERSION}"


class Calls(Protocol):
    """The two methods of a Redis client that `Functions` needs. Tests interleave calls here."""

    def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Call a function."""

    def function_load(self, code: str, replace: bool = False) -> Any:
        """Load a library."""


class Fence(NamedTuple):
    """The proof of ownership: the lease's epoch, and the partition's generation when it was taken."""

    epoch: int
    generation: int


class Owned(NamedTuple):
    """The keys of a partition that a worker owns for its group, and the fence."""

    lease: bytes
    home: Home
    stream: bytes
    group: str
    fence: Fence
    losses: tuple[int, ...] = ()
    """Where the changes ended at each loss of the server: the generation after it, ms, seq, and so on."""

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The first keys of every fenced function."""
        return self.home.partition, self.home.changes, self.lease


class Batch(NamedTuple):
    """Entries of a stream that a group has not acknowledged, the oldest first."""

    now: int
    """The server's time, in ms since 1970."""
    last: Id
    """Id of the stream's last entry."""
    entries: list[tuple[Id, dict[bytes, bytes]]]
    at_end: bool = False
    """Whether the stream had no further entries when it was asked for more."""


class RedisCommand(NamedTuple):
    """One Redis command of a commit. It has fewer than 8,000 arguments, the limit of Lua's unpack."""

    command: str
    key: bytes
    args: tuple[Arg, ...]


class Wait(NamedTuple):
    """A confirmation to wait for on the connection that wrote: WAIT or WAITAOF, and how many must confirm."""

    command: tuple[Arg, ...]
    needed: int


Confirmed = Callable[[tuple[Arg, ...], Wait], Awaitable[tuple[Any, int]]]
"""Makes a call, and waits on the same connection: (the call's answer, or its error; how many confirmed)."""


CALL_KEPT_MS = 120_000
"""How long, in ms, a sender's last `enqueue` is remembered: longer than the client library repeats it."""
WHOLE = 1 << 52
"""A number above that of any feed."""

LARGE_BODY_BYTES = 1024
"""Size above which a body may be stored once in its partition, with entries that refer to it."""

STRIDES = {"STAMP": 3, "LOSS": 3, "EFFECT": 5, "COMMAND": 3, "UNIT": 5, "APPEND": 5, "BODY": 2}
"""Arguments of each record of a call, by the constants NAME_FIELDS of the Lua files. `_record` checks them."""


def _record(name: str, *fields: Arg) -> tuple[Arg, ...]:
    """The arguments of one record, as many as the Lua function reads."""
    assert len(fields) == STRIDES[name], f"{name} has {STRIDES[name]} fields"
    return fields


def feed_number(feed: bytes) -> int:
    """Return the number that orders feeds within one unit. The same as `feed_number` in lua/link.lua."""
    return int(hashlib.sha1(feed, usedforsecurity=False).hexdigest()[:13], 16)


class Append(NamedTuple):
    """An entry for feeds of one destination partition."""

    position: Position
    body: bytes
    """The body, or a reference to it as `reference` makes it."""
    size_bytes: int
    """Size of the body itself, even if it is referred to."""
    feeds: Sequence[bytes]


class Unit(NamedTuple):
    """Appends that a feed gets together: those of one change, or of all changes of a transaction.

    A unit may be spread over several calls, in the order of the feeds' numbers. Each call has the appends to feeds up
    to `upto`; the last one has WHOLE. A new owner may find other readers when it decides the unit again. Each feed
    still gets it once.
    """

    position: Position
    """Position of its last change."""
    appends: Sequence[Append]
    upto: int = WHOLE


def body_id(position: Position, body: bytes) -> bytes:
    """Return the id of a body that is stored once: a digest, so that storing it twice does no harm."""
    digest = hashlib.sha1(str(position).encode() + body, usedforsecurity=False)
    return digest.hexdigest()[:20].encode()


def reference(id_: bytes) -> bytes:
    """Return the reference that an entry has instead of its body."""
    return b"@" + id_


def referred(body: bytes) -> bytes | None:
    """Return the id of the body that an entry refers to, or None if the entry has the body itself."""
    return body[1:] if body[:1] == b"@" else None


class FeedBounds(NamedTuple):
    """Maximum entries and bytes of a feed, about."""

    entries: int
    bytes: int


class Stamp(NamedTuple):
    """The announcement of a source's new owner at a destination."""

    source: str
    epoch: int
    losses: tuple[int, ...] = ()
    """As in `Owned`."""


class StreamBounds(NamedTuple):
    """Maximum entries and bytes of a stream. Beyond them, nothing is added."""

    entries: int
    bytes: int


class NumberedCall(NamedTuple):
    """The identity of an `enqueue`, by which a repeat is recognized: a key of the sender, and a growing number."""

    sent: bytes
    number: int


class Effect(NamedTuple):
    """Commands in another partition that follow from a change. The destination does them once."""

    position: Position
    number: int
    """Number of the effect within the change, from 1."""
    operations: tuple[RedisCommand, ...]


class Beat(NamedTuple):
    """The answer to a heartbeat."""

    swept: bool
    now: int
    """The server's time, in ms since 1970."""
    server: bytes
    """Its replication id, which changes with a restart or a failover; empty without INFO."""
    services: dict[str, tuple[int, bytes]]
    """Expiry in ms and information of each registered process, dead ones included."""


class Functions:
    """The calls. A fenced one raises `Fenced` if the caller has lost the partition. All raise redis-py's errors."""

    def __init__(self, redis: Calls, confirmed: Confirmed | None = None) -> None:
        self._redis = redis
        self._confirmed = confirmed

    async def load(self) -> None:
        """Load the library at every master."""
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
            log.warning("functions_loaded", library=LIBRARY)  # a new node, or one that has lost its library
            await self.load()
            return await fcall(name, len(keys), *keys, *args)
        except ResponseError as error:
            if "FENCED" in str(error):
                raise Fenced(f"{name}: this caller no longer owns the partition") from None
            raise

    # ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def credential_revoke(
        self, credentials: bytes, revocations: bytes, id_: str, record: bytes, max_entries: int
    ) -> None:
        """Store the record of a revoked credential, and announce the revocation. Also done at maxmemory."""
        await self._call("credential_revoke", (credentials, revocations), id_, record, max_entries)

    # ── leases ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def lease_take(
        self, lease: bytes, home: Home, stream: bytes, group: str, owner: str, length_ms: int
    ) -> Owned | None:
        """Take a lease, with a new epoch. None while another worker holds it."""
        keys = (home.partition, home.changes, lease)
        epoch, generation, _, _, losses = await self._call("lease_take", keys, owner, length_ms)
        if not int(epoch):
            return None
        return Owned(lease, home, stream, group, Fence(int(epoch), int(generation)), tuple(map(int, losses.split())))

    async def lease_renew(self, owned: Owned, length_ms: int) -> None:
        """Renew a lease."""
        await self._call("lease_renew", owned.keys, *owned.fence, length_ms)

    async def lease_release(self, owned: Owned) -> None:
        """Release a lease, so that any worker may take the partition."""
        await self._call("lease_release", owned.keys, *owned.fence)

    # ── the partition's stream ──────────────────────────────────────────────────────────────────────────────────────

    async def batch(self, owned: Owned, count: int, size_bytes: int, after: Id = (0, 0)) -> Batch:
        """Read entries after an id: first those pending for the group, then new ones.

        Reading ends at `count` entries, or once they have `size_bytes`. A repeated call returns the same entries: those
        that it had read as new are pending by then.
        """
        keys, start = (*owned.keys, owned.stream), id_text(after)
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
        """Do all commands and the acknowledgement, once for each call number, and read the next batch after an id.

        Returns:
            Whether `wait` was confirmed in time, and the batch. Without confirmation, the commit is done nevertheless.
        """
        ids = [id_text(id_) for id_ in acknowledged]
        keys = [*owned.keys, owned.stream]
        index: dict[bytes, int] = {key: i for i, key in enumerate(keys, 1)}
        start = id_text(after)
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

        batch = _batch(await self._call("commit", keys, *args, fcall=fcall))
        return confirmed >= wait.needed, batch

    async def enqueue(self, stream: bytes, call: NumberedCall, bounds: StreamBounds, records: Sequence[bytes]) -> int:
        """Add records as far as there is room, and return how many. A repeated call returns the answer of the first."""
        args: tuple[Arg, ...] = (call.number, *bounds, CALL_KEPT_MS, *records)
        return int(await self._call("enqueue", (stream, call.sent), *args))

    async def ensure_group(self, stream: bytes, group: str) -> None:
        """Create a consumer group, from the stream's beginning, unless it exists."""
        await self._call("ensure_group", (stream,), group)

    async def answer(self, stream: bytes, bounds: StreamBounds, ttl_ms: int, record: bytes) -> None:
        """Add an answer, and drop the oldest ones beyond the bounds. A repeated call adds it twice."""
        await self._call("answer", (stream,), *bounds, ttl_ms, record)

    # ── links ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def link_stamp(self, to: Home, stamps: Sequence[Stamp]) -> list[bool]:
        """Announce new owners of sources at a destination, before they read. False for each that is fenced."""
        args: list[Arg] = []
        for stamp in stamps:
            args += (*_record("STAMP", stamp.source, stamp.epoch, len(stamp.losses)), *stamp.losses)
        return [answer == b"OK" for answer in await self._call("link_stamp", to, *args)]

    async def body_put(self, to: Home, ttl_ms: int, bodies: Iterable[tuple[bytes, bytes]]) -> None:
        """Store bodies by id, before the entries that refer to them, for at most `ttl_ms`."""
        args = [part for body in bodies for part in _record("BODY", *body)]
        await self._call("body_put", to, ttl_ms, *args)

    async def body_get(self, home: Home, ids: Sequence[bytes]) -> list[bytes | None]:
        """Read bodies by id. None for each that is gone."""
        return [body or None for body in await self._call("body_get", home, *ids)]

    async def link_append(self, to: Home, source: str, epoch: int, bounds: FeedBounds, units: Iterable[Unit]) -> int:
        """Append units to those feeds that are open and have not had them, and return how many entries that was."""
        keys, index = list(to), dict[int, int]()
        args: list[Arg] = [source, epoch, *bounds]
        for unit in units:
            args += _record("UNIT", *unit.position[1:], unit.upto, len(unit.appends))
            for append in unit.appends:
                # Changes of a transaction mostly go to the same feeds. The decision keeps these in one list, which is
                # sent once.
                start = index.setdefault(id(append.feeds), len(keys) - len(to) + 1)
                if start > len(keys) - len(to):
                    keys += append.feeds
                args += _record(
                    "APPEND", str(append.position), append.body, append.size_bytes, start, len(append.feeds)
                )
        return int(await self._call("link_append", keys, *args))

    async def link_reset(self, to: Home, source: str, epoch: int, position: Position) -> None:
        """Reset all feeds of a destination, because changes of the source before a position were not delivered."""
        await self._call("link_reset", to, source, epoch, *position[1:])

    async def link_apply(self, to: Home, source: str, epoch: int, effects: Iterable[Effect]) -> None:
        """Do the effects in another partition that have not been applied there."""
        keys: list[bytes] = list(to)
        index = {key: at for at, key in enumerate(keys, 1)}
        args: list[Arg] = [source, epoch]
        for effect in effects:
            operations: list[Arg] = []
            _declare(effect.operations, keys, index, operations)
            args += [*_record("EFFECT", *effect.position[1:], effect.number, len(operations)), *operations]
        await self._call("link_apply", keys, *args)

    # ── feeds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def feed_open(self, home: Home, feed: bytes, window_ms: int) -> FeedState:
        """Open a feed, or extend the time for which it is open."""
        epoch, seq, tag = await self._call("feed_open", (*home, feed), window_ms)
        return FeedState(epoch.decode(), int(seq), tag.decode())

    async def feed_read(
        self, home: Home, feed: bytes, after: int, count: int, size_bytes: int
    ) -> tuple[FeedState, list[FeedEntry]]:
        """Read a feed's state and its entries after a seq, at one moment. A closed feed has the epoch ''.

        Reading ends at `count` entries, or when their bodies would exceed `size_bytes`.
        """
        epoch, seq, tag, raw = await self._call("feed_read", (*home, feed), after, count, size_bytes)
        return FeedState(epoch.decode(), int(seq), tag.decode()), [_entry(id_, fields) for id_, fields in raw]

    async def feeds_sweep(self, home: Home) -> None:
        """Remove the states of closed feeds, and expired bodies."""
        cursors = [b"0", b"0"]
        while any(cursors):
            cursors = await self._call("feeds_sweep", home, *cursors)

    # ── the store's reads ───────────────────────────────────────────────────────────────────────────────────────────

    async def page(
        self, order: bytes, items: bytes, low: bytes, high: bytes, *, reverse: bool, count: int, size_bytes: int
    ) -> tuple[list[tuple[bytes, bytes]], bool]:
        """Return (sort bytes, record) between two ZRANGEBYLEX bounds, at most `count`, and whether `size_bytes`
        ended it."""
        cut, *flat = await self._call("page", (order, items), low, high, int(reverse), count, size_bytes)
        return list(zip(flat[::2], flat[1::2], strict=True)), bool(cut)

    # ── live services ───────────────────────────────────────────────────────────────────────────────────────────────

    async def service_beat(
        self, services: bytes, swept: bytes, service: str, length_ms: int, information: bytes
    ) -> Beat:
        """Renew a registration, unless the gateway was swept, and list all."""
        raw = await self._call("service_beat", (services, swept), service, length_ms, information)
        marked, now, server, *flat = raw
        services_by_id = {id_.decode(): split_beat(value) for id_, value in zip(flat[::2], flat[1::2], strict=True)}
        return Beat(bool(marked), int(now), server, services_by_id)

    async def service_sweep(self, services: bytes, swept: bytes, service: str, kept_ms: int) -> bool:
        """Mark a gateway as swept, before its connections are removed. False if its registration is valid again."""
        return bool(await self._call("service_sweep", (services, swept), service, kept_ms))

    async def service_forget(self, services: bytes, service: str) -> None:
        """Remove an expired registration, unless it is valid again."""
        await self._call("service_forget", (services,), service)


def _declare(operations: Iterable[RedisCommand], keys: list[bytes], index: dict[bytes, int], args: list[Arg]) -> None:
    """Add commands to a call's arguments, and their keys to its keys."""
    for operation in operations:
        at = index.setdefault(operation.key, len(keys) + 1)
        if at > len(keys):
            keys.append(operation.key)
        args += _record("COMMAND", len(operation.args), operation.command, at)
        args += operation.args


def split_beat(value: bytes | str) -> tuple[int, bytes]:
    """Split a registration into its expiry in ms and its information."""
    value = value.encode() if isinstance(value, str) else value
    expiry, _, information = value.partition(b" ")
    return int(expiry), information


def _batch(raw: Any) -> Batch:
    now, last, entries = raw
    return Batch(int(now), stream_id(last), [(stream_id(id_), _fields(fields)) for id_, fields in entries])


def _fields(raw: Any) -> dict[bytes, bytes]:
    """Return an entry's fields, or {} if it was trimmed while it was pending."""
    return dict(zip(raw[::2], raw[1::2], strict=True)) if raw else {}


def _entry(id_: bytes, fields: list[bytes]) -> FeedEntry:
    return entry_of(id_, fields[1])
