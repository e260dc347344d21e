"""redis-py's connections, made to notice that their transport was closed."""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError


def reconnect_when_closed(client: Redis) -> Redis:
    """Have a client's idle connections reconnect after their transport was closed. Returns the client.

    A transport closes when this process aborts it, when the peer resets the connection, or when TCP keepalive gives up.
    redis-py still treats such a connection as connected. Its next command then fails: on uvloop with a RuntimeError,
    which no caller takes for a lost connection, so that the process would end.
    """
    pool = client.connection_pool
    kind: type[AbstractConnection] = pool.connection_class
    pool.connection_class = type(kind.__name__, (_Noticing, kind), {})
    return client


class _Noticing(AbstractConnection):
    """Mixed into a class of connections."""

    _connects = False

    @property
    def is_connected(self) -> bool:
        writer = self._writer
        return writer is not None and not writer.transport.is_closing()

    async def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        if self.is_connected:
            return
        if self._connects:
            # redis-py would connect again for the next command of the handshake, and then wait for answers to commands
            # that went to the lost connection.
            raise ConnectionError("the connection was lost while it was being made")
        self._connects = True
        try:
            await super().connect_check_health(*args, **kwargs)
        finally:
            self._connects = False

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        await super().disconnect(*args, **kwargs)
        self._reader = self._writer = None  # redis-py keeps them if the transport was closed before
