"""redis-py's commands, sent over a wire."""

from __future__ import annotations

from typing import Any

from redis.asyncio import ConnectionPool, Redis

from tidewire.redis.cluster_wire import ClusterWire
from tidewire.redis.wire import Wire


class WireClient(Redis):
    """redis-py's client, for rare commands of one node. Its commands take the wire instead of its own connections.

    So they are repeated as all calls of a wire are, and go to the current master. redis-py's own cluster
    client keeps a separate map of the slots, and may ask a hung master for it.
    """

    def __init__(self, wire: Wire | ClusterWire, pool: ConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        self._wire = wire

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        answer = (await self._wire.calls([(*args[0].split(), *args[1:])]))[0]
        options.pop("keys", None)  # for redis-py's cache
        callback: Any = self.response_callbacks.get(args[0])
        return callback(answer, **options) if callback else answer

    def pipeline(self, *_: object, **__: object) -> Any:
        """Not available.

        Raises:
            NotImplementedError: always; `Backend.calls` does several commands in one round trip.
        """
        raise NotImplementedError("Backend.calls does several commands in one round trip")
