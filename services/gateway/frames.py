"""Frames of feeds: encoded once for all connections, and gathered into one buffer."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tidewire.model.feeds import Cursor, FeedEntry
from tidewire.model.protocol import feed_frame, json_to_msgpack
from tidewire.model.records import RECHECK, FeedBody, unpack
from tidewire.redis.functions import LARGE_BODY_BYTES

TEXT, BINARY = 0x81, 0x82
"""First byte of a frame that is a whole message: FIN and the opcode (RFC 6455, section 5.2)."""


def data_frame(payload: bytes, *, binary: bool) -> bytes:
    """Return a whole message as one frame of a server: not masked, not compressed (RFC 6455, section 5.2)."""
    first, size = BINARY if binary else TEXT, len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


@functools.lru_cache(maxsize=32)
def _large(body: bytes) -> FeedBody:
    """Decode a large body, which mostly goes to many feeds.

    `Bodies` gives the same bytes object to all of them. It caches its hash, so a hit costs no pass over it.
    """
    return FeedBody(*unpack(body))


def _body(body: bytes) -> FeedBody:
    return _large(body) if len(body) > LARGE_BODY_BYTES else FeedBody(*unpack(body))


class FeedFrame:
    """One entry as a frame. It is encoded at most once for each encoding, however many connections get it."""

    __slots__ = ("_msgpack", "condition", "cursor", "json", "mark", "type")

    def __init__(self, cursor: Cursor, entry: FeedEntry, topic: str | None) -> None:
        body = _body(entry.body)
        self.cursor = cursor
        self.mark = (topic, str(cursor))
        self.type = body.type
        self.condition = body.asks
        """What a connection's claims must meet for its peer to get the frame."""
        self.json = feed_frame(body, self.mark[1], topic)
        self._msgpack: bytes | None = None

    def encoded(self, *, binary: bool) -> bytes:
        """The frame in MessagePack if `binary`, else in JSON."""
        if not binary:
            return self.json
        if self._msgpack is None:
            self._msgpack = json_to_msgpack(self.json)
        return self._msgpack

    def is_for_all(self) -> bool:
        """Whether every follower gets the frame, whatever its claims."""
        return self.condition is True and self.type != RECHECK


class Gathered:
    """Frames of one feed that leave together, in order and without a gap."""

    __slots__ = ("_buffers", "first", "for_all", "frames", "last")

    def __init__(self, frames: Sequence[FeedFrame]) -> None:
        self.frames = frames
        self.first = frames[0].cursor
        self.last = frames[-1].cursor
        self.for_all = all(frame.is_for_all() for frame in frames)
        self._buffers: dict[bool, bytes] = {}

    def follow_on(self, cursor: Cursor) -> bool:
        """Whether the first frame is the next one of a reader at this cursor."""
        return self.first.seq == cursor.seq + 1 and self.first.epoch == cursor.epoch

    def buffer(self, *, binary: bool) -> bytes:
        """All frames as they go over a websocket, in one buffer."""
        if binary not in self._buffers:
            self._buffers[binary] = b"".join(
                data_frame(frame.encoded(binary=binary), binary=binary) for frame in self.frames
            )
        return self._buffers[binary]
