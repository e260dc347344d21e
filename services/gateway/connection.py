"""One open websocket: its welcome, the feeds it follows, its requests and their answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis.exceptions import RedisError
from websockets.asyncio.server import ServerConnection, broadcast
from websockets.exceptions import ConnectionClosed

from tidewire.errors import BadRequest, Internal, RequestError, Unauthenticated
from tidewire.feeds import Cursor, Reset, follow_on
from tidewire.functions import FeedEntry
from tidewire.protocol import Auth, decode_frame, encode_json, encode_msgpack, id_of_refused, parse_request, request_id
from tidewire.records import Principal

from .core import Core
from .feeds import READ, Feed, Frame

log = structlog.get_logger(__name__)

IN_FLIGHT = 64
"""Requests of one connection that wait for their answers; beyond, nothing more is read from it."""
EXPIRING_S = 60.0


@dataclass(eq=False)
class Place:
    """A connection's place in one feed. While `live`, the feed delivers; else `Connection.catch_up` reads."""

    connection: Connection
    feed: Feed
    cursor: Cursor
    live: bool = False

    def deliver(self, frame: Frame) -> None:
        if self.connection.full():
            self.fall_behind()
        elif frame.cursor.seq > self.cursor.seq:  # else it was replayed already
            self.connection.write(frame.encoded(binary=self.connection.binary))
            self.cursor = frame.cursor

    def start_over(self, reset: Reset) -> None:
        if self.connection.full():
            self.fall_behind()  # it finds the reset for itself
        else:
            self.connection.write(self.connection.encode(reset_frame(reset, self.feed.topic)))
            self.cursor = reset.cursor

    def fall_behind(self) -> None:
        self.live = False
        self.connection.spawn(self.connection.catch_up(self))


@dataclass
class Welcome:
    """What a connection begins with, for one feed."""

    place: Place
    missed: list[FeedEntry] = field(default_factory=list)
    reset: Reset | None = None
    resumed: bool = False


class Connection:
    """Lives as long as `run` does."""

    def __init__(self, core: Core, ws: ServerConnection, principal: Principal) -> None:
        self.core = core
        self.ws = ws
        self.principal = principal
        self.id = f"{core.id}-{secrets.token_hex(6)}"
        self.binary = ws.subprotocol is not None
        self.connected_at = core.now_ms()
        self.open = True
        self._places: list[Place] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)
        self._expiry: asyncio.Task[None] | None = None

    async def run(self, cursor: str | None, topics: dict[str, str]) -> None:
        """From the welcome to the end of the connection."""
        try:
            await self._begin(cursor, topics)
            self._watch_expiry()
            async for message in self.ws:
                await self._received(message)
        except ConnectionClosed:
            pass
        except (RedisError, OSError) as error:
            log.warning("connection_failed", connection=self.id, error=str(error))
            await self.close(1013, "try again later")
        finally:
            self.open = False
            for task in self._tasks:
                task.cancel()
            for place in self._places:
                place.live = False
                place.feed.followers.discard(place)
            await asyncio.gather(*(self.core.feeds.leave(place.feed) for place in self._places))

    # ── frames out ──────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, frame: Any) -> bytes:
        return encode_msgpack(frame) if self.binary else encode_json(frame)

    def full(self) -> bool:
        """Whether the peer is so slow that nothing more is queued for it."""
        return self.ws.transport.get_write_buffer_size() > self.core.settings.limit_queued_bytes

    def write(self, data: bytes) -> None:
        """Queue a frame without waiting; the caller has looked whether it is `full`."""
        broadcast([self.ws], data if self.binary else data.decode())

    async def send(self, frame: Any) -> None:
        """Send a frame, waiting while the peer is slow."""
        await self.send_encoded(self.encode(frame))

    async def send_encoded(self, data: bytes) -> None:
        await self.ws.send(data, text=not self.binary)

    async def close(self, code: int, reason: str) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.ws.close(code, reason)

    def spawn(self, work: Any) -> None:
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
            return
        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── feeds ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _begin(self, cursor: str | None, topics: dict[str, str]) -> None:
        """Open, subscribe, read what was missed, then `welcome`, then what was missed, then live."""
        keys = self.core.backend.keys
        own = await self._place(keys.user_feed(self.principal.user), None, cursor)
        followed = [await self._place(keys.topic_feed(topic), topic, topics.get(topic)) for topic in self.core.topics]
        self.core.gatekeeper.check(self.principal)  # it may have been revoked since
        await self.send(
            {
                "type": "welcome",
                "connection": self.id,
                "user": self.principal.user,
                "cursor": str(own.place.cursor),
                "resumed": own.resumed,
                "replayed": len(own.missed),
                "topics": {str(one.place.feed.topic): str(one.place.cursor) for one in followed},
            }
        )
        for one in (own, *followed):
            if one.reset:
                await self.send(reset_frame(one.reset, one.place.feed.topic))
            await self._replay(one.place, one.missed)
            one.place.feed.followers.add(one.place)
            await self.catch_up(one.place)

    async def _place(self, feed_keys: tuple[bytes, bytes], topic: str | None, cursor: str | None) -> Welcome:
        feed = await self.core.feeds.follow(feed_keys, topic)
        assert feed.head
        place = Place(self, feed, feed.head)
        self._places.append(place)
        if cursor is None:
            return Welcome(place)
        parsed = Cursor.parse(cursor)
        if parsed is None:
            return Welcome(place, reset=Reset("cursor_unknown", feed.head))
        # All of it at once, so that `replayed` is known: a feed is bounded.
        missed, reset = await self.core.feeds.read(feed, parsed, count=100_000)
        place.cursor = reset.cursor if reset else parsed
        return Welcome(place, missed, reset, resumed=reset is None)

    async def catch_up(self, place: Place) -> None:
        """Read the feed from the place's cursor, as fast as the peer takes it, until it is live."""
        feed = place.feed
        while feed.head != place.cursor:
            entries, reset = await self.core.feeds.read(feed, place.cursor)
            if reset:
                await self.send(reset_frame(reset, feed.topic))
                place.cursor = reset.cursor
            await self._replay(place, entries)
            if feed.head and len(entries) < READ and feed.head != place.cursor:
                await self.core.feeds.mend(feed)  # the stream was ahead of what has been announced
        place.live = True  # no await since the comparison: nothing can have come between

    async def _replay(self, place: Place, entries: list[FeedEntry]) -> None:
        for entry in entries:
            cursor = follow_on(place.cursor, entry)
            assert cursor  # `read` has followed the chain
            await self.send_encoded(Frame(cursor, entry, place.feed.topic).encoded(binary=self.binary))
            place.cursor = cursor

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _received(self, message: str | bytes) -> None:
        while self.full():  # noqa: ASYNC110 - who does not read is not asked for more; the transport has no event for it
            await asyncio.sleep(0.02)
        await self._in_flight.acquire()
        frame: dict[str, Any] = {}
        try:
            frame = decode_frame(message, binary=self.binary)
            request = parse_request(frame)
            # Begun in the order of arrival, up to where the store's order takes over.
            result = (
                self._renew(request)
                if isinstance(request, Auth)
                else self.core.begin(self.principal, self.id, frame, request)
            )
        except RequestError as error:
            self._in_flight.release()
            id_ = request_id(frame) if frame else id_of_refused(message, binary=self.binary)
            await self.send(error.as_frame(id_))
            return
        self.spawn(self._answer(request_id(frame), result))

    async def _answer(self, id_: str | int | None, result: Any) -> None:
        try:
            try:
                answer = {"type": "reply", "id": id_, "result": await result}
            except RequestError as error:
                await self.send(error.as_frame(id_))
            except Exception:
                log.exception("request_failed", connection=self.id)
                await self.send(Internal("something went wrong on the server").as_frame(id_))
            else:
                if id_ is not None:
                    await self.send(answer)
        finally:
            self._in_flight.release()

    # ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _renew(self, request: Auth) -> dict[str, Any]:
        principal = await self.core.gatekeeper.authorize(request.auth_key)
        if principal.user != self.principal.user:
            raise Unauthenticated("this connection is another user's: open a new one")
        if request.cursor is not None or request.topics:
            raise BadRequest("auth: cursor and topics belong to the first frame of a connection")
        self.principal = principal
        self._watch_expiry()
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


def reset_frame(reset: Reset, topic: str | None) -> dict[str, Any]:
    frame = {"type": "reset", "reason": reset.reason, "cursor": str(reset.cursor)}
    return frame | ({"topic": topic} if topic is not None else {})
