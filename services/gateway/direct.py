"""Frames for one connection, whichever gateway has it: passed on over a stream of that gateway, and answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import structlog
from redis.exceptions import RedisError

from tidewire.errors import NotFound, RequestError
from tidewire.model.records import Direct as Record
from tidewire.model.records import Reply, unpack
from tidewire.process.bus import Answers, Bus, Inbox
from tidewire.process.registry import Registry
from tidewire.redis.backend import Backend

log = structlog.get_logger(__name__)

TTL_MS = 60_000
TIME_MS = 10_000
Deliver = Callable[[str, dict[str, Any]], None]
"""Gives a frame to a connection of this gateway. Raises NotFound, or RateLimited where the peer is too slow."""


class Direct:
    """Both ends of the way. `deliver` is the gateway's."""

    def __init__(self, backend: Backend, bus: Bus, registry: Registry) -> None:
        self._backend = backend
        self._bus = bus
        self._registry = registry
        self._answers = Answers(backend)
        self.deliver: Deliver = _nobody

    async def send(self, connection: str, frame: dict[str, Any]) -> None:
        """Raises NotFound where there is no such connection, RateLimited where it is too slow, Timeout."""
        gateway = connection.rpartition("-")[0]
        if gateway == self._registry.id:
            self.deliver(connection, frame)
            return
        if gateway not in self._registry.live("gateway"):
            _nobody(connection, frame)
        deadline = self._registry.now_ms() + TIME_MS
        stream = self._backend.keys.direct(gateway)
        try:
            await self._bus.request(
                stream, lambda number: Record(connection, frame, deadline, self._registry.id, number)
            )
        finally:
            with contextlib.suppress(RedisError, OSError):  # the gateway may have died, and nobody read it
                await self._backend.commands.pexpire(stream, TTL_MS)

    async def receive(self) -> None:
        """Deliver what other gateways send, until cancelled."""
        # One that was counted dead goes on under another name.
        inbox = Inbox(self._backend, lambda: self._backend.keys.direct(self._registry.id))
        while True:
            try:
                records = await inbox.read()
            except (RedisError, OSError) as error:
                log.warning("direct_messages_not_read", error=str(error))
                await asyncio.sleep(0.2)
                continue
            for record in records:
                self._received(Record(*unpack(record)))

    def _received(self, record: Record) -> None:
        if record.deadline < self._registry.now_ms():
            return  # whoever asked has given up
        try:
            self.deliver(record.connection, record.frame)
            reply = Reply(record.number, {}, None)
        except RequestError as error:
            reply = Reply(record.number, None, error.as_frame(None))
        self._answers.send({record.reply_to: [reply]})


def _nobody(connection: str, frame: dict[str, Any]) -> None:
    raise NotFound(f"there is no connection {connection[:100]!r}")
