"""Rechecks: when a membership ends or changes, the user's connections ask again which topics they may follow.

The store publishes the user in the commit that ends the membership. This overtakes the entry in the user's feed, which
waits for the broadcaster. The announcement may be lost. The entry asks for the recheck again, so the announcement
only makes it faster.
"""

from __future__ import annotations

import asyncio

import structlog
from redis.exceptions import RedisError

from tidewire.app import App
from tidewire.audiences import Members, Peers
from tidewire.redis.backend import Backend

from .feeds import Feeds

log = structlog.get_logger(__name__)

RETRY_S = 0.2


def is_needed(app: App) -> bool:
    """Whether the right to follow a topic depends on a membership."""
    parts = (part for topic in app.topics.values() for part in topic.followers.parts())
    return any(isinstance(part, Members | Peers) for part in parts)


class Rechecks:
    """Receives the announcements of all partitions."""

    def __init__(self, backend: Backend, feeds: Feeds) -> None:
        self._backend = backend
        self._feeds = feeds
        self._subscriber = backend.subscriber(self._on_message)

    async def run(self) -> None:
        """Receive until cancelled."""
        keys = self._backend.keys
        async with asyncio.TaskGroup() as group:
            group.create_task(self._subscriber.run(), name="rechecks")
            for partition in range(keys.partitions):
                await self._subscribe(keys.rechecks(partition))

    async def _subscribe(self, channel: bytes) -> None:
        while True:
            try:
                await self._subscriber.subscribe(channel)
                return
            except (RedisError, OSError) as error:
                log.warning("rechecks_not_heard", error=str(error))
                await asyncio.sleep(RETRY_S)

    def _on_message(self, channel: bytes, data: bytes | None) -> None:
        if data is not None:
            self._feeds.recheck(self._backend.keys.user_feed(data.decode()))
