"""Orders: what a gateway asks another one to do with its connections. They go over a stream of that gateway, and are
answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import structlog
from redis.exceptions import RedisError

from tidewire.errors import NotFound, RequestError, UnsupportedAction
from tidewire.model.records import JSON, GatewayOrder, Reply, unpack
from tidewire.process.bus import Answers, Bus, Inbox
from tidewire.process.registry import Registry, all_services
from tidewire.redis.backend import Backend
from tidewire.redis.keys import ServiceKind

log = structlog.get_logger(__name__)

STREAM_TTL_MS = 60_000
"""How long, in ms, the stream of orders outlives the last order to a gateway."""
MAX_WAIT_MS = 10_000
"""Maximum time, in ms, for an order to wait for its gateway. An older one is dropped."""


class OrderAction(StrEnum):
    """What is ordered."""

    DELIVER = "deliver"
    """Send `frame` to `connection`."""
    POST = "post"
    """Send `data` to `connection` as it is."""
    DESCRIBE = "describe"
    """Tell when `connection` began and was active, its address and its user agent."""
    DISCONNECT = "disconnect"
    """Close `connections`, and all connections of `users`. Returns how many there were."""


Obey = Callable[[OrderAction, dict[str, Any]], JSON]
"""Carries out an order on this gateway, and returns its result. Raises RequestError."""


class Orders:
    """Orders to the gateway that has a connection, or to all. This one carries out its own through `obey`."""

    def __init__(self, backend: Backend, bus: Bus, registry: Registry) -> None:
        self._backend = backend
        self._bus = bus
        self._registry = registry
        self._answers = Answers(backend)
        self.obey: Obey = _refuse

    async def to_connection(self, action: OrderAction, connection: str, **fields: Any) -> JSON:
        """Give an order about one connection to its gateway, and return the result.

        Raises:
            NotFound: no gateway has such a connection.
            RateLimited: its peer is too slow.
            Timeout: its gateway did not answer; the order may have been carried out.
        """
        gateway = connection.rpartition("-")[0]
        fields["connection"] = connection
        known = gateway == self._registry.id or gateway in self._registry.live(ServiceKind.GATEWAY)
        if not known and gateway not in await self._gateways():
            raise no_connection(connection)
        return await self._give(gateway, action, fields)

    async def to_all(self, action: OrderAction, **fields: Any) -> list[JSON]:
        """Give an order to all live gateways, and return their results. Raises RequestError if one fails."""
        others = await self._gateways() - {self._registry.id}
        return await asyncio.gather(*(self._give(one, action, fields) for one in (self._registry.id, *sorted(others))))

    async def _gateways(self) -> set[str]:
        """Return all live gateways. One that has just started is not yet in the answer of the last heartbeat."""
        registered = await all_services(self._backend)
        found = {id_ for id_, one in registered.items() if one.alive and one.kind == ServiceKind.GATEWAY}
        return found | set(self._registry.live(ServiceKind.GATEWAY))

    async def _give(self, gateway: str, action: OrderAction, fields: dict[str, Any]) -> JSON:
        if gateway == self._registry.id:
            return self.obey(action, fields)
        deadline = self._registry.now_ms() + MAX_WAIT_MS
        stream = self._backend.keys.orders(gateway)
        try:
            return await self._bus.request(
                stream, lambda number: GatewayOrder(action, fields, deadline, self._registry.id, number)
            )
        finally:
            with contextlib.suppress(RedisError, OSError):  # a gateway that died no longer reads it
                await self._backend.commands.pexpire(stream, STREAM_TTL_MS)

    async def receive(self) -> None:
        """Carry out what other gateways order, until cancelled."""
        # The id is looked up for each read: a gateway that was considered dead continues under another one.
        inbox = Inbox(self._backend, lambda: self._backend.keys.orders(self._registry.id))
        while True:
            try:
                records = await inbox.read()
            except (RedisError, OSError) as error:
                log.warning("orders_not_read", error=str(error))
                await asyncio.sleep(0.2)
                continue
            for record in records:
                self._received(GatewayOrder(*unpack(record)))

    def _received(self, order: GatewayOrder) -> None:
        if order.deadline < self._registry.now_ms():
            return  # the sender has given up
        try:
            if order.action not in frozenset[str](OrderAction):  # of a later release
                raise UnsupportedAction(f"this gateway does not know the order {order.action!r}")
            reply = Reply(order.number, self.obey(OrderAction(order.action), order.fields), None)
        except RequestError as error:
            reply = Reply(order.number, None, error.as_frame(None))
        self._answers.send({order.reply_to: [reply]})


def no_connection(connection: str) -> NotFound:
    return NotFound(f"there is no connection {connection[:100]!r}")


def _refuse(action: OrderAction, fields: dict[str, Any]) -> JSON:
    raise no_connection(str(fields.get("connection")))
