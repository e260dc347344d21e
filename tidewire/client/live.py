"""Live views: a dict of a partition key's items that stays up to date."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from tidewire.client.live_items import Frame, LiveItems
from tidewire.errors import ConfigurationError, NotFound, RequestError, TidewireError
from tidewire.tasks import end

MAX_LOADS = 5
"""Maximum loads of a view until all of its pages have one position."""
SETTLE_S = 0.5
"""Seconds that such a view waits for frames after its last attempt."""


class Requests(Protocol):
    """The requests of a client that its live views make."""

    topics: dict[str, str]

    async def follow(self, topic: str) -> str:
        """Follow a topic, and return its cursor."""

    async def query(self, table: str, key: Any, **options: Any) -> Frame:
        """Read a page of items."""

    async def get(self, table: str, key: Any) -> Frame:
        """Read an item. Raises NotFound."""


class Live:
    """One live view of a client: it loads the items, applies frames, and yields what the application sees."""

    def __init__(self, client: Requests, items: LiveItems, topic: str | None) -> None:
        self.topic = topic
        self._client = client
        self._items = items
        self._changed = asyncio.Event()
        self._empty = False  # whether an empty view is due, before the items are loaded again
        self._is_loaded = False
        self._load_again = asyncio.Event()
        self._load_again.set()
        self._ended: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    def take(self, frame: Frame) -> None:
        """Apply a frame of the user's feed or of a topic, in the order of arrival."""
        if frame["type"] == "change":
            if self._items.take(frame):
                self._changed.set()
            if self._items.unread:
                self._load_again.set()
        elif frame["type"] == "reset" and self._items.concerns(frame):
            self._items.start_over()
            self._empty, self._is_loaded = True, False
            self._changed.set()
            self._load_again.set()

    def end(self, error: Exception) -> None:
        """Have `views` raise the error."""
        self._ended = error
        self._changed.set()

    async def views(self) -> AsyncIterator[dict[Any, Frame]]:
        """Yield the items whenever they have changed."""
        self._task = asyncio.create_task(self._keep_loaded(), name="live")
        shown: dict[Any, Frame] | None = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._ended:
                raise self._ended
            if self._empty:
                self._empty = False
                if shown:
                    shown = {}
                    yield {}
            if self._is_loaded and self._items.is_whole and (now := self._items.shown()) != shown:
                shown = now
                yield dict(now)

    async def aclose(self) -> None:
        """End the view's task."""
        if self._task:
            await end([self._task])

    async def _keep_loaded(self) -> None:
        try:
            if self.topic is not None and self.topic not in self._client.topics:
                await self._client.follow(self.topic)
            while True:
                await self._load_again.wait()
                self._load_again.clear()
                try:
                    if not self._is_loaded:
                        await self._load()
                    for key in list(self._items.unread):
                        await self._read(key)
                except RequestError as error:
                    if not error.retry:
                        raise
                    self._load_again.set()  # `request` has retried until its time-out: begin again
                self._changed.set()
        except TidewireError as error:
            self.end(error)

    async def _load(self) -> None:
        """Load all pages. Load them again if they are of different moments, up to `MAX_LOADS` times."""
        for more_tries in reversed(range(MAX_LOADS)):
            self._items.start_over()
            begun = self._items.loads
            after: Any = None
            while True:
                bounds = {} if after is None else {"after": after}
                page = await self._client.query(self._items.table, self._items.value, limit=1000, **bounds)
                if self._items.loads != begun:
                    return  # a reset came meanwhile: the caller loads again
                if (partition := page["key"][0]) != self._items.attribute:
                    table, attribute = self._items.table, self._items.attribute
                    raise ConfigurationError(f"table {table!r} has the partition key {partition!r}, not {attribute!r}")
                if self.topic is None and page.get("carried") is False:
                    raise ConfigurationError(_not_carried(self._items.table))
                following = page["next"]
                items = [entry["item"] for entry in page["items"]]
                self._items.page(items, page["key"], page["position"], after, last=following is None)
                if following is None:
                    break
                after = following
            if self._items.is_of_one_moment:
                break
            if not more_tries:
                # The items change all the time. The changes between the pages arrive as frames, so wait for these.
                await asyncio.sleep(SETTLE_S)
                if self._items.loads != begun:
                    return
        self._is_loaded = True

    async def _read(self, key: Any) -> None:
        """Read an item whose frame had no image."""
        items = self._items
        item_key = {items.attribute: items.value} | ({} if items.sort is None else {items.sort: key})
        with contextlib.suppress(NotFound):
            record = await self._client.get(items.table, item_key)
            items.read(key, record["item"], record["version"], record["position"])


def _not_carried(table: str) -> str:
    return (
        f"a live view of table {table!r} would never change: its changes are not in this credential's own feed. "
        "Pass the topic that its readers follow as `topic`, use the credential of a user who is among its readers, or "
        "read the changes with `tidewire changes`"
    )
