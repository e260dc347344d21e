"""One stage on Redis, whatever the topology.

Every key has a hash tag, and each call uses keys of one tag. So the same calls work on a single server and on a
cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, cast

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    OutOfMemoryError,
    ResponseError,
)

from tidewire.errors import ConfigurationError
from tidewire.model.records import id_text
from tidewire.redis.client import WireClient
from tidewire.redis.cluster_wire import ClusterWire
from tidewire.redis.functions import Arg, Functions, Wait
from tidewire.redis.keys import Keys
from tidewire.redis.subscriber import OnMessage, Subscriber
from tidewire.redis.wire import Wire, without_errors

log = structlog.get_logger(__name__)

BLOCK_MS = 1000
"""How long, in ms, a blocking read waits at the server.

Shorter than `wire.MAX_SILENCE_S`, after which the connection would be dropped.
"""
SCAN_BATCH = 1000
"""About how many keys a server looks at in one step of a scan."""
CONNECTING: dict[str, Any] = {"socket_connect_timeout": 2, "socket_timeout": 2, "retry": Retry(NoBackoff(), 0)}
"""Options of redis-py for connections. Wires and subscribers retry themselves."""
StreamEntry = tuple[bytes, dict[bytes, bytes]]
"""An entry of a stream: id and fields."""
StreamEntries = tuple[bytes, list[StreamEntry]]


class Waiter:
    """Waits for new entries of a stream, on a connection of its own if the backend has wires."""

    def __init__(self, backend: Backend, stream: bytes, wire: Wire | ClusterWire | None) -> None:
        self._backend = backend
        self._stream = stream
        self._wire = wire

    async def __call__(self, last: tuple[int, int]) -> None:
        """Wait until the stream has an entry after an id, at most a second."""
        after = id_text(last)
        if self._wire:
            await self._wire.calls([("XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", self._stream, after)])
        else:
            await self._backend.read({self._stream: after}, count=1)

    async def aclose(self) -> None:
        if self._wire:
            await self._wire.aclose()


class Backend:
    """One stage on Redis, as a process uses it. An async context manager.

    Commands share the wire. Each blocking read and each confirmed write has a connection of its own. `commands` is
    redis-py's client: over the wire it does rare commands, and without one, on fakeredis, all of them.
    """

    make_another: Callable[[], Backend] | None = None

    def __init__(self, client: Redis, keys: Keys, wire: Wire | ClusterWire | None = None) -> None:
        self.commands = WireClient(wire, client.connection_pool) if wire else client
        self._listening = client
        self._wire = wire
        self._idle: list[Wire | ClusterWire] = []
        self._subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()
        self._when_moved: list[Callable[[], None]] = []
        self.keys = keys
        self.functions = Functions(wire or client, self.confirmed)

    async def __aenter__(self) -> Backend:
        return self

    def another(self) -> Backend | None:
        """Return a second backend of the same stage for another thread, not connected yet; None if that is
        impossible."""
        return self.make_another() if self.make_another else None

    async def reach(self) -> None:
        """Connect; on a cluster, find its nodes."""
        await self.commands.ping()

    async def __aexit__(self, *_: object) -> None:
        for wire in (self._wire, *self._idle):
            if wire:
                await wire.aclose()
        await self._listening.aclose()

    async def calls(self, commands: Iterable[tuple[Arg, ...]]) -> list[Any]:
        """Do plain commands in one round trip. They may be done twice. Raises the first error when all are done."""
        if self._wire:
            return await self._wire.calls(commands)
        async with self.commands.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            found: list[Any] = await pipeline.execute()
            return found

    async def read(self, streams: Mapping[bytes, bytes | str], count: int | None = None) -> list[StreamEntries]:
        """Read streams with XREAD, waiting up to a second. Returns [] if there are none."""
        return await self.read_now(streams, count, BLOCK_MS)

    async def read_group(self, stream: bytes, group: str, consumer: str, count: int) -> list[StreamEntry]:
        """Read new entries for a competing consumer with XREADGROUP, waiting up to a second."""
        return await self.read_group_now(stream, group, consumer, count, BLOCK_MS)

    async def read_now(
        self, streams: Mapping[bytes, bytes | str], count: int | None, block_ms: int | None
    ) -> list[StreamEntries]:
        options = () if count is None else ("COUNT", count)
        return await self._read(("XREAD", *options), streams, block_ms)

    async def read_group_now(
        self, stream: bytes, group: str, consumer: str, count: int, block_ms: int | None
    ) -> list[StreamEntry]:
        command = ("XREADGROUP", "GROUP", group, consumer, "COUNT", count)
        found = await self._read(command, {stream: ">"}, block_ms)
        return [entry for _, entries in found for entry in entries]

    async def _read(
        self, command: tuple[Arg, ...], streams: Mapping[bytes, bytes | str], block_ms: int | None
    ) -> list[StreamEntries]:
        waiting = () if block_ms is None else ("BLOCK", block_ms)
        command = (*command, *waiting, "STREAMS", *streams, *streams.values())
        if not self._wire:
            return _streams(await self.commands.execute_command(*command))  # type: ignore[no-untyped-call]
        async with self._own_wire(self._wire) as wire:
            return _streams((await wire.calls([command]))[0])

    @contextlib.asynccontextmanager
    async def _own_wire(self, wire: Wire | ClusterWire) -> AsyncIterator[Wire | ClusterWire]:
        """Borrow a wire that no other caller uses meanwhile."""
        found = self._idle.pop() if self._idle else wire.another()
        try:
            yield found
        except asyncio.CancelledError:
            await found.aclose()  # its connection may still wait for an answer that nobody needs
            raise
        finally:
            self._idle.append(found)

    async def confirmed(self, call: tuple[Arg, ...], wait: Wait) -> tuple[Any, int]:
        """Make a call, then WAIT or WAITAOF on its connection. Returns (answer or error, how many confirmed)."""
        assert self._wire, "only a real server has WAIT"
        async with self._own_wire(self._wire) as wire:
            answer, confirmed = await wire.answers([call, wait.command], cast(bytes, call[3]))
        if isinstance(answer, Exception):
            return answer, 0
        if isinstance(confirmed, Exception):
            raise confirmed
        return answer, int(confirmed[0] if isinstance(confirmed, list) else confirmed)

    async def wait(self, command: tuple[Arg, ...], key: bytes) -> Any:
        """Do WAIT or WAITAOF alone, at the node that has a key."""
        assert self._wire, "only a real server has WAIT"
        async with self._own_wire(self._wire) as wire:
            return without_errors(await wire.answers([command], key))[0]

    def waiter(self, stream: bytes) -> Waiter:
        return Waiter(self, stream, self._wire and self._wire.another())

    def subscriber(self, on_message: OnMessage) -> Subscriber:
        """Make a subscriber, which receives messages once it runs. It has connections of its own."""
        made = Subscriber(self, on_message)
        self._subscribers.add(made)
        return made

    def when_moved(self, callback: Callable[[], None]) -> None:
        """Register a callback for changes of the masters. Writes that an old master had not replicated are lost."""
        self._when_moved.append(callback)

    def node_of(self, channel: bytes) -> Redis:
        return self._listening

    async def find_node_of(self, channel: bytes) -> Redis:
        return self.node_of(channel)

    async def address_of(self, key: bytes) -> str:
        """Return host:port of the node that has a key, as known here, or the path of its socket."""
        where: dict[str, Any] = self.node_of(key).connection_pool.connection_kwargs
        return str(where["path"]) if "path" in where else f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"

    async def now_ms(self) -> int:
        """Return the server's time in ms since 1970; on a cluster, that of any node."""
        seconds, microseconds = await self.commands.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def scan(self, pattern: bytes) -> AsyncIterator[bytes]:
        """Yield all keys that match a pattern, in no order. One that moves meanwhile may come twice, or not at all."""
        async for key in self.commands.scan_iter(pattern, count=SCAN_BATCH):
            yield key

    async def ensure_group(self, stream: bytes, group: str) -> None:
        """Create a consumer group, from the stream's beginning, unless it exists."""
        await self.functions.ensure_group(stream, group)

    async def may_evict(self) -> str | None:
        """Return the maxmemory-policy under which the server evicts keys; None if it evicts nothing, or does not
        say."""
        try:
            memory: Any = await self.commands.info("memory")
        except ResponseError:
            return None
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        return policy if int(memory.get("maxmemory", 0)) > 0 and policy != "noeviction" else None

    async def open_stage(self) -> None:
        """Fix or check the stage's number of partitions, and load the functions.

        Raises:
            ConfigurationError: the stage was created with another number.
        """
        settings = self.keys.stage_settings()
        stored = int(await self.commands.hget(settings, "partitions") or 0)
        if not stored:
            await self.commands.hsetnx(settings, "partitions", str(self.keys.partitions))
            stored = int(await self.commands.hget(settings, "partitions") or 0)
        if stored != self.keys.partitions:
            raise ConfigurationError(
                f"stage {self.keys.stage!r} was created with {stored} partitions, and --partitions says "
                f"{self.keys.partitions}: start with --partitions {stored}, or use another --stage"
            )
        try:
            await self.functions.load()
        except OutOfMemoryError as error:  # a server at its maxmemory may have them already
            log.warning("functions_not_loaded", error=str(error))


def _streams(found: Any) -> list[StreamEntries]:
    """Convert the answers of RESP2 (pairs) and RESP3 (a mapping), raw or parsed by redis-py, to one form."""
    pairs = found.items() if isinstance(found, dict) else (found or [])
    return [(name, _entries(entries)) for name, entries in pairs]


def _entries(raw: Any) -> list[StreamEntry]:
    if raw and isinstance(raw[0], list) and raw[0] and isinstance(raw[0][0], tuple | list):
        raw = [entry for part in raw for entry in part]
    return [(id_, _fields(fields)) for id_, fields in raw]


def _fields(raw: Any) -> dict[bytes, bytes]:
    """Return an entry's fields; {} if it was trimmed while it was pending."""
    return dict(zip(raw[::2], raw[1::2], strict=True)) if isinstance(raw, list) else raw or {}
