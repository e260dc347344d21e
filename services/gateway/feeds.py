"""The feeds that this gateway's connections follow.

The gateway subscribes to the channel of each feed, on which every new entry is announced. A feed has a head: the cursor
of the last entry that this gateway has seen. An announcement of exactly the next entry moves the head, and the entry
goes to all live followers. A later one, or one of another epoch or tag, shows a gap, so the gateway reads the stream. A
follower that is not live (it catches up, or its socket is full) reads the stream by itself until it reaches the head.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple, Protocol

import structlog
from prometheus_client import Counter
from redis.exceptions import RedisError

from tidewire.model.feeds import Announcement, Cursor, FeedEntry, Reset, follow_on, head_of, resume
from tidewire.redis.backend import Backend
from tidewire.redis.keys import Home
from tidewire.tasks import end

from .bodies import Bodies
from .frames import FeedFrame, Gathered
from .passes import Passes

log = structlog.get_logger(__name__)

READ_BATCH = 500
READ_BATCH_BYTES = 1 << 20
"""Maximum entries of a feed that one call reads, and maximum bytes of their bodies. At least one entry is read."""
MAX_WAITING = 1000
"""Maximum announcements of a feed that wait for the body of an entry before them. Beyond it, the feed is read."""
MAX_GATHERED_BYTES = 1 << 20
"""Maximum bytes of frames of a feed that gather for one pass. Beyond it, its followers read the feed."""
FOLLOWERS_BATCH = 16
"""Followers between two looks at the clock."""
CHECK_S = 10.0
"""Seconds between two checks of a feed. A check keeps the feed open, and finds entries whose announcement was lost."""

REPAIRED = Counter("tidewire_gateway_feeds_mended_total", "Feeds read because an announcement may have been missed.")
RESETS = Counter("tidewire_gateway_resets_total", "Resets of whole feeds while they were followed.", ["reason"])


class Follower(Protocol):
    """A subscription, as its feed sees it."""

    live: bool
    cursor: Cursor

    def deliver(self, gathered: Gathered) -> None:
        """Send the frames now, or stop being live."""

    def start_over(self, reset: Reset) -> None:
        """Send a reset: entries are lost."""

    def recheck(self) -> None:
        """Ask the store again whether the user may still follow the topics of this connection."""


class Feed:
    """One feed that connections of this gateway follow. `topic` is None for a user's own feed."""

    def __init__(self, home: Home, key: bytes, topic: str | None, passes: Passes) -> None:
        self._passes = passes
        self._gathered: list[FeedFrame] = []
        self._gathered_bytes = 0
        self.home = home
        self.key = key
        self.topic = topic
        self.head: Cursor | None = None
        self.followers: set[Follower] = set()
        self.users = 0  # calls of `Feeds.follow` without their `leave`
        self.subscribed = asyncio.Event()
        self.ready: asyncio.Task[None] | None = None
        self.stale = False  # an entry was announced that the head does not contain
        self.repairing = asyncio.Lock()
        self.waiting: list[Announcement] = []  # behind an entry whose body is being fetched, in order

    def advance(self, cursor: Cursor, entry: FeedEntry) -> None:
        """Move the head over the next entry, and have it delivered in the next pass."""
        self.head = cursor
        if not any(follower.live for follower in self.followers):
            self._gathered, self._gathered_bytes = [], 0
            return  # who becomes live later has read the feed up to its head
        frame = FeedFrame(cursor, entry, self.topic)
        self._gathered_bytes += len(frame.json)
        if self._gathered_bytes > MAX_GATHERED_BYTES:
            self._gathered.clear()  # the followers find a gap, and continue from the feed
            self._gathered_bytes = len(frame.json)
        self._gathered.append(frame)
        self._passes.add(self)

    def deliver(self) -> Iterator[None]:
        """Deliver what has gathered to the live followers, yielding after every few."""
        frames, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if not frames:
            return
        gathered = Gathered(frames)
        for number, follower in enumerate([follower for follower in self.followers if follower.live], 1):
            if follower.live:  # it may have ended in the meantime
                follower.deliver(gathered)
            if number % FOLLOWERS_BATCH == 0:
                yield

    def reset(self, reset: Reset) -> None:
        """Move the head to the cursor of a reset, and tell all live followers."""
        RESETS.labels(reset.reason).inc()
        for _ in self.deliver():
            pass  # what came before the reset
        self.head = reset.cursor
        for follower in [follower for follower in self.followers if follower.live]:
            follower.start_over(reset)


class FeedPage(NamedTuple):
    """The result of one read of a feed: entries with their bodies, or a reset."""

    entries: list[FeedEntry]
    reset: Reset | None
    at_end: bool
    """Whether the feed had no further entries at that moment."""


class Feeds:
    """All feeds of this gateway, and the subscriber to their channels."""

    def __init__(self, backend: Backend, window_s: float) -> None:
        self._backend = backend
        self._window_ms = int(window_s * 1000)
        self._feeds: dict[bytes, Feed] = {}
        self._passes = Passes()
        self._bodies = Bodies(backend)
        self._fetching: dict[bytes, list[Feed]] = {}  # by id of a body: feeds whose entry refers to it
        self._subscriber = backend.subscriber(self._on_message)
        self._tasks: set[asyncio.Task[None]] = set()

    async def follow(self, key: bytes, topic: str | None) -> Feed:
        """Open a feed, subscribe to it, and learn its head. Each call needs a `leave`. Raises redis-py's errors."""
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = Feed(self._backend.keys.home_of(key), key, topic, self._passes)
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
        """Undo one `follow`. After the last, the feed stays open for the resume window, and then closes by itself."""
        feed.users -= 1
        if feed.users or self._feeds.get(feed.key) is not feed:
            return
        del self._feeds[feed.key]
        if feed.ready:
            feed.ready.cancel()
        with contextlib.suppress(RedisError, OSError):
            await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
        if feed.key not in self._feeds:  # no connection has followed it meanwhile
            with contextlib.suppress(RedisError, OSError):
                await self._subscriber.unsubscribe(feed.key)

    def recheck(self, user_feed: bytes) -> None:
        """Recheck the topics of all connections of a user.

        The user is named by its feed's key.
        """
        feed = self._feeds.get(user_feed)
        for follower in list(feed.followers) if feed else ():
            follower.recheck()

    async def read(
        self, feed: Feed, cursor: Cursor, count: int = READ_BATCH, size_bytes: int = READ_BATCH_BYTES
    ) -> FeedPage:
        """Read the entries after a cursor, or the reset if the feed cannot prove that these are all."""
        state, entries = await self._backend.functions.feed_read(feed.home, feed.key, cursor.seq, count, size_bytes)
        if not state.epoch:  # the feed has closed meanwhile
            state = await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
            entries = []
        reset = resume(cursor, state, entries)
        whole = [] if reset else await self._bodies.all_whole(feed.home, entries)
        if None in whole:
            reset = Reset("feed_trimmed", head_of(state))
        if reset:
            return FeedPage([], reset, at_end=True)
        at_end = not entries or entries[-1].seq == state.seq
        return FeedPage([entry for entry in whole if entry], None, at_end)

    async def repair(self, feed: Feed) -> None:
        """Read what follows on the head, and deliver it to the live followers."""
        async with feed.repairing:
            while feed.head:
                feed.stale = False
                page = await self.read(feed, feed.head)
                if page.reset:
                    feed.reset(page.reset)
                for entry in page.entries:
                    cursor = follow_on(feed.head, entry)
                    assert cursor  # `read` has checked the chain
                    feed.advance(cursor, entry)
                if page.at_end and not feed.stale:
                    return

    async def receive(self) -> None:
        """Receive announcements, until cancelled."""
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
            await self.repair(feed)

    def _on_message(self, channel: bytes, data: bytes | None) -> None:
        feed = self._feeds.get(channel)
        if feed is None:
            return
        if data is not None:
            self._announced(feed, Announcement.parse(data))
        elif feed.subscribed.is_set():  # subscribed again: announcements may have been missed between
            self._repair_soon(feed)
        else:
            feed.subscribed.set()

    def _announced(self, feed: Feed, announcement: Announcement) -> None:
        if feed.head is None or feed.repairing.locked():
            feed.stale = True  # the task that reads the feed reads once more
        elif not feed.waiting:
            self._take(feed, announcement)
        elif len(feed.waiting) < MAX_WAITING:
            feed.waiting.append(announcement)
        else:
            feed.waiting.clear()
            self._repair_soon(feed)

    def _take(self, feed: Feed, announcement: Announcement) -> None:
        """Advance over the announced entry if it is exactly the next one. Fetch its body first if it is not here."""
        head, entry = feed.head, announcement.entry
        assert head
        if announcement.epoch == head.epoch and entry.seq <= head.seq:
            return  # a read of the stream has delivered it
        cursor = follow_on(head, entry) if announcement.epoch == head.epoch else None
        if cursor is None:
            self._repair_soon(feed)
        elif whole := self._bodies.whole(entry):
            feed.advance(cursor, whole)
        else:
            feed.waiting.append(announcement)
            self._fetch_soon(feed, entry)

    def _fetch_soon(self, feed: Feed, entry: FeedEntry) -> None:
        """Fetch the body of an entry, once for all feeds that wait for it. Then continue with each of them."""

        async def fetch() -> None:
            while True:
                try:
                    await self._bodies.all_whole(feed.home, [entry])
                    break
                except (RedisError, OSError) as error:
                    log.warning("body_not_fetched", error=str(error))
                    await asyncio.sleep(0.2)
            for waiting in self._fetching.pop(entry.body):
                self._continue(waiting)

        if feeds := self._fetching.get(entry.body):
            feeds.append(feed)
            return
        self._fetching[entry.body] = [feed]
        self._spawn(fetch(), "bodies")

    def _continue(self, feed: Feed) -> None:
        waiting, feed.waiting = feed.waiting, []
        if waiting and self._bodies.whole(waiting[0].entry) is None:
            self._repair_soon(feed)  # the body is gone: the read finds this out, and resets
            return
        for announcement in waiting:
            self._announced(feed, announcement)

    def _repair_soon(self, feed: Feed) -> None:
        async def repair() -> None:
            while True:
                try:
                    await self.repair(feed)
                    return
                except (RedisError, OSError) as error:
                    log.warning("feed_not_repaired", error=str(error))
                    await asyncio.sleep(0.2)

        if feed.head is None or feed.repairing.locked():
            feed.stale = True  # the task that reads the feed reads once more
            return
        REPAIRED.inc()
        self._spawn(repair(), "repair")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def check(self) -> None:
        """Check each feed every `CHECK_S` seconds, until cancelled."""
        while True:
            await asyncio.sleep(min(CHECK_S, self._window_ms / 3000))
            homes: dict[Home, list[Feed]] = {}
            for feed in self._feeds.values():
                homes.setdefault(feed.home, []).append(feed)
            # Partitions are checked concurrently: one whose node does not answer delays no other.
            await asyncio.gather(*map(self._check_feeds, homes.values()))

    async def _check_feeds(self, feeds: list[Feed]) -> None:
        for feed in feeds:
            head = feed.head
            if head is None or not feed.users:
                continue
            try:
                state = await self._backend.functions.feed_open(feed.home, feed.key, self._window_ms)
            except (RedisError, OSError) as error:
                log.warning("feeds_not_checked", partition=feed.home.partition.decode(), error=str(error))
                return
            now = head_of(state)
            # While the state was read, announcements may have moved the head beyond it: that is no fault. Another
            # epoch, or fewer entries than the head had before, means that Redis has lost entries.
            if (
                feed.head
                and feed.head != now
                and (now.epoch != head.epoch or now.seq < head.seq or now.seq >= feed.head.seq)
            ):
                self._repair_soon(feed)
