"""Sharded pub/sub: each channel is subscribed to at the node that has its slot, with one reader for each node."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import structlog
from prometheus_client import Counter
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.crc import key_slot
from redis.exceptions import ConnectionError, MovedError, RedisError, ResponseError

from tidewire.tasks import end

log = structlog.get_logger(__name__)

ASTRAY = Counter("tidewire_subscriber_moved_total", "Channels whose node was looked up again.")

PING_S = 1.0
"""Seconds between two pings of a subscriber's connection, because a server that hangs keeps it open."""
MAX_SILENCE_S = 2.0
"""Maximum seconds from a ping to any answer. After it, the connection is dropped."""

OnMessage = Callable[[bytes, bytes | None], None]
"""Called with a channel and a message, or with None when the subscription of the channel begins."""


class Nodes(Protocol):
    """Finds the node of a channel: the only one, or one of a cluster."""

    def node_of(self, channel: bytes) -> Redis:
        """Return the node that has a channel, as known here."""

    async def find_node_of(self, channel: bytes) -> Redis:
        """Ask for the node that has a channel, because the known one was wrong."""


class Subscriber:
    """Subscribes to channels, and passes their messages to a function.

    `on_message(channel, None)` says that a subscription begins: earlier messages may have been missed. It is called
    again after each reconnect, and when the channel has moved to another node. Messages of a channel come in their
    order. While a node is away, the subscriber retries.
    """

    def __init__(self, nodes: Nodes, on_message: OnMessage) -> None:
        self._nodes = nodes
        self._on_message = on_message
        self._at: dict[bytes, _Connection] = {}
        self._connections: dict[Redis, _Connection] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None  # while it runs
        self._moving: asyncio.Task[None] | None = None

    async def subscribe(self, channel: bytes) -> None:
        """Subscribe to a channel.

        If this raises one of redis-py's errors, the channel is subscribed to on the next connection.
        """
        connection = self._connection(self._nodes.node_of(channel))
        before = self._at.get(channel, connection)
        if before is not connection:
            before.wanted.discard(channel)
        self._at[channel] = connection
        await connection.want(channel)

    async def unsubscribe(self, channel: bytes) -> None:
        """Unsubscribe from a channel. No further message comes, even if this raises one of redis-py's errors."""
        if connection := self._at.pop(channel, None):
            await connection.leave(channel)

    async def run(self) -> None:
        """Receive messages until cancelled. Raises the error of a failed reader."""
        self._failed = asyncio.get_running_loop().create_future()
        try:
            for connection in self._connections.values():
                self._start(connection)
            await self._failed
        finally:
            self._failed = None
            await end(self._readers)
            for connection in self._connections.values():
                await connection.close_quietly()

    def look(self) -> None:
        """Subscribe at the new masters, without waiting for the old connections."""
        if self._failed and (self._moving is None or self._moving.done()):
            self._moving = asyncio.create_task(self._move(), name="subscriber_moving")
            self._readers.add(self._moving)
            self._moving.add_done_callback(self._ended)

    async def _move(self) -> None:
        for channel, connection in list(self._at.items()):
            try:
                if self._at.get(channel) is connection and self._nodes.node_of(channel) is not connection.node:
                    ASTRAY.inc()
                    await self.subscribe(channel)
            except (RedisError, OSError) as error:  # the new connection subscribes to it when it opens
                log.warning("announcements_not_heard", error=str(error))

    def _connection(self, node: Redis) -> _Connection:
        if node not in self._connections:
            self._connections[node] = connection = _Connection(node)
            if self._failed:
                self._start(connection)
        return self._connections[node]

    def _start(self, connection: _Connection) -> None:
        task = asyncio.create_task(self._read(connection), name="subscriber")
        self._readers.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._readers.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and self._failed and not self._failed.done():
            self._failed.set_exception(error)

    async def _read(self, connection: _Connection) -> None:
        while True:
            try:
                await connection.connect()
                if connection.astray:
                    await self._find(connection)
                message = await connection.hear()
            except MovedError as error:
                connection.astray |= {channel for channel in connection.wanted if key_slot(channel) == error.slot_id}
            except (RedisError, OSError) as error:
                log.warning("announcements_not_heard", error=str(error))
                if not connection.wanted:  # the node may be gone for good
                    self._connections.pop(connection.node)
                    await connection.close_quietly()
                    return
                await asyncio.sleep(0.2)
                # An error does not name the refused channel, so all are tried again. Without an answer, the node may be
                # replaced.
                connection.astray |= {
                    channel
                    for channel in connection.wanted
                    if isinstance(error, ResponseError) or self._elsewhere(channel, connection)
                }
            else:
                if message:
                    self._take(connection, message)

    def _elsewhere(self, channel: bytes, connection: _Connection) -> bool:
        with contextlib.suppress(RedisError):
            return self._connections.get(self._nodes.node_of(channel)) is not connection
        return False

    async def _find(self, connection: _Connection) -> None:
        """Subscribe to channels that this node refuses, at the nodes that have them now."""
        ASTRAY.inc(len(connection.astray))
        for channel in list(connection.astray):
            if self._at.get(channel) is connection:
                await self._nodes.find_node_of(channel)
            if self._at.get(channel) is connection:  # it was not unsubscribed meanwhile
                await self.subscribe(channel)
            connection.astray.discard(channel)

    def _take(self, connection: _Connection, message: dict[str, Any]) -> None:
        channel: bytes | None = message["channel"]
        if channel is None:
            return  # the answer to a ping
        if self._at.get(channel) is not connection:
            return  # it was unsubscribed, or comes from another node
        if message["type"] == "sunsubscribe":
            # The slot has moved, or the channel was subscribed to again after an unsubscribe.
            connection.astray.add(channel)
        elif message["type"] == "ssubscribe":
            self._on_message(channel, None)
        elif message["type"] == "smessage":
            self._on_message(channel, message["data"])


class _Connection(PubSub):
    """The connection to one node. It subscribes to all wanted channels whenever it connects.

    redis-py would subscribe to all channels in one command. A cluster needs one command for each slot.

    The reader and callers of `want` use the connection at the same time. redis-py would let both reconnect at once, and
    then both read from one socket. Here, one of them connects, and the others wait until it has.
    """

    connection: Any

    def __init__(self, node: Redis) -> None:
        super().__init__(node.connection_pool)
        self.node = node
        self.wanted: set[bytes] = set()
        self.astray: set[bytes] = set()  # wanted, but refused by this node
        self._opening = asyncio.Lock()
        self._opener: asyncio.Task[Any] | None = None  # the task that connects at the moment
        self._pinged_at = 0.0
        self._received = True  # whether anything was received since the last ping

    async def hear(self) -> dict[str, Any] | None:
        """Return the next message, or None after a while.

        Raises ConnectionError if the server does not answer a ping.
        """
        loop = asyncio.get_running_loop()
        silent_s = loop.time() - self._pinged_at
        if self._received and silent_s >= PING_S:
            self._pinged_at, self._received, silent_s = loop.time(), False, 0.0
            await self.execute_command("PING")
        await self.connect()  # it may have been lost at the ping
        message: dict[str, Any] | None = await self.get_message(timeout=PING_S)
        # Checked after another read: a process that was itself stopped finds the answer there.
        if message is None and not self._received and silent_s > MAX_SILENCE_S:
            self._received = True  # of the next connection
            await self._reconnect(self.connection)
            raise ConnectionError(f"the server has not answered a ping for {MAX_SILENCE_S:g} s")
        self._received = self._received or message is not None
        return message

    async def connect(self) -> None:
        """Connect, unless it is connected."""
        await self._open()

    async def _open(self) -> bool:
        """Connect and subscribe to all wanted channels. Returns False if it is connected."""
        if self._opener is asyncio.current_task():
            return False  # a command of `on_connect`
        async with self._opening:
            connection = self.connection
            if connection is not None and connection.is_connected:
                return False
            self._opener = asyncio.current_task()
            try:
                await super().connect()  # type: ignore[no-untyped-call]
                if connection is None:
                    await self._subscribe(self.wanted)  # redis-py calls on_connect from the second time on
            finally:
                self._opener = None
            return True

    async def _reconnect(self, conn: Any, *_: Any, **__: Any) -> None:
        """Drop a connection after an error. The reader makes a new one, or the next command."""
        if self._opener is asyncio.current_task():
            await conn.disconnect(nowait=True)
        else:
            async with self._opening:
                await conn.disconnect(nowait=True)

    async def on_connect(self, _: object) -> None:
        await self._subscribe(self.wanted)

    async def want(self, channel: bytes) -> None:
        self.wanted.add(channel)
        if not await self._open():
            await self._subscribe((channel,))

    async def leave(self, channel: bytes) -> None:
        self.wanted.discard(channel)
        if self.connection is not None:
            # redis-py's error if the connection is closed meanwhile. Nothing is left to unsubscribe from.
            with contextlib.suppress(AttributeError):
                await self.execute_command("SUNSUBSCRIBE", channel)

    async def close_quietly(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self.aclose()  # type: ignore[no-untyped-call]

    async def _subscribe(self, channels: Iterable[bytes]) -> None:
        slots: dict[int, list[bytes]] = {}
        for channel in channels:
            slots.setdefault(key_slot(channel), []).append(channel)
        for together in slots.values():
            await self.execute_command("SSUBSCRIBE", *together)
