"""Messages to one connection, whichever gateway has it. They go over a stream of that gateway, and are answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog
from redis.exceptions import RedisError

from tidewire.errors import NotFound, RequestError
from tidewire.model.records import DirectMessage, Reply, unpack
from tidewire.process.bus import Answers, Bus, Inbox
from tidewire.process.registry import Registry
from tidewire.redis.backend import Backend
from tidewire.redis.keys import ServiceKind

log = structlog.get_logger(__name__)

STREAM_TTL_MS = 60_000
"""How long, in ms, the stream of direct messages outlives the last message to a gateway."""
MAX_WAIT_MS = 10_000
"""Maximum time, in ms, for a message to wait for its gateway. An older one is dropped."""
Deliver = Callable[[str, dict[str, Any]], None]
"""Passes a frame to a connection of this gateway. Raises NotFound, or RateLimited if the peer is too slow."""


class DirectMessages:
    """Sends messages to connections of any gateway, and delivers those to connections of this one through `deliver`."""

    def __init__(self, backend: Backend, bus: Bus, registry: Registry) -> None:
        self._backend = backend
        self._bus = bus
        self._registry = registry
        self._answers = Answers(backend)
        self.deliver: Deliver = _refuse

    async def send(self, connection: str, frame: dict[str, Any]) -> None:
        """Send a frame to a connection.

        Raises:
            NotFound: no gateway has such a connection.
            RateLimited: its peer is too slow.
            Timeout: its gateway did not answer; the frame may have been delivered.
        """
        gateway = connection.rpartition("-")[0]
        if gateway == self._registry.id:
            self.deliver(connection, frame)
            return
        if gateway not in self._registry.live(ServiceKind.GATEWAY):
            _refuse(connection, frame)
        deadline = self._registry.now_ms() + MAX_WAIT_MS
        stream = self._backend.keys.direct(gateway)
        try:
            await self._bus.request(
                stream, lambda number: DirectMessage(connection, frame, deadline, self._registry.id, number)
            )
        finally:
            with contextlib.suppress(RedisError, OSError):  # a gateway that died reads it no more
                await self._backend.commands.pexpire(stream, STREAM_TTL_MS)

    async def receive(self) -> None:
        """Deliver what other gateways send, until cancelled."""
        # The id is looked up for each read: a gateway that was considered dead continues under another one.
        inbox = Inbox(self._backend, lambda: self._backend.keys.direct(self._registry.id))
        while True:
            try:
                records = await inbox.read()
            except (RedisError, OSError) as error:
                log.warning("direct_messages_not_read", error=str(error))
                await asyncio.sleep(0.2)
                continue
            for record in records:
                self._received(DirectMessage(*unpack(record)))

    def _received(self, message: DirectMessage) -> None:
        if message.deadline < self._registry.now_ms():
            return  # the sender has given up
        try:
            self.deliver(message.connection, message.frame)
            reply = Reply(message.number, {}, None)
        except RequestError as error:
            reply = Reply(message.number, None, error.as_frame(None))
        self._answers.send({message.reply_to: [reply]})


def _refuse(connection: str, frame: dict[str, Any]) -> None:
    raise NotFound(f"there is no connection {connection[:100]!r}")
