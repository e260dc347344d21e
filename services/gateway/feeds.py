"""The feeds that this gateway's connections follow: opened, subscribed to, kept open, and mended.

A feed has a head: the cursor of its last entry seen here. An announcement that is the very next one moves the head and
goes to all live followers; one that is not says that something was missed, and the stream is read. A follower that is
not live (it replays, or its socket is full) reads the stream for itself, which is the queue, until it is at the head.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol

import structlog
from prometheus_client import Counter
from redis.exceptions import RedisError

from tidewire.model.feeds import Announcement, Cursor, FeedEntry, Reset, follow_on, head_of, resume
from tidewire.model.protocol import feed_frame, json_to_msgpack
from tidewire.model.records import FeedBody, unpack
from tidewire.redis.backend import Backend
from tidewire.redis.functions import LARGE_BODY_BYTES
from tidewire.redis.keys import Home
from tidewire.tasks import end

from .bodies import Bodies

log = structlog.get_logger(__name__)

READ_BATCH = 500
READ_BATCH_BYTES = 1 << 20
"""Entries of a feed that one call reads, and bytes of their bodies; at least one entry."""
MAX_WAITING = 1000
"""Announcements of a feed that are kept while the body of an entry before them is fetched. Beyond, the feed is read."""
LOOK_S = 10.0
"""Each feed is looked at so often: that keeps it open, and shows what a lost announcement hid."""

MENDED = Counter("tidewire_gateway_feeds_mended_total", "Feeds read because an announcement may have been missed.")
RESETS = Counter("tidewire_gateway_resets_total", "Resets of whole feeds while they were followed.", ["reason"])


@functools.lru_cache(maxsize=32)
def _large(body: bytes) -> FeedBody:
    """A large body, which mostly goes to many feeds. A bytes object keeps its hash, so a hit costs no pass over it."""
    return FeedBody(*unpack(body))


def _body(body: bytes) -> FeedBody:
    return _large(body) if len(body) > LARGE_BODY_BYTES else FeedBody(*unpack(body))


class Frame:
    """One entry as a frame, encoded at most once for each encoding, however many connections get it."""

    __slots__ = ("_msgpack", "asks", "cursor", "json", "mark", "type")

    def __init__(self, cursor: Cursor, entry: FeedEntry, topic: str | None) -> None:
        body = _body(entry.body)
        self.cursor = cursor
        self.mark = (topic, str(cursor))
        self.type = body.type
        self.asks = body.asks
        """What the claims of a connection must meet that gets it."""
        self.json = feed_frame(body, self.mark[1], topic)
        self._msgpack: bytes | None = None

    def encoded(self, *, binary: bool) -> bytes:
        if not binary:
            return self.json
        if self._msgpack is None:
            self._msgpack = json_to_msgpack(self.json)
        return self._msgpack


class Follower(Protocol):
    """A connection's place in a feed."""

    live: bool
    cursor: Cursor

    def deliver(self, frame: Frame) -> None:
        """Send it now, or stop being live."""

    def start_over(self, reset: Reset) -> None:
        """Tell that what was missed cannot be told."""

    def look_again(self) -> None:
        """Ask again whether the user may still follow the topics of this connection."""


class Feed:
    """One feed as followed here. `topic` is None for a user's own."""

    def __init__(self, home: Home, key: bytes, topic: str | None) -> None:
        self.home = home
        self.key = key
        self.topic = topic
        self.head: Cursor | None = None
        self.followers: set[Follower] = set()
        self.users = 0  # who asked for it and has not left
        self.subscribed = asyncio.Event()
        self.ready: asyncio.Task[None] | None = None
        self.stale = False  # something was announced that the head does not know
        self.mending = asyncio.Lock()
        self.waiting: list[Announcement] = []  # behind an entry whose body is being fetched

    def advance(self, cursor: Cursor, entry: FeedEntry) -> None:
        self.head = cursor
        live = [follower for follower in self.followers if follower.live]
        if live:
            frame = Frame(cursor, entry, self.topic)
            for follower in live:
                follower.deliver(frame)

    def reset(self, reset: Reset) -> None:
        RESETS.labels(reset.reason).inc()
        self.head = reset.cursor
        for follower in [follower for follower in self.followers if follower.live]:
            follower.start_over(reset)


class Reading(NamedTuple):
    """What one read of a feed has found."""

    entries: list[FeedEntry]  # with their bodies
    reset: Reset | None
    at_end: bool  # whether there was nothing more at that moment


class Feeds:
    """All of them, and the one subscriber behind them."""

    def __init__(self, backend: Backend, window_s: float) -> None:
        self._backend = backend
        self._window_ms = int(window_s * 1000)
        self._feeds: dict[bytes, Feed] = {}
        self._bodies = Bodies(backend)
        self._fetching: dict[bytes, list[Feed]] = {}  # by id of a body: feeds whose entry refers to it
        self._subscriber = backend.subscriber(self._heard)
        self._tasks: set[asyncio.Task[None]] = set()

    async def follow(self, key: bytes, topic: str | None) -> Feed:
        """The feed, open, subscribed to, with its head known. Each call needs a `leave`."""
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = Feed(self._backend.keys.home_of(key), key, topic)
            feed.ready = asyncio.create_task(self._start(feed), name="feed")
        feed.users += 1
        assert feed.ready
        try:
            await asyncio.shield(feed.ready)
        except BaseException:
            await self.leave(feed)
            raise
        return feed

    async def leave(self, feed: Feed) -> None:
        """The feed stays open for the resume window, then closes by itself."""
        feed.users -= 1
        if feed.users or self._feeds.get(feed.key) is not feed:
            return
        del self._feeds[feed.key]
        if feed.ready:
            feed.ready.cancel()
        with contextlib.suppress(RedisError, OSError):
            await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
        if feed.key not in self._feeds:  # nobody came meanwhile
            with contextlib.suppress(RedisError, OSError):
                await self._subscriber.unsubscribe(feed.key)

    def look_again(self, user_feed: bytes) -> None:
        """Have the connections that follow a user's feed ask again what else they may follow."""
        feed = self._feeds.get(user_feed)
        for follower in list(feed.followers) if feed else ():
            follower.look_again()

    async def read(
        self, feed: Feed, cursor: Cursor, count: int = READ_BATCH, size_bytes: int = READ_BATCH_BYTES
    ) -> Reading:
        """Entries after the cursor, as far as they can be proven to be all; else the reset."""
        state, entries = await self._backend.functions.feed_read(feed.home, feed.key, cursor.seq, count, size_bytes)
        if not state.epoch:  # it closed while nobody looked
            state = await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
            entries = []
        reset = resume(cursor, state, entries)
        whole = [] if reset else await self._bodies.all_whole(feed.home, entries)
        if None in whole:
            reset = Reset("feed_trimmed", head_of(state))
        if reset:
            return Reading([], reset, at_end=True)
        at_end = not entries or entries[-1].seq == state.seq
        return Reading([entry for entry in whole if entry], None, at_end)

    async def mend(self, feed: Feed) -> None:
        """Read what follows on the head, and give it to the live followers."""
        async with feed.mending:
            while feed.head:
                feed.stale = False
                found = await self.read(feed, feed.head)
                if found.reset:
                    feed.reset(found.reset)
                for entry in found.entries:
                    cursor = follow_on(feed.head, entry)
                    assert cursor  # `read` has followed the chain
                    feed.advance(cursor, entry)
                if found.at_end and not feed.stale:
                    return

    async def hear(self) -> None:
        """Hear announcements, until cancelled."""
        try:
            await self._subscriber.run()
        finally:
            await end(self._tasks)

    async def _start(self, feed: Feed) -> None:
        while True:
            await self._subscriber.subscribe(feed.key)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(feed.subscribed.wait(), 2)
                break
        state = await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
        feed.head = head_of(state)
        if feed.stale:
            await self.mend(feed)

    def _heard(self, channel: bytes, data: bytes | None) -> None:
        feed = self._feeds.get(channel)
        if feed is None:
            return
        if data is not None:
            self._announced(feed, Announcement.parse(data))
        elif feed.subscribed.is_set():  # again: something may have been missed
            self._mend_soon(feed)
        else:
            feed.subscribed.set()

    def _announced(self, feed: Feed, announcement: Announcement) -> None:
        if feed.head is None or feed.mending.locked():
            feed.stale = True  # the task that is reading reads once more
        elif not feed.waiting:
            self._take(feed, announcement)
        elif len(feed.waiting) < MAX_WAITING:
            feed.waiting.append(announcement)
        else:
            feed.waiting.clear()
            self._mend_soon(feed)

    def _take(self, feed: Feed, announcement: Announcement) -> None:
        """Advance by the announced entry, when it is the very next one and its body is here."""
        head, entry = feed.head, announcement.entry
        assert head
        if announcement.epoch == head.epoch and entry.seq <= head.seq:
            return  # it was read already
        cursor = follow_on(head, entry) if announcement.epoch == head.epoch else None
        if cursor is None:
            self._mend_soon(feed)
        elif whole := self._bodies.whole(entry):
            feed.advance(cursor, whole)
        else:
            feed.waiting.append(announcement)
            self._fetch_soon(feed, entry)

    def _fetch_soon(self, feed: Feed, entry: FeedEntry) -> None:
        """Fetch the body of an entry, once for all feeds that wait for it; then go on with each of them."""

        async def fetch() -> None:
            while True:
                try:
                    await self._bodies.all_whole(feed.home, [entry])
                    break
                except (RedisError, OSError) as error:
                    log.warning("body_not_fetched", error=str(error))
                    await asyncio.sleep(0.2)
            for waiting in self._fetching.pop(entry.body):
                self._go_on(waiting)

        if feeds := self._fetching.get(entry.body):
            feeds.append(feed)
            return
        self._fetching[entry.body] = [feed]
        self._spawn(fetch(), "bodies")

    def _go_on(self, feed: Feed) -> None:
        waiting, feed.waiting = feed.waiting, []
        if waiting and self._bodies.whole(waiting[0].entry) is None:
            self._mend_soon(feed)  # the body is gone: the read finds that out, and resets
            return
        for announcement in waiting:
            self._announced(feed, announcement)

    def _mend_soon(self, feed: Feed) -> None:
        async def mend() -> None:
            while True:
                try:
                    await self.mend(feed)
                    return
                except (RedisError, OSError) as error:
                    log.warning("feed_not_mended", error=str(error))
                    await asyncio.sleep(0.2)

        if feed.head is None or feed.mending.locked():
            feed.stale = True  # whoever is reading reads once more
            return
        MENDED.inc()
        self._spawn(mend(), "mend")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def look(self) -> None:
        """Look at each feed now and then, until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_S, self._window_ms / 3000))
            homes: dict[Home, list[Feed]] = {}
            for feed in self._feeds.values():
                homes.setdefault(feed.home, []).append(feed)
            # A partition whose node is away keeps no other waiting.
            await asyncio.gather(*map(self._look_at, homes.values()))

    async def _look_at(self, feeds: list[Feed]) -> None:
        for feed in feeds:
            head = feed.head
            if head is None or not feed.users:
                continue
            try:
                state = await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
            except (RedisError, OSError) as error:
                log.warning("feeds_not_looked_at", partition=feed.home.partition.decode(), error=str(error))
                return
            now = head_of(state)
            # It may have gone on meanwhile, and is then ahead of what was read; it may also have gone back.
            if (
                feed.head
                and feed.head != now
                and (now.epoch != head.epoch or now.seq < head.seq or now.seq >= feed.head.seq)
            ):
                self._mend_soon(feed)
