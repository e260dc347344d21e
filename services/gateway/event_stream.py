"""The feed as server-sent events: the stream, and the ids by which a browser continues it.

A browser keeps only the id of the last event, and returns it in a header. So each id must stand for the cursors of the
feed and of all topics. With many topics it would become too long for the header, and be repeated in each event. Beyond
`MAX_ID_BYTES` the cursors are kept in Redis, in one of a few slots of the user. The ids say where, and what has moved.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import structlog
from redis.exceptions import RedisError
from websockets.exceptions import ConnectionClosed

from tidewire.errors import BadRequest
from tidewire.model.records import pack, unpack
from tidewire.redis.backend import Backend

from .frames import Gathered
from .peers import Mark, Take

log = structlog.get_logger(__name__)

COMMENT_S = 15.0
"""Seconds of silence after which an event stream sends a comment, because proxies end silent connections."""
RETRY_MS = 1000
"""Milliseconds after which a browser reconnects an event stream."""
MAX_ID_BYTES = 1024
"""Length above which an id is shortened. Proxies bound a header to 8 KiB or less."""
SLOTS = 64
"""Sets of cursors that are kept for one user.

A stream has two, and writes them in turn, because the browser may still have an id that refers to the other. Streams
that share slots overwrite each other's cursors, and continue with resets.
"""


class EventIds:
    """The ids of the events of one stream. What they refer to is kept for two resume windows after the stream ends."""

    def __init__(self, backend: Backend, user: str, window_s: float) -> None:
        self._backend = backend
        self._keep_s = int(2 * window_s) + 1
        pair = 2 * secrets.randbelow(SLOTS // 2)
        self._slots = (pair, pair + 1)
        self._keys = [backend.keys.event_cursors(user, slot) for slot in self._slots]
        self._turn = 0
        self._cursor: str | None = None
        self._topics: dict[str, str] = {}
        self._kept: tuple[int, str] | None = None
        """Slot and name of the kept cursors."""
        self._moved: set[str] = set()
        """Topics whose cursors are not those that are kept."""
        self._storing: asyncio.Task[None] | None = None

    def move(self, *marks: Mark) -> None:
        """Note the cursors that the next event moves the stream to."""
        for topic, cursor in marks:
            if topic is None:
                self._cursor = cursor
            else:
                self._topics[topic] = cursor
                self._moved.add(topic)

    def id(self) -> bytes:
        """Encode the cursors as one line of ASCII. If it is long, the next ones will be shorter."""
        moved = {topic: self._topics[topic] for topic in self._moved}
        fields: dict[str, Any] = {"cursor": self._cursor, "topics": moved}
        if self._kept:
            fields["kept"] = self._kept
        encoded = json.dumps(fields, separators=(",", ":")).encode()
        if len(encoded) > MAX_ID_BYTES and not self._storing:
            self._storing = asyncio.create_task(self._store(), name="event_ids")
        return encoded

    async def refresh(self) -> None:
        """Extend the time for which cursors are kept. A silent stream gives its browser no newer id."""
        if self._kept:
            try:
                await self._backend.calls([("EXPIRE", key, self._keep_s) for key in self._keys])
            except (RedisError, OSError) as error:
                log.warning("event_ids_not_kept", error=str(error))

    async def shorten(self) -> None:
        """Wait until the next id is short, if Redis can store the cursors."""
        if len(self.id()) > MAX_ID_BYTES and self._storing:
            await asyncio.shield(self._storing)

    def end(self) -> None:
        """Store nothing more."""
        if self._storing:
            self._storing.cancel()

    async def _store(self) -> None:
        self._turn = 1 - self._turn
        name, topics = secrets.token_hex(8), dict(self._topics)
        try:
            await self._backend.calls([("SET", self._keys[self._turn], pack([name, topics]), "EX", self._keep_s)])
        except (RedisError, OSError) as error:
            log.warning("event_ids_not_kept", error=str(error))  # they stay long, and work
        else:
            self._kept = self._slots[self._turn], name
            self._moved = {topic for topic, cursor in self._topics.items() if topics.get(topic) != cursor}
        finally:
            self._storing = None


class _Id(msgspec.Struct):
    cursor: str | None = None
    topics: dict[str, str] = {}
    kept: tuple[int, str] | None = None


LOST_CURSOR = "lost"
"""A cursor that no feed knows: its reader gets a reset."""


async def read_event_id(
    backend: Backend, user: str, text: str, asked: dict[str, str]
) -> tuple[str | None, dict[str, str]]:
    """Decode an id of a user's stream to the cursor of the feed and those of the topics.

    If the kept cursors are gone, each topic in `asked`, those of the query, begins with a reset, unless the id has its
    cursor. Raises BadRequest, and redis-py's errors.
    """
    if not text:
        return None, asked
    try:
        id_ = msgspec.json.decode(text, type=_Id)
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise BadRequest("Last-Event-ID must be the id of an event of this stream, unchanged") from None
    topics = asked
    if id_.kept is not None:
        slot, name = id_.kept
        (raw,) = await backend.calls([("GET", backend.keys.event_cursors(user, slot % SLOTS))])
        known, kept = unpack(raw) if raw else (None, {})
        topics = asked | (kept if known == name else dict.fromkeys(asked, LOST_CURSOR))
    return id_.cursor, topics | id_.topics


class EventStream:
    """A stream of server-sent events (HTML Living Standard, section 9.2). The id of an event stands for all cursors."""

    binary = False

    def __init__(self, source_ip: str, user_agent: str, limit_bytes: int, ids: EventIds) -> None:
        self.source_ip = source_ip
        self.user_agent = user_agent
        self._ids = ids
        self._limit_bytes = limit_bytes
        self._events: deque[bytes] = deque([b"retry: %d\n\n" % RETRY_MS])
        self._queued_bytes = 0
        self._closed = False
        self._moved = asyncio.Event()  # set when an event is queued or taken, and when the stream is closed

    def is_open(self) -> bool:
        return not self._closed

    def queued_bytes(self) -> int:
        return self._queued_bytes

    def write(self, data: bytes, *marks: Mark) -> None:
        self._ids.move(*marks)
        self._queue(b"id: %s\ndata: %s\n\n" % (self._ids.id(), data))

    def write_gathered(self, gathered: Gathered) -> None:
        for frame in gathered.frames:
            self.write(frame.json, frame.mark)

    def write_raw(self, data: bytes) -> None:
        lines = data.decode(errors="replace").splitlines() or [""]
        self._queue("".join(f"data: {line}\n" for line in lines).encode() + b"\n")

    async def send(self, data: bytes, *marks: Mark) -> None:
        while not self._closed and self._queued_bytes > self._limit_bytes:
            await self._wait()
        if self._closed:
            raise ConnectionClosed(None, None)
        self._ids.move(*marks)
        await self._ids.shorten()
        self.write(data)

    async def close(self, code: int, reason: str) -> None:
        self.end()

    def end(self) -> None:
        """Send no more than what is queued."""
        self._ids.end()
        self._closed = True
        self._moved.set()

    async def receive(self, take: Take) -> None:
        while not self._closed:  # the peer sends nothing
            await self._wait()

    async def events(self) -> AsyncIterator[bytes]:
        """The body of the response, until the stream is closed."""
        while True:
            while self._events:
                event = self._events.popleft()
                self._queued_bytes -= len(event)
                self._moved.set()
                yield event
            if self._closed:
                return
            try:
                async with asyncio.timeout(COMMENT_S):
                    await self._wait()
            except TimeoutError:
                self._queue(b":\n\n")
                await self._ids.refresh()

    def _queue(self, event: bytes) -> None:
        self._events.append(event)
        self._queued_bytes += len(event)
        self._moved.set()

    async def _wait(self) -> None:
        # Nothing is awaited between the caller's check and this, so no move is missed.
        self._moved.clear()
        await self._moved.wait()
