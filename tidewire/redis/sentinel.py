"""A stage on the master that sentinels name."""

from __future__ import annotations

from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from tidewire.redis.addresses import SentinelsAddress
from tidewire.redis.backend import CONNECTING
from tidewire.redis.cluster_wire import Address
from tidewire.redis.connection import reconnect_when_closed
from tidewire.redis.keys import Keys
from tidewire.redis.masters import MAX_LOOK_S, REPLACED, MasterWatch, break_connections
from tidewire.redis.wire import Wire

log = structlog.get_logger(__name__)


class SentinelBackend(MasterWatch):
    """A stage on the master that sentinels name. They are asked for each new connection, and every second.

    After an operator's `SENTINEL FAILOVER`, the old master stays writable until the sentinels make it a replica, ten
    seconds later or more. Writes that it accepts meanwhile are lost. A connection that was being made during the
    failover may have gone to the old master, so each check drops every connection to another server.
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

        login: dict[str, Any] = {"username": address.username, "password": address.password}
        client: Redis = self._sentinels.master_for(address.service, **login, **CONNECTING)
        self._master: Address | None = None
        self._master_wire = Wire(reconnect_when_closed(client).connection_pool.make_connection)
        super().__init__(client, keys, self._master_wire)

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
            self._master_wire.lose("the sentinels name another master")
            self._moved()
        self._master = found
        self._master_wire.lose("this is not the master that the sentinels name", unless_at=found)
        break_connections(self._listening, unless_at=found)
