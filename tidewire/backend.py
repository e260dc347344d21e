"""Connections to Redis, by URL. Services ask for what they need; which topology is behind it is decided here.

Every key has a hash tag, and each call stays with one tag: so the same calls do for a single server and for a cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl, unquote

import structlog
from prometheus_client import Counter
from redis._parsers import AsyncCommandsParser
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    MovedError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from tidewire.errors import ConfigurationError
from tidewire.functions import Arg, Functions, Wait
from tidewire.keys import Keys
from tidewire.subscriber import Heard, Subscriber
from tidewire.wire import Wire

log = structlog.get_logger(__name__)

MASTERS = Counter("tidewire_redis_masters_total", "Times that the sentinels named another master.")

BLOCK_MS = 1000
"""How long a blocking read waits. Shorter than the socket's time-out, or the client would repeat it."""


_COMMANDS: dict[str, Any] = {"socket_connect_timeout": 5, "max_connections": 1000}
_BLOCKING: dict[str, Any] = {
    "socket_connect_timeout": 5,
    "socket_timeout": BLOCK_MS / 1000 + 5,
    "max_connections": 10000,
}

Entry = tuple[bytes, dict[bytes, bytes]]
"""A stream's entry: id and fields."""
StreamEntries = tuple[bytes, list[Entry]]


class Waiter:
    """Waits for a stream to grow, on a connection of its own where that is to be had."""

    def __init__(self, backend: Backend, stream: bytes, wire: Wire | None) -> None:
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
    """One stage on one Redis, as a process sees it. An async context manager."""

    url: str | None = None

    def __init__(self, commands: Redis, blocking: Redis, keys: Keys, wire: Wire | None = None) -> None:
        self.commands = commands
        self._blocking = blocking
        self._wire = wire
        self.keys = keys
        self.functions = Functions(wire or commands, self.confirmed)

    async def __aenter__(self) -> Backend:
        return self

    def another(self) -> Backend | None:
        """A second backend to the same place, not reached yet, for another thread; None where there can be none."""
        return backend_at(self.url, self.keys) if self.url else None

    async def reach(self) -> None:
        """Find whoever is needed before the first command; of a cluster, its nodes."""
        await self.commands.initialize()
        await self._blocking.initialize()

    async def __aexit__(self, *_: object) -> None:
        if self._wire:
            await self._wire.aclose()
        await self.commands.aclose()
        await self._blocking.aclose()

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
        found = await self._blocking.xread(dict[Any, Any](streams), count=count, block=block_ms)
        return _streams(found)

    async def read_group_now(
        self, stream: bytes, group: str, consumer: str, count: int, block_ms: int | None
    ) -> list[Entry]:
        found = await self._blocking.xreadgroup(group, consumer, {stream: ">"}, count=count, block=block_ms)
        return [entry for _, entries in _streams(found) for entry in entries]

    async def confirmed(self, call: tuple[Arg, ...], wait: Wait) -> tuple[Any, int]:
        """A call and, on the connection that wrote, WAIT or WAITAOF: (answer or error, how many confirmed)."""
        async with self.node_of(cast(bytes, call[3])).pipeline(transaction=False) as pipeline:
            pipeline.execute_command(*call)
            pipeline.execute_command(*wait.command)
            answer, confirmed = await pipeline.execute(raise_on_error=False)
        if isinstance(answer, Exception):
            if isinstance(answer, MovedError):
                await self.find_node_of(cast(bytes, call[3]))
            return answer, 0
        if isinstance(confirmed, Exception):
            raise confirmed
        return answer, int(confirmed[0] if isinstance(confirmed, list) else confirmed)

    async def wait(self, command: tuple[Arg, ...], key: bytes) -> Any:
        """WAIT or WAITAOF by itself, at the node that has the key."""
        return await self.node_of(key).execute_command(*command)  # type: ignore[no-untyped-call]

    def waiter(self, stream: bytes) -> Waiter:
        return Waiter(self, stream, self._wire and self._wire.another())

    def subscriber(self, heard: Heard) -> Subscriber:
        """One who hears channels, once it runs. It has connections of its own."""
        return Subscriber(self, heard)

    def node_of(self, channel: bytes) -> Redis:
        """The node that has the slot of a channel or key, as far as is known here."""
        return self._blocking

    async def find_node_of(self, channel: bytes) -> Redis:
        """The same, when what is known has proven wrong."""
        await self.commands.exists(channel)  # where it is refused, the client is told who has the slot
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
        try:
            await self.commands.xgroup_create(stream, group, id="0", mkstream=True)
        except OutOfMemoryError:
            # A full server refuses the command also where the group is there: a partition must still be taken over.
            groups: list[Any] = await self.commands.xinfo_groups(stream)
            if group.encode() not in {found["name"] for found in groups}:
                raise
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def open_stage(self) -> None:
        """Fix the stage's number of partitions, or find it as expected, and load the functions.

        Raises ConfigurationError when the stage was created with another number.
        """
        settings = self.keys.stage_settings()
        await self.commands.hsetnx(settings, "partitions", str(self.keys.partitions))
        stored = int(await self.commands.hget(settings, "partitions") or 0)
        if stored != self.keys.partitions:
            raise ConfigurationError(
                f"stage {self.keys.stage!r} was created with {stored} partitions, and --partitions says "
                f"{self.keys.partitions}: start with --partitions {stored}, or use another --stage"
            )
        await self.functions.load()


def _streams(found: Any) -> list[StreamEntries]:
    """One shape for the answers of RESP2 (a list of pairs) and RESP3 (a mapping, one level of lists deeper)."""
    pairs = found.items() if isinstance(found, dict) else (found or [])
    return [(name, _entries(entries)) for name, entries in pairs]


def _entries(raw: Any) -> list[Entry]:
    if raw and isinstance(raw[0], list) and raw[0] and isinstance(raw[0][0], tuple | list):
        raw = [entry for part in raw for entry in part]
    return [(id_, fields or {}) for id_, fields in raw]


class ClusterBackend(Backend):
    """A stage on a Redis Cluster."""

    def __init__(self, address: Cluster, keys: Keys) -> None:
        self._address = address
        self._cluster = _Client(address, _COMMANDS)
        self._nodes: dict[str, Redis] = {}
        # The cluster client has the same commands, and is no Redis for its types alone.
        super().__init__(cast(Redis, self._cluster), cast(Redis, _Client(address, _BLOCKING)), keys)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        for node in self._nodes.values():
            await node.aclose()

    def node_of(self, channel: bytes) -> Redis:
        try:
            node = self._cluster.get_node_from_key(cast(str, channel))  # bytes do as well
        except RedisClusterException as error:
            raise ConnectionError(str(error)) from None
        assert node, "only a replica may be missing"
        if node.name not in self._nodes:
            # Soon given up: the node may have been replaced, and what was wanted of it is then to be had elsewhere.
            retry = Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.2), 5)
            self._nodes[node.name] = Redis(
                host=node.host,
                port=int(node.port),
                username=self._address.username,
                password=self._address.password,
                retry=retry,
                **_BLOCKING,
            )
        return self._nodes[node.name]


class SentinelBackend(Backend):
    """A stage on the master that sentinels name: it is asked for whenever a connection is made, and once a second.

    An operator's `SENTINEL FAILOVER` leaves the old master alive, and willing, until the sentinels have told it whom to
    follow, ten seconds later; what it accepts meanwhile is lost. So nobody stays with it who can know better.
    """

    def __init__(self, address: Sentinels, keys: Keys) -> None:
        options: Any = {"socket_timeout": 2.0, **address.sentinel}
        self._sentinels: Any = Sentinel(address.nodes, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._service = address.service

        def master(chosen: dict[str, Any]) -> Redis:
            login = {"username": address.username, "password": address.password}
            return cast(Redis, self._sentinels.master_for(address.service, **login, **chosen))

        commands = master(_COMMANDS)
        self._lines = Wire(commands.connection_pool.make_connection)
        super().__init__(commands, master(_BLOCKING), keys, self._lines)
        self._watching: asyncio.Task[None] | None = None

    async def reach(self) -> None:
        await super().reach()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(await self._master()))

    async def __aexit__(self, *_: object) -> None:
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await super().__aexit__()
        for sentinel in self._sentinels.sentinels:
            await sentinel.aclose()

    async def _master(self) -> tuple[str, int]:
        found: tuple[str, int] = await self._sentinels.discover_master(self._service)
        return found

    async def address_of(self, key: bytes) -> str:
        host, port = await self._master()
        return f"{host}:{port}"

    async def _watch(self, master: tuple[str, int]) -> None:
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(RedisError, OSError):
                if (found := await self._master()) != master:
                    master = found
                    MASTERS.inc()
                    log.warning("another_master", host=found[0], port=found[1])
                    self._lines.lose("the sentinels name another master")
                    for client in (self.commands, self._blocking):
                        await client.connection_pool.disconnect()


class _Client(RedisCluster):
    """redis-py's, whose errors are all RedisError, and which finds the keys of our calls without asking a server."""

    def __init__(self, address: Cluster, options: dict[str, Any]) -> None:
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


class Cluster(NamedTuple):
    """What redis+cluster://user:password@host:port,host:port says."""

    nodes: list[tuple[str, int]]
    username: str | None
    password: str | None

    @classmethod
    def parse(cls, url: str) -> Cluster:
        """Raises ConfigurationError for what is no such address."""
        user, password, nodes, behind = _parts(url, 6379)
        if nodes is None:
            raise ConfigurationError(
                f"--redis {redacted(url)!r}: write some of the cluster's nodes, as redis+cluster://host:port,host:port"
            )
        if behind:
            raise ConfigurationError(
                f"--redis {redacted(url)!r}: write nothing after the nodes: a cluster has no numbered databases"
            )
        return cls(nodes, user, password)


class Sentinels(NamedTuple):
    """What redis+sentinel://user:password@host:port,host:port/service?sentinel_password=… says.

    User and password are the servers'; the sentinels' own, where they have them, are `sentinel_username` and
    `sentinel_password`.
    """

    nodes: list[tuple[str, int]]
    service: str
    username: str | None
    password: str | None
    sentinel: dict[str, str]

    @classmethod
    def parse(cls, url: str) -> Sentinels:
        """Raises ConfigurationError for what is no such address."""
        user, password, nodes, behind = _parts(url, 26379)
        path, _, query = behind.partition("?")
        service, options = unquote(path.strip("/")), dict(parse_qsl(query, keep_blank_values=True))
        strangers = options.keys() - {"sentinel_username", "sentinel_password"}
        if nodes is None or not service or "/" in service or strangers:
            raise ConfigurationError(
                f"--redis {redacted(url)!r}: write some of the sentinels and the name of the service, as "
                "redis+sentinel://host:port,host:port/service, and the sentinels' own password, if they have one, as "
                "?sentinel_password=…"
            )
        sentinel = {name.removeprefix("sentinel_"): value for name, value in options.items()}
        return cls(nodes, service, user, password, sentinel)


def _parts(url: str, port: int) -> tuple[str | None, str | None, list[tuple[str, int]] | None, str]:
    """(user, password, nodes, what comes behind) of an address with several; nodes are None where they are none."""
    # A password may hold anything, the rest neither of these signs.
    login, _, rest = url.partition("://")[2].rpartition("@")
    hosts, *behind = re.split(r"(?=[/?#])", rest, maxsplit=1)
    user, _, password = login.partition(":")
    found = [re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?", host) for host in hosts.split(",")]
    nodes = [(one[1].strip("[]"), int(one[2] or port)) for one in found if one]
    sound = len(nodes) == len(found) and all(0 < number < 65536 for _, number in nodes)
    after = "".join(behind)
    return unquote(user) or None, unquote(password) or None, nodes if sound else None, "" if after == "/" else after


def backend_at(url: str, keys: Keys) -> Backend:
    """A backend that has not been reached yet. Raises ConfigurationError for an address that is none of ours."""
    backend = _backend_at(url, keys)
    backend.url = url
    return backend


def _backend_at(url: str, keys: Keys) -> Backend:
    scheme = url.partition("://")[0]
    if scheme == "redis+cluster":
        return ClusterBackend(Cluster.parse(url), keys)
    if scheme == "redis+sentinel":
        return SentinelBackend(Sentinels.parse(url), keys)
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError(
            f"--redis {redacted(url)!r}: an address like redis://host:6379, rediss://…, unix://…, "
            "redis+sentinel://host:26379,host:26379/service or redis+cluster://host:6379,host:6379 is needed"
        )
    try:
        commands = Redis.from_url(url, **_COMMANDS)
        wire = Wire(commands.connection_pool.make_connection)
        return Backend(commands, Redis.from_url(url, **_BLOCKING), keys, wire)
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


def redacted(url: str) -> str:
    """The address without its password, wherever it stands."""
    url = re.sub(r"^([^:]*://[^:@/]*):.*@", r"\1:…@", url, flags=re.DOTALL)
    return re.sub(r"([?&](?:sentinel_)?password=)[^&]*", r"\1…", url)
