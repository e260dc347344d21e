"""Connections to Redis, by URL. Services ask for what they need; which topology is behind it is decided here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from tidewire.errors import ConfigurationError
from tidewire.functions import Arg, Functions, Wait
from tidewire.keys import Keys

BLOCK_MS = 1000
"""How long a blocking read waits. Shorter than the socket's time-out, or the client would repeat it."""


Entry = tuple[bytes, dict[bytes, bytes]]
"""A stream's entry: id and fields."""
StreamEntries = tuple[bytes, list[Entry]]


class Backend:
    """One stage on one Redis, as a process sees it. An async context manager."""

    def __init__(self, commands: Redis, blocking: Redis, keys: Keys) -> None:
        self.commands = commands
        self._blocking = blocking
        self.keys = keys
        self.functions = Functions(commands, self.confirmed)

    async def __aenter__(self) -> Backend:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.commands.aclose()
        await self._blocking.aclose()

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
        async with self.commands.pipeline(transaction=False) as pipeline:
            pipeline.execute_command(*call)
            pipeline.execute_command(*wait.command)
            answer, confirmed = await pipeline.execute(raise_on_error=False)
        if isinstance(answer, Exception):
            return answer, 0
        if isinstance(confirmed, Exception):
            raise confirmed
        return answer, int(confirmed[0] if isinstance(confirmed, list) else confirmed)

    async def wait(self, command: tuple[Arg, ...]) -> Any:
        """WAIT or WAITAOF by itself."""
        return await self.commands.execute_command(*command)  # type: ignore[no-untyped-call]

    def pubsub(self) -> PubSub:
        """A subscriber with a connection of its own."""
        return self._blocking.pubsub()

    async def ensure_group(self, stream: bytes, group: str) -> None:
        """Create the consumer group, from the stream's beginning, unless it is there."""
        try:
            await self.commands.xgroup_create(stream, group, id="0", mkstream=True)
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


def clients(url: str) -> tuple[Redis, Redis]:
    """(for commands, for blocking reads). Raises ConfigurationError for an address that is none of ours."""
    scheme = urlsplit(url).scheme
    if scheme in ("redis+sentinel", "redis+cluster"):
        raise ConfigurationError(f"--redis {scheme}://…: this version speaks to a single server (redis://)")
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError(
            f"--redis {url!r}: an address like redis://host:6379, rediss://… or unix://… is needed"
        )
    try:
        commands = Redis.from_url(url, socket_connect_timeout=5, max_connections=1000)
        blocking = Redis.from_url(
            url, socket_connect_timeout=5, socket_timeout=BLOCK_MS / 1000 + 5, max_connections=10000
        )
    except ValueError as error:
        raise ConfigurationError(f"--redis {url!r}: {error}") from None
    return commands, blocking


async def connect(url: str, keys: Keys) -> Backend:
    """A backend whose server answers and whose stage is open. Raises ConfigurationError with one sentence."""
    backend = Backend(*clients(url), keys)
    try:
        async with _explained(url):
            version = (await backend.commands.info("server")).get("redis_version", "0")
            if int(str(version).split(".", 1)[0]) < 7:
                raise ConfigurationError(f"the server at {redacted(url)} is version {version}; 7.0 or newer is needed")
            await backend.open_stage()
    except ConfigurationError:
        await backend.__aexit__()
        raise
    return backend


async def connect_existing(url: str, stage: str, partitions: int) -> Backend:
    """A backend of a stage with the partitions it was created with; `partitions` where it is yet to be created."""
    commands, blocking = clients(url)
    try:
        async with _explained(url):
            stored = await commands.hget(Keys(stage, partitions).stage_settings(), "partitions")
    except ConfigurationError:
        await Backend(commands, blocking, Keys(stage, partitions)).__aexit__()
        raise
    return Backend(commands, blocking, Keys(stage, int(stored or partitions)))


@contextlib.asynccontextmanager
async def _explained(url: str) -> AsyncIterator[None]:
    """What goes wrong on the way to Redis, as one sentence."""
    try:
        yield
    except (RedisError, OSError) as error:
        hint = "check its password" if isinstance(error, AuthenticationError) else "is it running, and reachable?"
        raise ConfigurationError(f"Redis at {redacted(url)} does not answer ({error}): {hint}") from None


def redacted(url: str) -> str:
    """The address without its password."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":…@") if password else url
