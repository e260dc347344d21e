"""Connections to Redis, by URL. Services ask for what they need; which topology is behind it is decided here.

Every key has a hash tag, and each call stays with one tag: so the same calls do for a single server and for a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Any, cast

import hiredis
import structlog
from prometheus_client import Counter
from redis._parsers import AsyncCommandsParser
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.cluster import PRIMARY, REPLICA
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    MovedError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from tidewire.addresses import ClusterAddress, SentinelsAddress, redacted
from tidewire.cluster import Address, ClusterWire, Slots, ranges_of
from tidewire.errors import ConfigurationError
from tidewire.functions import Arg, Functions, Wait
from tidewire.keys import Keys
from tidewire.subscriber import Heard, Subscriber
from tidewire.tasks import end
from tidewire.wire import Wire, without_errors

log = structlog.get_logger(__name__)

REPLACED = Counter("tidewire_redis_masters_total", "Masters that were replaced by another server.")

BLOCK_MS = 1000
"""How long a blocking read waits at the server. Shorter than `wire.MAX_SILENCE_S`, or it would be given up."""
CLUSTER_SLOTS = hiredis.pack_command(("CLUSTER", "SLOTS"))  # type: ignore[arg-type]

_COMMANDS: dict[str, Any] = {
    "socket_connect_timeout": 3,
    "socket_timeout": 4,
    "max_connections": 1000,
    "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=1), 2),
}
"""redis-py's own way, for what is rare. A server that hangs holds a command up for less than 15 s."""
_LISTENING: dict[str, Any] = {"socket_connect_timeout": 2, "socket_timeout": 2, "retry": Retry(NoBackoff(), 0)}
"""For subscribers, which try again themselves."""
NO_EVICTION = "Redis may remove keys that Tidewire needs: set maxmemory-policy noeviction"
LOOK_S = 1.0
"""Time between two looks at who the master is. It is part of the time that a failover takes."""
MAX_LOOK_S = 1.0
"""Longest time for a node to answer such a look before another one is asked."""

Entry = tuple[bytes, dict[bytes, bytes]]
"""A stream's entry: id and fields."""
StreamEntries = tuple[bytes, list[Entry]]


class Waiter:
    """Waits for a stream to grow, on a connection of its own where that is to be had."""

    def __init__(self, backend: Backend, stream: bytes, wire: Wire | ClusterWire | None) -> None:
        self._backend = backend
        self._stream = stream
        self._wire = wire

    async def __call__(self, last: tuple[int, int]) -> None:
        """Until there is an entry after that id, or for a second."""
        after = f"{last[0]}-{last[1]}"
        if self._wire:
            await self._wire.calls([("XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", self._stream, after)])
        else:
            await self._backend.read({self._stream: after}, count=1)

    async def aclose(self) -> None:
        if self._wire:
            await self._wire.aclose()


class Backend:
    """One stage on one Redis, as a process sees it. An async context manager.

    Short commands share the `wire`. Blocking reads and confirmed writes each take a connection of their own from a
    pool. `commands` is redis-py's client, for rare commands. Without a wire (fakeredis) it does everything.
    """

    url: str | None = None

    def __init__(
        self, commands: Redis, listening: Redis, keys: Keys, wire: Wire | None = None, fanned: ClusterWire | None = None
    ) -> None:
        self.commands = commands
        self._listening = listening
        self._wire: Wire | ClusterWire | None = wire or fanned
        self._idle: list[Wire | ClusterWire] = []
        self._subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()
        self._when_moved: list[Callable[[], None]] = []
        self.keys = keys
        self.functions = Functions(self._wire or commands, self.confirmed)

    async def __aenter__(self) -> Backend:
        return self

    def another(self) -> Backend | None:
        """A second backend to the same place, not reached yet, for another thread; None where there can be none."""
        return backend_at(self.url, self.keys) if self.url else None

    async def reach(self) -> None:
        """Find whoever is needed before the first command; of a cluster, its nodes."""
        await self.commands.initialize()

    async def __aexit__(self, *_: object) -> None:
        for wire in (self._wire, *self._idle):
            if wire:
                await wire.aclose()
        await self.commands.aclose()
        await self._listening.aclose()

    async def calls(self, commands: Iterable[tuple[Arg, ...]]) -> list[Any]:
        """Plain commands, in one round trip; they may be done twice. Raises the first error, when all are done."""
        if self._wire:
            return await self._wire.calls(commands)
        async with self.commands.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            found: list[Any] = await pipeline.execute()
            return found

    async def read(self, streams: Mapping[bytes, bytes | str], count: int | None = None) -> list[StreamEntries]:
        """XREAD that waits up to a second; [] when nothing came."""
        return await self.read_now(streams, count, BLOCK_MS)

    async def read_group(self, stream: bytes, group: str, consumer: str, count: int) -> list[Entry]:
        """XREADGROUP of new entries for a competing consumer, waiting up to a second."""
        return await self.read_group_now(stream, group, consumer, count, BLOCK_MS)

    async def read_now(
        self, streams: Mapping[bytes, bytes | str], count: int | None, block_ms: int | None
    ) -> list[StreamEntries]:
        options = () if count is None else ("COUNT", count)
        return await self._read(("XREAD", *options), streams, block_ms)

    async def read_group_now(
        self, stream: bytes, group: str, consumer: str, count: int, block_ms: int | None
    ) -> list[Entry]:
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
        """A wire that nobody else uses meanwhile."""
        found = self._idle.pop() if self._idle else wire.another()
        try:
            yield found
        except asyncio.CancelledError:
            await found.aclose()  # its connection may still wait for an answer that is of no use
            raise
        finally:
            self._idle.append(found)

    async def confirmed(self, call: tuple[Arg, ...], wait: Wait) -> tuple[Any, int]:
        """A call and, on the connection that wrote, WAIT or WAITAOF: (answer or error, how many confirmed)."""
        assert self._wire, "only a real server has WAIT"
        async with self._own_wire(self._wire) as wire:
            answer, confirmed = await wire.answers([call, wait.command], cast(bytes, call[3]))
        if isinstance(answer, Exception):
            return answer, 0
        if isinstance(confirmed, Exception):
            raise confirmed
        return answer, int(confirmed[0] if isinstance(confirmed, list) else confirmed)

    async def wait(self, command: tuple[Arg, ...], key: bytes) -> Any:
        """WAIT or WAITAOF by itself, at the node that has the key."""
        assert self._wire, "only a real server has WAIT"
        async with self._own_wire(self._wire) as wire:
            return without_errors(await wire.answers([command], key))[0]

    def waiter(self, stream: bytes) -> Waiter:
        return Waiter(self, stream, self._wire and self._wire.another())

    def subscriber(self, heard: Heard) -> Subscriber:
        """One who hears channels, once it runs. It has connections of its own."""
        made = Subscriber(self, heard)
        self._subscribers.add(made)
        return made

    def when_moved(self, told: Callable[[], None]) -> None:
        """Call it whenever a master was replaced. What that one had, and did not pass on, is lost."""
        self._when_moved.append(told)

    def node_of(self, channel: bytes) -> Redis:
        return self._listening

    async def find_node_of(self, channel: bytes) -> Redis:
        return self.node_of(channel)

    async def address_of(self, key: bytes) -> str:
        """host:port of the node that has the key, as far as is known here; a socket's path."""
        where: dict[str, Any] = self.node_of(key).connection_pool.connection_kwargs
        return str(where["path"]) if "path" in where else f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"

    async def now_ms(self) -> int:
        """The server's time since 1970; of a cluster, that of any node."""
        seconds, microseconds = await self.commands.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def ensure_group(self, stream: bytes, group: str) -> None:
        """Create the consumer group, from the stream's beginning, unless it is there."""
        await self.functions.ensure_group(stream, group)

    async def may_evict(self) -> str | None:
        """The maxmemory-policy under which the server evicts keys; None when it evicts nothing, or does not tell."""
        try:
            memory: Any = await self.commands.info("memory")
        except ResponseError:
            return None
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        return policy if int(memory.get("maxmemory", 0)) > 0 and policy != "noeviction" else None

    async def open_stage(self) -> None:
        """Fix the stage's number of partitions, or find it as expected, and load the functions.

        Raises ConfigurationError when the stage was created with another number.
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
        except OutOfMemoryError as error:  # a server at its maxmemory may have them from an earlier start
            log.warning("functions_not_loaded", error=str(error))


def _streams(found: Any) -> list[StreamEntries]:
    """One shape for the answers of RESP2 (pairs) and RESP3 (a mapping), raw or read by redis-py."""
    pairs = found.items() if isinstance(found, dict) else (found or [])
    return [(name, _entries(entries)) for name, entries in pairs]


def _entries(raw: Any) -> list[Entry]:
    if raw and isinstance(raw[0], list) and raw[0] and isinstance(raw[0][0], tuple | list):
        raw = [entry for part in raw for entry in part]
    return [(id_, _fields(fields)) for id_, fields in raw]


def _fields(raw: Any) -> dict[bytes, bytes]:
    """An entry's fields; none where it was trimmed while it was pending."""
    return dict(zip(raw[::2], raw[1::2], strict=True)) if isinstance(raw, list) else raw or {}


class _Watched(Backend):
    """A backend whose masters change. It looks once a second who they are, and at once when one cannot be reached.

    A server that hangs keeps its connections: nothing but a look at the others tells that it has been replaced.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._watching: asyncio.Task[None] | None = None
        self._doubted = asyncio.Event()

    async def reach(self) -> None:
        await super().reach()
        if self._watching is None:
            await self._look()
            self._watching = asyncio.create_task(self._watch(), name="watch_masters")

    async def __aexit__(self, *_: object) -> None:
        if self._watching:
            await end([self._watching])
        await super().__aexit__()

    def doubt(self) -> None:
        """Look soon."""
        self._doubted.set()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._doubted.wait()
            self._doubted.clear()
            with contextlib.suppress(RedisError, OSError):
                await self._look()
            await asyncio.sleep(0.1)  # between two looks, however much is doubted

    async def _look(self) -> None:
        """Ask who the masters are, and break the connections to those that were replaced."""
        raise NotImplementedError

    def _moved(self) -> None:
        for subscriber in self._subscribers:
            subscriber.look()
        for told in self._when_moved:
            told()


class ClusterBackend(_Watched):
    """A stage on a Redis Cluster."""

    def __init__(self, address: ClusterAddress, keys: Keys) -> None:
        self._login: dict[str, Any] = {"username": address.username, "password": address.password}
        self._client = _Client(address, _COMMANDS)
        self._nodes: dict[Address, Redis] = {}
        self._lookouts: dict[Address, Wire] = {}
        self._order = list(address.nodes)  # whom to ask for the topology, who answered last first
        self._slots = Slots()
        self._fanned = ClusterWire(self._slots, self._wire_to, self.doubt)
        # The cluster client has the same commands, and is no Redis for its types alone.
        client = cast(Redis, self._client)
        super().__init__(client, client, keys, fanned=self._fanned)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        for lookout in self._lookouts.values():
            await lookout.aclose()
        for node in self._nodes.values():
            await node.aclose()

    def node_of(self, channel: bytes) -> Redis:
        return self._node(self._slots.master_of(key_slot(channel)))

    async def find_node_of(self, channel: bytes) -> Redis:
        await self._look()
        return self.node_of(channel)

    def _node(self, address: Address) -> Redis:
        if address not in self._nodes:
            self._nodes[address] = Redis(host=address[0], port=address[1], **self._login, **_LISTENING)
        return self._nodes[address]

    def _wire_to(self, address: Address) -> Wire:
        return Wire(self._node(address).connection_pool.make_connection)

    async def _look(self) -> None:
        """Ask one node after another, until one answers."""
        for asked in list(self._order):
            if asked not in self._lookouts:
                self._lookouts[asked] = self._wire_to(asked)
            try:
                async with asyncio.timeout(MAX_LOOK_S):
                    answer = without_errors(await self._lookouts[asked].once([CLUSTER_SLOTS]))[0]
            except (RedisError, OSError):
                self._lookouts[asked].lose("it does not say which node has which slot")
                continue
            self._order.remove(asked)
            self._order.insert(0, asked)
            await self._learn(list(ranges_of(answer, asked)))
            return
        raise ConnectionError("no node of the cluster says which node has which slot")

    async def _learn(self, ranges: list[tuple[int, int, Address]]) -> None:
        before = self._slots.masters()
        replaced = self._slots.learn(ranges)
        self._order += self._slots.masters() - set(self._order)
        if not before or self._slots.masters() == before:
            return
        for address in replaced:
            REPLACED.inc()
            log.warning("master_replaced", host=address[0], port=address[1])
        self._client.follow(ranges, replaced)
        for address in replaced:
            self._fanned.lose(address, "the cluster has replaced this master")
            if node := self._nodes.get(address):
                break_connections(node)
        self._moved()


class SentinelBackend(_Watched):
    """A stage on the master that sentinels name: it is asked for whenever a connection is made, and once a second.

    An operator's `SENTINEL FAILOVER` leaves the old master alive and writable until the sentinels have told it whom to
    follow, ten seconds later or more. Writes that it accepts meanwhile are lost. A connection that was being made while
    the master changed may have gone to the old one, so each look drops every connection to another server.
    """

    def __init__(self, address: SentinelsAddress, keys: Keys) -> None:
        options: Any = {
            "socket_timeout": MAX_LOOK_S,
            "socket_connect_timeout": MAX_LOOK_S,
            "retry": Retry(NoBackoff(), 0),
            **address.sentinel,
        }
        self._sentinels: Any = Sentinel(address.nodes, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._service = address.service

        def master(chosen: dict[str, Any]) -> Redis:
            login = {"username": address.username, "password": address.password}
            return cast(Redis, self._sentinels.master_for(address.service, **login, **chosen))

        commands = master(_COMMANDS)
        self._master: Address | None = None
        self._lines = Wire(commands.connection_pool.make_connection)
        super().__init__(commands, master(_LISTENING), keys, self._lines)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        for sentinel in self._sentinels.sentinels:
            await sentinel.aclose()

    async def address_of(self, key: bytes) -> str:
        host, port = await self._sentinels.discover_master(self._service)
        return f"{host}:{port}"

    async def _look(self) -> None:
        found: Address = await self._sentinels.discover_master(self._service)
        if self._master not in (None, found):
            REPLACED.inc()
            log.warning("master_replaced", host=found[0], port=found[1])
            self._lines.lose("the sentinels name another master")
            self._moved()
        self._master = found
        self._lines.lose("this is not the master that the sentinels name", unless_at=found)
        for client in (self.commands, self._listening):
            break_connections(client, unless_at=found)


def break_connections(client: Redis, unless_at: Address | None = None) -> None:
    """End a client's connections at once, those that wait for an answer too; its readers and retries make new ones.

    redis-py's own `disconnect` waits until all is written, which a server that hangs never lets happen.
    """
    pool: Any = client.connection_pool
    for connection in (*pool._available_connections, *pool._in_use_connections):
        if connection._writer is not None and (connection.host, connection.port) != unless_at:
            connection._writer.transport.abort()


class _Client(RedisCluster):
    """redis-py's, whose errors are all RedisError, and which finds the keys of our calls without asking a server."""

    def __init__(self, address: ClusterAddress, options: dict[str, Any]) -> None:
        super().__init__(
            startup_nodes=[ClusterNode(host, port) for host, port in address.nodes],
            username=address.username,
            password=address.password,
            # A slot that moved is noted. To learn all anew would break the connections of every call under way.
            reinitialize_steps=0,
            **options,
        )
        self.commands_parser = _KeyFinder()

    async def initialize(self, *args: Any, **kwargs: Any) -> RedisCluster:
        try:
            return await super().initialize(*args, **kwargs)
        except RedisClusterException as error:
            cause = error.__cause__
            if isinstance(cause, AuthenticationError):
                raise cause from None
            if isinstance(cause, RedisClusterException):
                raise NotACluster(str(cause)) from None
            raise ConnectionError(str(cause or error)) from None

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().execute_command(*args, **kwargs)
        except RedisClusterException as error:
            raise ConnectionError(str(error)) from None

    def follow(self, ranges: Iterable[tuple[int, int, Address]], replaced: Collection[Address]) -> None:
        """Take a new topology over at once. redis-py would ask for it only when a command has failed."""
        manager: Any = self.nodes_manager
        for low, high, (host, port) in ranges:
            name = f"{host}:{port}"
            node = manager.nodes_cache.setdefault(name, ClusterNode(host, port, **manager.connection_kwargs))
            node.server_type = PRIMARY
            for slot in range(low, high + 1):
                if manager.slots_cache.get(slot, [None])[0] != node:
                    manager.slots_cache[slot] = [node]
        for host, port in replaced:
            if node := manager.nodes_cache.get(f"{host}:{port}"):
                node.server_type = REPLICA
                for connection in node._connections:
                    if connection._writer is not None:
                        connection._writer.transport.abort()
                if manager.default_node == node:
                    self.replace_default_node()


class _KeyFinder(AsyncCommandsParser):
    """Where the keys of a command are. redis-py asks a server where they are not in a fixed place: once a call."""

    async def get_keys(self, *args: Any) -> Any:
        command = str(args[0]).upper()
        if command in ("FCALL", "FCALL_RO"):
            return args[3 : 3 + int(args[2])]
        if command in ("XREAD", "XREADGROUP"):
            streams = args[args.index(b"STREAMS") + 1 :]
            return streams[: len(streams) // 2]
        return await super().get_keys(*args)


class NotACluster(ConnectionError):
    """The server answers, and is not in cluster mode."""


def backend_at(url: str, keys: Keys) -> Backend:
    """A backend that has not been reached yet. Raises ConfigurationError for an address that is none of ours."""
    backend = _backend_at(url, keys)
    backend.url = url
    return backend


def _backend_at(url: str, keys: Keys) -> Backend:
    scheme = url.partition("://")[0]
    if scheme == "redis+cluster":
        return ClusterBackend(ClusterAddress.parse(url), keys)
    if scheme == "redis+sentinel":
        return SentinelBackend(SentinelsAddress.parse(url), keys)
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError(
            f"--redis {redacted(url)!r}: an address like redis://host:6379, rediss://…, unix://…, "
            "redis+sentinel://host:26379,host:26379/service or redis+cluster://host:6379,host:6379 is needed"
        )
    try:
        commands = Redis.from_url(url, **_COMMANDS)
        wire = Wire(commands.connection_pool.make_connection)
        return Backend(commands, Redis.from_url(url, **_LISTENING), keys, wire)
    except ValueError as error:
        raise ConfigurationError(f"--redis {redacted(url)!r}: {error}") from None


async def connect(url: str, keys: Keys) -> Backend:
    """A backend whose server answers and whose stage is open. Raises ConfigurationError with one sentence."""
    backend = backend_at(url, keys)
    try:
        async with _explained(url):
            await backend.reach()
            version = (await backend.commands.info("server")).get("redis_version", "0")
            if int(str(version).split(".", 1)[0]) < 7:
                raise ConfigurationError(f"the server at {redacted(url)} is version {version}; 7.0 or newer is needed")
            await backend.open_stage()
            if policy := await backend.may_evict():
                log.warning("keys_may_be_evicted", maxmemory_policy=policy, advice=NO_EVICTION)
    except BaseException:
        await backend.__aexit__()
        raise
    return backend


async def connect_existing(url: str, stage: str, partitions: int) -> Backend:
    """A backend of a stage with the partitions it was created with; `partitions` where it is yet to be created."""
    backend = backend_at(url, Keys(stage, partitions))
    try:
        async with _explained(url):
            await backend.reach()
            stored = await backend.commands.hget(backend.keys.stage_settings(), "partitions")
    except BaseException:
        await backend.__aexit__()
        raise
    backend.keys = Keys(stage, int(stored or partitions))
    return backend


@contextlib.asynccontextmanager
async def _explained(url: str) -> AsyncIterator[None]:
    """What goes wrong on the way to Redis, as one sentence."""
    at = f"Redis at {redacted(url)}"
    try:
        yield
    except NotACluster:
        raise ConfigurationError(
            f"{at} is not in cluster mode: name a single server as redis://host:port, or set cluster-enabled yes"
        ) from None
    except MovedError:
        raise ConfigurationError(f"{at} is a node of a cluster: name it as redis+cluster://host:port") from None
    except AuthenticationError as error:
        raise ConfigurationError(f"{at} does not answer ({error}): check its password") from None
    except MasterNotFoundError:
        raise ConfigurationError(
            f"{at} does not answer: no sentinel there is reachable and knows a master of the service's name"
        ) from None
    except (RedisError, OSError) as error:
        raise ConfigurationError(f"{at} does not answer ({error}): is it running, and reachable?") from None
