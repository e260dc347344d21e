"""Feeds as readers see them: cursors, the chain of tags, and resumes. No I/O.

The entries of a feed are numbered 1, 2, 3… without holes. The tag of an entry is a hash of the tag before it and of the
position of its change. So a cursor with the right tag proves that its reader had all entries before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from tidewire.model.records import stream_id


class FeedState(NamedTuple):
    epoch: str
    seq: int
    tag: str


class FeedEntry(NamedTuple):
    seq: int
    tag: str
    position: str
    body: bytes  # or a reference to one: see `referred`


class Cursor(NamedTuple):
    """The place of a reader in a feed: `<epoch>.<seq>.<tag>` of its last entry. Opaque to clients."""

    epoch: str
    seq: int
    tag: str

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}.{self.tag}"

    @classmethod
    def parse(cls, text: str) -> Cursor | None:
        """Parse a cursor; None if the text is malformed."""
        epoch, _, rest = text.partition(".")
        seq, _, tag = rest.partition(".")
        numbers = epoch.isdecimal() and seq.isdecimal() and len(seq) <= 15
        sound = numbers and tag.isalnum() and text.isascii() and len(text) <= 80
        return cls(epoch, int(seq), tag) if sound else None


def chained(tag: str, position: str) -> str:
    """Return the tag of the entry after the one with `tag`. The same as in `link_append` of lua/feed.lua."""
    return hashlib.sha1((tag + position).encode(), usedforsecurity=False).hexdigest()[:10]


class Announcement(NamedTuple):
    """The announcement of an entry on the feed's channel."""

    epoch: str
    entry: FeedEntry

    @classmethod
    def parse(cls, data: bytes) -> Announcement:
        """Of `<epoch>-<seq - 1> <tag> <position>\\n<body>`."""
        id_, _, entry = data.partition(b" ")
        return cls(id_.partition(b"-")[0].decode(), entry_of(id_, entry))


@dataclass(frozen=True)
class Reset:
    """The reader may lack entries: it must query again, and continue from `cursor`."""

    reason: str
    cursor: Cursor


def head_of(state: FeedState) -> Cursor:
    return Cursor(state.epoch, state.seq, state.tag)


def follow_on(cursor: Cursor, entry: FeedEntry) -> Cursor | None:
    """Return the cursor after an entry if it is exactly the next one, else None."""
    if entry.seq != cursor.seq + 1 or chained(cursor.tag, entry.position) != entry.tag:
        return None
    return Cursor(cursor.epoch, entry.seq, entry.tag)


def resume(cursor: Cursor, state: FeedState, entries: list[FeedEntry]) -> Reset | None:
    """Check that `entries` are all that a cursor missed. They are those after its seq, as read together with `state`.

    Returns None if they are, else the reset to send. A bounded read may return only the first of them.
    """
    head = head_of(state)
    if cursor.epoch != state.epoch:
        return Reset("cursor_expired", head)
    if cursor.seq > state.seq:
        return Reset("cursor_unknown", head)
    if cursor.seq == state.seq:
        return None if cursor.tag == state.tag else Reset("cursor_unknown", head)
    if not entries or entries[0].seq != cursor.seq + 1:
        return Reset("feed_trimmed", head)
    at: Cursor | None = cursor
    for entry in entries:
        at = follow_on(at, entry) if at else None
    return None if at else Reset("cursor_unknown", head)


def entry_of(id_: bytes, text: bytes) -> FeedEntry:
    """An entry of a feed by its id, `<epoch>-<seq - 1>`, and what it holds, `<tag> <position> <total>\\n<body>`."""
    head, _, body = text.partition(b"\n")
    tag, position, _ = head.decode().split(" ")
    return FeedEntry(stream_id(id_)[1] + 1, tag, position, body)
