"""The subscriptions of one connection: the user's own feed and topics, each from its own cursor.

A subscription is live, or it catches up. A live one receives the frames that its feed gathers. One that catches up
reads the feed from its cursor, as fast as the peer takes the frames: after a resume, or when the peer was too slow. The
feed in Redis is the queue, so the gateway keeps no long one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tidewire.errors import BadRequest, NotFound, PermissionDenied, RequestError
from tidewire.model.claims import holds
from tidewire.model.feeds import Cursor, FeedEntry, Reset, follow_on
from tidewire.model.protocol import MAX_TOPICS, Follow
from tidewire.model.records import RECHECK, Principal
from tidewire.tasks import end

from .core import Core
from .deadline import Deadline
from .feeds import Feed
from .frames import FeedFrame, Gathered
from .peers import Mark

WHOLE_FEED = 1 << 40
"""A limit above the size of any feed."""
REFUSED_CURSOR = Cursor("0", 0, "0")
"""A cursor that no feed accepts."""


class Outlet(Protocol):
    """What subscriptions need of their connection."""

    binary: bool
    principal: Principal
    write_gathered: Callable[[Gathered], None]
    """Queues all of these frames without waiting."""

    def full(self) -> bool:
        """Whether the peer is so slow that nothing more is queued for it."""

    def encode(self, frame: Any) -> bytes:
        """Encode a frame for the peer."""

    def write(self, data: bytes, *marks: Mark) -> None:
        """Queue an encoded frame without waiting."""

    async def send(self, frame: Any, *marks: Mark) -> None:
        """Send a frame, waiting while the peer is slow."""

    async def send_encoded(self, data: bytes, *marks: Mark) -> None:
        """Send an encoded frame, waiting while the peer is slow."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Start a task that ends with the connection; None if the connection has ended."""


@dataclass(eq=False)
class Subscription:
    """A connection's position in one feed. While `live`, the feed delivers; else `Subscriptions.catch_up` reads."""

    owner: Subscriptions
    feed: Feed
    cursor: Cursor
    live: bool = False
    replay: asyncio.Task[None] | None = None
    """The task that reads the feed for it."""

    def deliver(self, gathered: Gathered) -> None:
        if self.owner.outlet.full():
            self._fall_behind()
        elif gathered.for_all and gathered.follow_on(self.cursor):
            self.cursor = gathered.last
            self.owner.outlet.write_gathered(gathered)
        else:
            self._deliver_each(gathered)

    def _deliver_each(self, gathered: Gathered) -> None:
        """Deliver the frames that this peer lacks, and that are for it."""
        for frame in gathered.frames:
            if frame.cursor.epoch != self.cursor.epoch or frame.cursor.seq <= self.cursor.seq:
                continue  # it was reset, or the replay has sent the frame already
            if frame.cursor.seq != self.cursor.seq + 1:
                self._fall_behind()  # too much had gathered
                return
            self.cursor = frame.cursor
            if self.owner.accepts(frame):
                self.owner.outlet.write(frame.encoded(binary=self.owner.outlet.binary), frame.mark)

    def start_over(self, reset: Reset) -> None:
        if self.feed.topic is None:
            self.owner.on_reset()
        if self.owner.outlet.full():
            self._fall_behind()  # it will find the reset when it reads the feed
        else:
            frame, mark = self.owner.begin_again(self, reset)
            self.owner.outlet.write(self.owner.outlet.encode(frame), mark)

    def recheck(self) -> None:
        self.owner.recheck()

    def _fall_behind(self) -> None:
        self.live = False
        self.replay = self.owner.outlet.spawn(self.owner.catch_up(self))


@dataclass
class Resumption:
    """How a subscription begins: with what its cursor missed, or with a reset."""

    subscription: Subscription
    missed: list[FeedFrame] = field(default_factory=list)
    reset: Reset | None = None
    resumed: bool = False


@dataclass
class Openings:
    """All subscriptions that a connection begins with."""

    own: Resumption
    topics: list[Resumption]
    refused: list[RequestError]
    """Why the connection does not follow other topics that it asked for."""


class Subscriptions:
    """All subscriptions of one connection."""

    def __init__(self, core: Core, outlet: Outlet, deadline: Deadline) -> None:
        self.outlet = outlet
        self.on_reset: Callable[[], None] = lambda: None
        """Called when the user's own feed begins again: Redis may have lost the connection's item too."""
        self._core = core
        self._deadline = deadline
        self._by_topic: dict[str | None, Subscription] = {}  # None: the user's own feed
        self._changing = asyncio.Lock()  # held by whoever adds or removes subscriptions
        self._recheck_due = False  # a recheck is due, and has not begun

    # ── begin and end ───────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, cursor: str | None, topics: dict[str, str]) -> Openings:
        """Subscribe to the user's feed and to topics, and read what was missed since their cursors."""
        keys, principal = self._core.backend.keys, self.outlet.principal
        refused: list[RequestError] = []
        own = await self._subscribe(keys.user_feed(principal.user), None, cursor)
        granted = self._core.topics.granted(principal)
        opened = [await self._subscribe(keys.topic_feed(topic), topic, topics.get(topic)) for topic in granted]
        for topic in sorted(topics.keys() - granted):
            try:
                self._deadline.step = f"the store to say who may follow {topic[:200]!r}"
                with _about(topic):
                    await self._core.topics.check(principal, topic)
                opened.append(await self._subscribe(keys.topic_feed(topic), topic, topics[topic]))
            except (BadRequest, NotFound, PermissionDenied) as error:
                refused.append(error)
        return Openings(own, opened, refused)

    async def start(self, opened: Openings) -> None:
        """After the welcome: send what was missed, then go live."""
        for refusal in opened.refused:
            await self.outlet.send(refusal.as_frame(None))
        for resumption in opened.topics:
            self._replay_in_background(resumption)
        await self._resume(opened.own)

    async def close(self) -> None:
        """Leave all feeds. The connection's tasks have been cancelled."""
        subscriptions = list(self._by_topic.values())
        for subscription in subscriptions:
            subscription.live = False
            subscription.feed.followers.discard(subscription)
        await asyncio.gather(*(self._core.feeds.leave(subscription.feed) for subscription in subscriptions))

    async def _subscribe(self, feed_key: bytes, topic: str | None, cursor: str | None) -> Resumption:
        self._deadline.step = f"the feed {feed_key.decode(errors='replace')[:200]} to be opened and subscribed to"
        feed = await self._core.feeds.follow(feed_key, topic)
        assert feed.head
        subscription = Subscription(self, feed, feed.head)
        self._by_topic[topic] = subscription
        return await self._missed(subscription, cursor)

    async def _missed(self, subscription: Subscription, cursor: str | None) -> Resumption:
        """Move the subscription to a cursor, and read what follows, or the reset.

        A refused cursor stays that of the subscription until the reset is sent. A client that reconnects before it has
        received the reset presents the same cursor, and is refused again.
        """
        feed = subscription.feed
        assert feed.head
        if not cursor:
            subscription.cursor = feed.head
            return Resumption(subscription)
        parsed = Cursor.parse(cursor)
        if parsed is None:
            subscription.cursor = REFUSED_CURSOR
            return Resumption(subscription, reset=Reset("cursor_unknown", feed.head))
        self._deadline.step = f"the feed {feed.key.decode(errors='replace')[:200]} to be read"
        # All of it at once, so that the welcome can say `replayed`: a feed is bounded.
        page = await self._core.feeds.read(feed, parsed, WHOLE_FEED, WHOLE_FEED)
        subscription.cursor = parsed
        return Resumption(subscription, frames_of(subscription, page.entries), page.reset, resumed=page.reset is None)

    async def _resume(self, resumption: Resumption) -> None:
        """Send what was missed, then go live."""
        if resumption.reset:
            await self.outlet.send(*self.begin_again(resumption.subscription, resumption.reset))
        await self._replay(resumption.subscription, resumption.missed)
        resumption.subscription.feed.followers.add(resumption.subscription)
        await self.catch_up(resumption.subscription)

    async def catch_up(self, subscription: Subscription) -> None:
        """Read the feed from the subscription's cursor, as fast as the peer takes it, until it is live."""
        feed = subscription.feed
        while feed.head != subscription.cursor:
            page = await self._core.feeds.read(feed, subscription.cursor)
            if page.reset:
                if feed.topic is None:
                    self.on_reset()
                await self.outlet.send(*self.begin_again(subscription, page.reset))
            await self._replay(subscription, frames_of(subscription, page.entries))
            if feed.head and page.at_end and feed.head != subscription.cursor:
                await self._core.feeds.repair(feed)  # the stream is ahead of what was announced here
        # Nothing is awaited between the comparison and this: no entry can have come between.
        subscription.live = True

    async def _replay(self, subscription: Subscription, frames: list[FeedFrame]) -> None:
        self._core.charge(self.outlet.principal, sum(len(frame.json) for frame in frames))
        for frame in frames:
            if self.accepts(frame):
                await self.outlet.send_encoded(frame.encoded(binary=self.outlet.binary), frame.mark)
            subscription.cursor = frame.cursor

    def begin_again(self, subscription: Subscription, reset: Reset) -> tuple[dict[str, Any], Mark]:
        """Move the cursor past the lost entries, and return the frame of the reset."""
        topic, subscription.cursor = subscription.feed.topic, reset.cursor
        if topic is None:
            self.recheck()  # an entry that asked for it may be among the missed ones
        return reset_frame(reset, topic), (topic, str(reset.cursor))

    def accepts(self, frame: FeedFrame) -> bool:
        """Whether the peer gets the frame. A frame for the gateway itself is acted on, and not sent."""
        if frame.type == RECHECK:
            self.recheck()
        return self.concerns(frame)

    def concerns(self, frame: FeedFrame) -> bool:
        """Whether the frame is for this connection's peer."""
        return frame.type != RECHECK and (
            frame.condition is True or holds(frame.condition, self.outlet.principal.claims)
        )

    # ── topics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def follow(self, request: Follow) -> None:
        """Reply, then send what follows on the cursor. A topic that is followed already is rewound to it.

        Raises BadRequest, NotFound or PermissionDenied.
        """
        async with self._changing:  # so that a recheck comes before the question or after the answer
            with _about(request.topic):
                await self._core.topics.check(self.outlet.principal, request.topic)
            subscription = self._by_topic.get(request.topic)
            resumption: Resumption | None = None
            if subscription is None:
                if len(self._by_topic) > MAX_TOPICS:
                    raise BadRequest(f"a connection follows at most {MAX_TOPICS} topics", topic=request.topic)
                feed_key = self._core.backend.keys.topic_feed(request.topic)
                resumption = await self._subscribe(feed_key, request.topic, request.cursor)
                subscription = resumption.subscription
            elif request.cursor is not None:
                await self._pause(subscription)
                resumption = await self._missed(subscription, request.cursor)
            if request.id is not None:
                result = {"topic": request.topic, "cursor": str(subscription.cursor)}
                await self.outlet.send({"type": "reply", "id": request.id, "result": result})
            if resumption:
                self._replay_in_background(resumption)

    async def unfollow(self, topic: str) -> dict[str, Any]:
        """Leave a topic, and return the cursor to come back with. Raises NotFound."""
        async with self._changing:
            subscription = self._by_topic.get(topic)
            if subscription is None:
                raise NotFound(f"this connection does not follow {topic[:200]!r}")
            await self._leave(subscription)
            return {"topic": topic, "cursor": str(subscription.cursor)}

    def recheck(self) -> None:
        """Ask the store again which topics the user may follow. None of them delivers until its answer is there."""
        if self._recheck_due:
            return  # the recheck that is due begins after this call
        self._recheck_due = True
        for subscription in self._by_permission():
            subscription.live = False
        self.outlet.spawn(self._leave_forbidden())

    async def claims_changed(self, before: Principal) -> None:
        """After a renewal with other claims: follow the topics of the new ones, and leave those of the old ones."""
        async with self._changing:
            granted = self._core.topics.granted(self.outlet.principal)
            for topic in self._core.topics.granted(before) - granted:
                if topic in self._by_topic:
                    await self._leave(self._by_topic[topic])
            for topic in sorted(granted - self._by_topic.keys()):
                feed_key = self._core.backend.keys.topic_feed(topic)
                self._replay_in_background(await self._subscribe(feed_key, topic, None))
        await self._leave_forbidden()

    def _by_permission(self) -> list[Subscription]:
        """The subscriptions to topics that not every user may follow."""
        granted, topics = self._core.topics.granted(self.outlet.principal), self._core.topics
        return [
            subscription
            for topic, subscription in self._by_topic.items()
            if topic is not None and topic not in granted and not topics.open_to_all(topic)
        ]

    async def _leave_forbidden(self) -> None:
        """Leave the topics that the user may no longer follow, and tell the peer."""
        async with self._changing:
            self._recheck_due = False
            paused = self._by_permission()
            for subscription in paused:
                await self._pause(subscription)
            for subscription in paused:
                topic = str(subscription.feed.topic)
                try:
                    with _about(topic):
                        await self._core.topics.check(self.outlet.principal, topic)
                except (NotFound, PermissionDenied) as error:
                    await self._leave(subscription)
                    await self.outlet.send(reset_frame(Reset("cursor_expired", subscription.cursor), topic))
                    await self.outlet.send(error.as_frame(None))
                else:
                    subscription.feed.followers.add(subscription)
                    subscription.replay = self.outlet.spawn(self.catch_up(subscription))

    def _replay_in_background(self, resumption: Resumption) -> None:
        resumption.subscription.replay = self.outlet.spawn(self._resume(resumption))

    async def _pause(self, subscription: Subscription) -> None:
        """Deliver nothing more of the feed until the subscription catches up again."""
        subscription.live = False
        subscription.feed.followers.discard(subscription)
        if subscription.replay:
            await end([subscription.replay])
            subscription.replay = None

    async def _leave(self, subscription: Subscription) -> None:
        await self._pause(subscription)
        del self._by_topic[subscription.feed.topic]
        await self._core.feeds.leave(subscription.feed)


def frames_of(subscription: Subscription, entries: list[FeedEntry]) -> list[FeedFrame]:
    """Make frames of the entries that follow on the subscription's cursor. `Feeds.read` has checked the chain."""
    frames, cursor = [], subscription.cursor
    for entry in entries:
        following = follow_on(cursor, entry)
        assert following
        cursor = following
        frames.append(FeedFrame(cursor, entry, subscription.feed.topic))
    return frames


@contextlib.contextmanager
def _about(topic: str) -> Iterator[None]:
    """Name the topic in the details of an error."""
    try:
        yield
    except RequestError as error:
        error.details = error.details | {"topic": topic}
        raise


def reset_frame(reset: Reset, topic: str | None) -> dict[str, Any]:
    """The frame of a reset."""
    frame = {"type": "reset", "reason": reset.reason, "cursor": str(reset.cursor)}
    return frame | ({"topic": topic} if topic is not None else {})
