"""One open connection: its welcome, the feeds it follows, its requests and their answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis.exceptions import RedisError
from websockets.exceptions import ConnectionClosed

from tidewire.errors import BadRequest, Internal, NotFound, Overloaded, PermissionDenied, RequestError, Unauthenticated
from tidewire.model.claims import holds
from tidewire.model.feeds import Cursor, FeedEntry, Reset, follow_on
from tidewire.model.protocol import (
    Auth,
    Follow,
    Get,
    Query,
    Unfollow,
    decode_frame,
    encode_json,
    encode_msgpack,
    id_of_refused,
    parse_request,
    request_id,
)
from tidewire.model.records import RECHECK, Principal
from tidewire.tasks import end

from .budget import Room
from .core import Core
from .deadline import Deadline
from .feeds import Feed, Frame
from .peers import Mark, Peer

log = structlog.get_logger(__name__)

IN_FLIGHT = 64
"""Requests of one connection that wait for their answers; beyond, nothing more is read from it."""
EXPIRING_S = 60.0
ALL = 1 << 40
"""More entries than a feed has, and more bytes."""
NOWHERE = Cursor("0", 0, "0")
"""A cursor that is always refused."""
MAX_TOPICS = 1000
"""That one connection follows."""
CLEARING_S = 60.0
"""Time, in seconds, that a refused handshake has to leave its feeds. Calls to Redis give up long before."""


@dataclass(eq=False)
class Place:
    """A connection's place in one feed. While `live`, the feed delivers; else `Connection.catch_up` reads."""

    connection: Connection
    feed: Feed
    cursor: Cursor
    live: bool = False
    replay: asyncio.Task[None] | None = None  # what is reading the feed for it

    def deliver(self, frame: Frame) -> None:
        if self.connection.full():
            self.fall_behind()
        elif frame.cursor.seq > self.cursor.seq:  # else it was replayed already
            self.cursor = frame.cursor
            if self.connection.takes(frame):
                self.connection.write(frame.encoded(binary=self.connection.binary), frame.mark)

    def start_over(self, reset: Reset) -> None:
        if self.feed.topic is None:
            self.connection.on_reset()
        if self.connection.full():
            self.fall_behind()  # it finds the reset for itself
        else:
            frame, mark = self.connection.begin_anew(self, reset)
            self.connection.write(self.connection.encode(frame), mark)

    def look_again(self) -> None:
        self.connection.look_again()

    def fall_behind(self) -> None:
        self.live = False
        self.replay = self.connection.spawn(self.connection.catch_up(self))


@dataclass
class Welcome:
    """What a connection begins with, for one feed."""

    place: Place
    missed: list[Frame] = field(default_factory=list)
    reset: Reset | None = None
    resumed: bool = False


class Connection:
    """Lives as long as `run` does."""

    def __init__(self, core: Core, peer: Peer, principal: Principal, deadline: Deadline) -> None:
        self.core = core
        self.peer = peer
        self.principal = principal
        self.begun = asyncio.Event()
        """Set when the connection is welcomed, or refused."""
        self.refused: RequestError | None = None
        self.on_reset: Callable[[], None] = lambda: None
        """Called when the user's own feed starts over: its partition may have lost this connection's item too."""
        self._deadline = deadline
        self.id = f"{core.id}-{secrets.token_hex(6)}"
        self.binary = peer.binary
        self.connected_at = core.now_ms()
        self.open = True
        self.welcomed = False
        self._places: dict[str | None, Place] = {}  # by topic; None for the user's own feed
        self._following = asyncio.Lock()
        self._looking_again = False  # a look at what may be followed is due, and has not begun
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)
        self._expiry: asyncio.Task[None] | None = None

    async def run(self, cursor: str | None, topics: dict[str, str]) -> None:
        """From the welcome to the end of the connection."""
        beginning = asyncio.create_task(self._begin(cursor, topics), name="begin")
        try:
            own, followed, refused = await self._deadline.bound(beginning)
            await self._go_on_with(own, followed, refused)
            self._watch_expiry()
            await self.peer.receive(self._received)
        except ConnectionClosed:
            pass
        except Unauthenticated as error:
            await self._refuse(error, 4401, error.message)
        except (RequestError, RedisError, OSError) as error:
            log.warning("connection_failed", connection=self.id, error=str(error))
            await self._refuse(error, 1013, "try again later")
        finally:
            self.open = False
            self.begun.set()
            # A refused handshake has told its peer by now. It still leaves the feeds that it was about to follow.
            await end([beginning], ask_again_s=CLEARING_S)
            for task in self._tasks:
                task.cancel()
            places = list(self._places.values())
            for place in places:
                place.live = False
                place.feed.followers.discard(place)
            await asyncio.gather(*(self.core.feeds.leave(place.feed) for place in places))

    # ── frames out ──────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, frame: Any) -> bytes:
        return encode_msgpack(frame) if self.binary else encode_json(frame)

    def full(self) -> bool:
        """Whether the peer is so slow that nothing more is queued for it."""
        limit = self.core.settings.limit_queued_bytes
        return limit > 0 and self.peer.queued_bytes() > limit

    def write(self, data: bytes, *marks: Mark) -> None:
        """Queue a frame without waiting; the caller has looked whether it is `full`."""
        self.peer.write(data, *marks)

    async def send(self, frame: Any, *marks: Mark) -> None:
        """Send a frame, waiting while the peer is slow."""
        await self.peer.send(self.encode(frame), *marks)

    async def close(self, code: int, reason: str) -> None:
        await self.peer.close(code, reason)

    async def _refuse(self, error: Exception, code: int, reason: str) -> None:
        self.refused = error if isinstance(error, RequestError) else Overloaded("Redis does not answer: connect again")
        self.begun.set()
        await self.close(code, reason)

    def spawn(self, work: Any) -> asyncio.Task[None] | None:
        """A task that ends with the connection, and ends it when it fails."""

        async def guarded() -> None:
            try:
                await work
            except ConnectionClosed:
                pass
            except (RedisError, OSError) as error:
                log.warning("connection_failed", connection=self.id, error=str(error))
                await self.close(1013, "try again later")
            except Exception:
                log.exception("connection_task_failed", connection=self.id)
                await self.close(1011, "internal error")

        if not self.open:
            work.close()
            return None
        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # a task that is cancelled before it begins never awaits it
        return task

    # ── feeds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _begin(
        self, cursor: str | None, topics: dict[str, str]
    ) -> tuple[Welcome, list[Welcome], list[RequestError]]:
        """Open, subscribe, read what was missed, then `welcome`.

        The user's own feed, the topics', and why others are not followed.
        """
        keys = self.core.backend.keys
        refused: list[RequestError] = []
        own = await self._place(keys.user_feed(self.principal.user), None, cursor)
        given = self.core.topics.given(self.principal)
        followed = [await self._place(keys.topic_feed(topic), topic, topics.get(topic)) for topic in given]
        for topic in sorted(topics.keys() - given):
            try:
                self._deadline.step = f"the store to say who may follow {topic[:200]!r}"
                await self.core.topics.check(self.principal, topic)
                followed.append(await self._place(keys.topic_feed(topic), topic, topics[topic]))
            except (BadRequest, NotFound, PermissionDenied) as error:
                error.details = error.details | {"topic": topic}
                refused.append(error)
        self.core.gatekeeper.check(self.principal)  # it may have been revoked since
        self._deadline.step = "the peer to read its welcome"
        await self.send(
            {
                "type": "welcome",
                "connection": self.id,
                "user": self.principal.user,
                "cursor": str(own.place.cursor),
                "resumed": own.resumed,
                "replayed": sum(map(self.concerned, own.missed)),
                "topics": {str(one.place.feed.topic): str(one.place.cursor) for one in followed},
            },
            *((one.place.feed.topic, str(one.place.cursor)) for one in (own, *followed)),
        )
        self.welcomed = True
        self.begun.set()
        return own, followed, refused

    async def _go_on_with(self, own: Welcome, followed: list[Welcome], refused: list[RequestError]) -> None:
        """After the welcome: what was missed, then live."""
        for refusal in refused:
            await self.send(refusal.as_frame(None))
        for one in followed:
            self._catching_up(one)
        await self._go_on(own)

    async def _place(self, feed_key: bytes, topic: str | None, cursor: str | None) -> Welcome:
        self._deadline.step = f"the feed {feed_key.decode(errors='replace')[:200]} to be opened and subscribed to"
        feed = await self.core.feeds.follow(feed_key, topic)
        assert feed.head
        place = Place(self, feed, feed.head)
        self._places[topic] = place
        return await self._missed(place, cursor)

    async def _missed(self, place: Place, cursor: str | None) -> Welcome:
        """Put the place where the cursor stands; with what follows from there, or the reset.

        A cursor that is refused stays that of the place until the reset is sent: whoever comes back without having
        heard of it is refused again.
        """
        feed = place.feed
        assert feed.head
        if not cursor:
            place.cursor = feed.head
            return Welcome(place)
        parsed = Cursor.parse(cursor)
        if parsed is None:
            place.cursor = NOWHERE
            return Welcome(place, reset=Reset("cursor_unknown", feed.head))
        self._deadline.step = f"the feed {feed.key.decode(errors='replace')[:200]} to be read"
        # All of it at once, so that `replayed` is known: a feed is bounded.
        found = await self.core.feeds.read(feed, parsed, ALL, ALL)
        place.cursor = parsed
        return Welcome(place, frames_of(place, found.entries), found.reset, resumed=found.reset is None)

    async def _go_on(self, one: Welcome) -> None:
        """What was missed, then live."""
        if one.reset:
            await self.send(*self.begin_anew(one.place, one.reset))
        await self._replay(one.place, one.missed)
        one.place.feed.followers.add(one.place)
        await self.catch_up(one.place)

    async def catch_up(self, place: Place) -> None:
        """Read the feed from the place's cursor, as fast as the peer takes it, until it is live."""
        feed = place.feed
        while feed.head != place.cursor:
            found = await self.core.feeds.read(feed, place.cursor)
            if found.reset:
                await self.send(*self.begin_anew(place, found.reset))
            await self._replay(place, frames_of(place, found.entries))
            if feed.head and found.at_end and feed.head != place.cursor:
                await self.core.feeds.mend(feed)  # the stream was ahead of what has been announced
        place.live = True  # no await since the comparison: nothing can have come between

    async def _replay(self, place: Place, frames: list[Frame]) -> None:
        for frame in frames:
            if self.takes(frame):
                await self.peer.send(frame.encoded(binary=self.binary), frame.mark)
            place.cursor = frame.cursor

    def begin_anew(self, place: Place, reset: Reset) -> tuple[dict[str, Any], Mark]:
        """Put the place behind what it has missed; the frame that says so."""
        topic, place.cursor = place.feed.topic, reset.cursor
        if topic is None:
            self.look_again()  # what it has missed may have asked for it
        return reset_frame(reset, topic), (topic, str(reset.cursor))

    def takes(self, frame: Frame) -> bool:
        """Whether this connection's peer gets the frame. One that is for the connection itself is done."""
        if frame.type == RECHECK:
            self.look_again()
        return self.concerned(frame)

    def concerned(self, frame: Frame) -> bool:
        """Whether the frame is for this connection's peer."""
        return frame.type != RECHECK and (frame.asks is True or holds(frame.asks, self.principal.claims))

    # ── topics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def follow(self, request: Follow) -> None:
        """Answer, then all that follows on the cursor; one that is followed already is rewound to it."""
        async with self._following:  # asked before somebody looks again, or answered after what that is about
            await self.core.topics.check(self.principal, request.topic)
            place = self._places.get(request.topic)
            following: Welcome | None = None
            if place is None:
                if len(self._places) > MAX_TOPICS:
                    raise BadRequest(f"a connection follows at most {MAX_TOPICS} topics")
                keys = self.core.backend.keys.topic_feed(request.topic)
                following = await self._place(keys, request.topic, request.cursor)
                place = following.place
            elif request.cursor is not None:
                await self._stop(place)
                following = await self._missed(place, request.cursor)
            if request.id is not None:
                result = {"topic": request.topic, "cursor": str(place.cursor)}
                await self.send({"type": "reply", "id": request.id, "result": result})
            if following:
                self._catching_up(following)

    async def unfollow(self, request: Unfollow) -> dict[str, Any]:
        async with self._following:
            place = self._places.get(request.topic)
            if place is None:
                raise NotFound(f"this connection does not follow {request.topic[:200]!r}")
            await self._leave(place)
            return {"topic": request.topic, "cursor": str(place.cursor)}

    def look_again(self) -> None:
        """Ask again which topics may be followed. None of them delivers until its answer is there."""
        if self._looking_again:
            return  # the look that is due begins after this
        self._looking_again = True
        for place in self._by_right():
            place.live = False
        self.spawn(self._follow_less())

    def _by_right(self) -> list[Place]:
        """The places in topics that not everyone may follow."""
        given, topics = self.core.topics.given(self.principal), self.core.topics
        return [
            place
            for topic, place in self._places.items()
            if topic is not None and topic not in given and not topics.open_to_all(topic)
        ]

    async def _follow_less(self) -> None:
        """Leave the topics that the user may no longer follow."""
        async with self._following:
            self._looking_again = False
            held = self._by_right()
            for place in held:
                await self._stop(place)
            for place in held:
                topic = str(place.feed.topic)
                try:
                    await self.core.topics.check(self.principal, topic)
                except (NotFound, PermissionDenied) as error:
                    await self._leave(place)
                    error.details = error.details | {"topic": topic}
                    await self.send(reset_frame(Reset("cursor_expired", place.cursor), topic))
                    await self.send(error.as_frame(None))
                else:
                    place.feed.followers.add(place)
                    place.replay = self.spawn(self.catch_up(place))

    async def _follow_by_claims(self, before: Principal) -> None:
        """After a renewal: other claims bring other topics."""
        async with self._following:
            given = self.core.topics.given(self.principal)
            for topic in self.core.topics.given(before) - given:
                if topic in self._places:
                    await self._leave(self._places[topic])
            for topic in sorted(given - self._places.keys()):
                self._catching_up(await self._place(self.core.backend.keys.topic_feed(topic), topic, None))

    def _catching_up(self, one: Welcome) -> None:
        one.place.replay = self.spawn(self._go_on(one))

    async def _stop(self, place: Place) -> None:
        """It gets no more of the feed, until it goes on."""
        place.live = False
        place.feed.followers.discard(place)
        if place.replay:
            await end([place.replay])
            place.replay = None

    async def _leave(self, place: Place) -> None:
        await self._stop(place)
        del self._places[place.feed.topic]
        await self.core.feeds.leave(place.feed)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _received(self, message: str | bytes) -> None:
        while self.full():  # noqa: ASYNC110 - who does not read is not asked for more; the transport has no event for it
            await asyncio.sleep(0.02)
        await self._in_flight.acquire()
        frame: dict[str, Any] = {}
        room: Room | None = None
        try:
            frame = decode_frame(message, binary=self.binary)
            request = parse_request(frame)
            room = await self.core.room(self.id, self.principal, request, lambda: not self.peer.is_open())
            if isinstance(request, Get | Query) and not self.peer.is_open():
                raise ConnectionClosed(None, None)  # nobody hears the answer; writes that were sent are still done
            result = self._begin_request(frame, request)
        except (RequestError, ConnectionClosed) as error:
            self._in_flight.release()
            if room:
                room.close()
            if not isinstance(error, RequestError):
                return
            id_ = request_id(frame) if frame else id_of_refused(message, binary=self.binary)
            await self.send(error.as_frame(id_))
            return
        task = self.spawn(self._answer(request_id(frame), result, room))
        if task:
            task.add_done_callback(lambda _: room.close())
        else:
            room.close()

    def _begin_request(self, frame: dict[str, Any], request: Any) -> Any:
        """What is awaited is the result. Begun in the order of arrival, up to where the store's order takes over."""
        match request:
            case Auth():
                return self._renew(request)
            case Follow():
                return self.follow(request)
            case Unfollow():
                return self.unfollow(request)
        return self.core.begin(self.principal, self.id, frame, request)

    async def _answer(self, id_: str | int | None, result: Any, room: Room) -> None:
        try:
            try:
                answer = await result
            except RequestError as error:
                await self.send(error.as_frame(id_))
            except (RedisError, OSError):
                raise  # halfway, perhaps: the connection ends, and its peer comes back
            except Exception:
                log.exception("request_failed", connection=self.id)
                await self.send(Internal("something went wrong on the server").as_frame(id_))
            else:
                if id_ is not None and answer is not None:  # else it was sent, as what comes next follows on it
                    data = self.encode({"type": "reply", "id": id_, "result": answer})
                    room.resize(len(data))
                    await self.peer.send(data)
        finally:
            self._in_flight.release()

    # ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _renew(self, request: Auth) -> dict[str, Any]:
        principal = await self.core.gatekeeper.authorize(request.auth_key)
        if principal.user != self.principal.user:
            raise Unauthenticated("this connection is another user's: open a new one")
        if request.cursor is not None or request.topics:
            raise BadRequest("auth: cursor and topics belong to the first frame of a connection")
        before, self.principal = self.principal, principal
        self._watch_expiry()
        if before.claims != principal.claims:
            await self._follow_by_claims(before)
            await self._follow_less()
        return {"user": principal.user, "claims": principal.claims, "expires_at": principal.expires_at}

    def _watch_expiry(self) -> None:
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None
        if self.principal.expires_at is not None:
            self._expiry = asyncio.create_task(self._expire(self.principal.expires_at))
            self._tasks.add(self._expiry)

    async def _expire(self, at_ms: int) -> None:
        left_s = (at_ms - self.core.now_ms()) / 1000
        begun = time.monotonic()
        with contextlib.suppress(ConnectionClosed):
            await asyncio.sleep(max(left_s - EXPIRING_S, 0))
            left_s -= time.monotonic() - begun
            await self.send({"type": "expiring", "in_ms": max(int(left_s * 1000), 0)})
            await asyncio.sleep(max(left_s, 0))
            await self.close(4401, "the credential has expired")


def frames_of(place: Place, entries: list[FeedEntry]) -> list[Frame]:
    """The frames of entries that follow on the place's cursor: `Feeds.read` has followed the chain."""
    frames, cursor = [], place.cursor
    for entry in entries:
        following = follow_on(cursor, entry)
        assert following
        cursor = following
        frames.append(Frame(cursor, entry, place.feed.topic))
    return frames


def reset_frame(reset: Reset, topic: str | None) -> dict[str, Any]:
    frame = {"type": "reset", "reason": reset.reason, "cursor": str(reset.cursor)}
    return frame | ({"topic": topic} if topic is not None else {})
