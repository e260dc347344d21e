"""Large bodies of feed entries.

Each is stored once in its partition, and a gateway fetches it once for all connections.
"""

from __future__ import annotations

from collections import OrderedDict

from prometheus_client import Counter

from tidewire.model.feeds import FeedEntry
from tidewire.redis.backend import Backend
from tidewire.redis.functions import referred
from tidewire.redis.keys import Home

MAX_KEPT_BYTES = 32 << 20
"""Maximum bytes of bodies that a gateway keeps in memory. The one that was looked up longest ago is evicted first."""

FETCHED = Counter("tidewire_gateway_bodies_fetched_total", "Large bodies fetched for entries that refer to them.")
GONE = Counter("tidewire_gateway_bodies_gone_total", "Large bodies that were gone when a reader needed them.")


class Bodies:
    """A cache of bodies.

    The id of a body is a digest of its position and content, so a cached one is never out of date.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._size_bytes = 0

    def whole(self, entry: FeedEntry) -> FeedEntry | None:
        """Return the entry with its body, or None if the body must be fetched first."""
        id_ = referred(entry.body)
        if id_ is None:
            return entry
        body = self._kept.get(id_)
        if body is None:
            return None
        self._kept.move_to_end(id_)
        return entry._replace(body=body)

    async def all_whole(self, home: Home, entries: list[FeedEntry]) -> list[FeedEntry | None]:
        """Fetch the bodies of entries.

        The result has None for an entry whose body is gone. Raises redis-py's errors.
        """
        bodies: dict[bytes, bytes | None] = {}
        for entry in entries:
            id_ = referred(entry.body)
            if id_ is not None:
                bodies[id_] = self._kept.get(id_)
        if missing := [id_ for id_, body in bodies.items() if body is None]:
            found = await self._backend.functions.body_get(home, missing)
            for id_, body in zip(missing, found, strict=True):
                bodies[id_] = body
                if body is None:
                    GONE.inc()
                else:
                    FETCHED.inc()
                    self._keep(id_, body)
        whole: list[FeedEntry | None] = []
        for entry in entries:
            id_ = referred(entry.body)
            body = entry.body if id_ is None else bodies[id_]
            whole.append(None if body is None else entry._replace(body=body))
        return whole

    def _keep(self, id_: bytes, body: bytes) -> None:
        if id_ in self._kept:
            return  # another fetch was faster
        self._kept[id_] = body
        self._size_bytes += len(body)
        while self._size_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            _, evicted = self._kept.popitem(last=False)
            self._size_bytes -= len(evicted)
