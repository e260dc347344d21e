"""Frames of feeds: gathered, written in one piece, and delivered in slices between which others get their turn."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame
from websockets.protocol import State
from websockets.uri import parse_uri

from tests.helpers import wait_until
from tidewire.model.feeds import Cursor, FeedEntry, Reset
from tidewire.model.records import FeedBody, pack
from tidewire.redis.keys import Keys
from tidewire.services.gateway import feeds, passes
from tidewire.services.gateway.feeds import Feed
from tidewire.services.gateway.frames import Gathered, data_frame
from tidewire.services.gateway.passes import Passes

EPOCH = "1"


@given(st.binary(max_size=300) | st.sampled_from([b"x" * size for size in (125, 126, 65535, 65536)]), st.booleans())
def test_a_data_frame_is_one_whole_message_to_a_client(payload: bytes, binary: bool) -> None:
    client = ClientProtocol(parse_uri("ws://x/"), state=State.OPEN)
    client.receive_data(data_frame(payload, binary=binary))
    (frame,) = client.events_received()
    assert isinstance(frame, Frame)
    assert (frame.opcode.name, frame.fin, bytes(frame.data)) == ("BINARY" if binary else "TEXT", True, payload)


def cursor(seq: int, epoch: str = EPOCH) -> Cursor:
    return Cursor(epoch, seq, "t")


def entry(seq: int) -> FeedEntry:
    body = FeedBody("message", b'"x"', True)
    return FeedEntry(seq, "t", f"0-0-{seq}-0", pack(body))


class Reader:
    """A live follower that keeps the seqs of what it gets, and becomes slow at one of them."""

    def __init__(self, at: int = 0) -> None:
        self.live = True
        self.cursor = cursor(at)
        self.got: list[int] = []
        self.writes = 0
        self.resets = 0

    def deliver(self, gathered: Gathered) -> None:
        self.writes += 1
        self.got += [frame.cursor.seq for frame in gathered.frames]

    def start_over(self, reset: Reset) -> None:
        self.resets += 1

    def recheck(self) -> None:
        """Nothing is asked."""


def feed_with(*readers: Any) -> Feed:
    feed = Feed(Keys("dev", 1).home(0), b"feed", None, Passes())
    feed.followers.update(readers)
    return feed


async def test_what_arrives_in_one_turn_leaves_in_one_write() -> None:
    one, two = Reader(), Reader()
    feed = feed_with(one, two)
    for seq in range(1, 6):
        feed.advance(cursor(seq), entry(seq))
    assert one.got == [], "the pass begins in the next turn"
    await wait_until(lambda: two.got and one.got, "it is delivered")
    assert (one.got, one.writes) == (two.got, two.writes) == ([1, 2, 3, 4, 5], 1)


async def test_what_arrives_during_a_pass_leaves_in_the_next_one() -> None:
    reader = Reader()
    feed = feed_with(reader, *(Reader() for _ in range(100)))
    for seq in range(1, 4):
        feed.advance(cursor(seq), entry(seq))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await wait_until(lambda: len(reader.got) == 3, "all is delivered")
    assert reader.got == [1, 2, 3]


async def test_a_reset_comes_behind_what_had_gathered() -> None:
    order: list[str] = []

    class Noting(Reader):
        def deliver(self, gathered: Gathered) -> None:
            order.append("frames")

        def start_over(self, reset: Reset) -> None:
            order.append("reset")

    feed = feed_with(Noting())
    feed.advance(cursor(1), entry(1))
    feed.reset(Reset("cursor_expired", cursor(1, "2")))
    await asyncio.sleep(0.05)
    assert order == ["frames", "reset"]


async def test_frames_beyond_the_bound_are_left_to_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MAX_GATHERED_BYTES", 200)
    reader = Reader()
    feed = feed_with(reader)
    for seq in range(1, 100):
        feed.advance(cursor(seq), entry(seq))
    await wait_until(lambda: reader.got, "it is delivered")
    assert reader.got[0] > 90, "the follower sees the gap"
    assert reader.got == list(range(reader.got[0], 100))


async def test_nothing_gathers_without_a_live_follower() -> None:
    reader = Reader()
    feed = feed_with(reader)
    feed.advance(cursor(1), entry(1))
    reader.live = False
    feed.advance(cursor(2), entry(2))
    reader.live = True
    feed.advance(cursor(3), entry(3))
    await wait_until(lambda: reader.got, "it is delivered")
    assert reader.got == [3]


class Slow:
    """A source that takes a while for each of its followers."""

    def __init__(self, steps: int, step_s: float) -> None:
        self.left = steps
        self._step_s = step_s

    def deliver(self) -> Iterator[None]:
        while self.left:
            until = time.perf_counter() + self._step_s
            while time.perf_counter() < until:
                pass
            self.left -= 1
            yield


async def test_others_get_a_turn_after_each_slice() -> None:
    source, all_passes = Slow(50, passes.SLICE_S), Passes()
    all_passes.add(source)
    turns = 0
    while source.left:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 25


async def test_one_source_that_fails_stops_no_other() -> None:
    class Failing:
        def deliver(self) -> Iterator[None]:
            yield
            raise OSError("reset by peer")

    all_passes, source = Passes(), Slow(3, 0.0)
    all_passes.add(Failing())
    all_passes.add(source)
    await wait_until(lambda: not source.left, "the other is delivered")
    later = Slow(1, 0.0)
    all_passes.add(later)
    await wait_until(lambda: not later.left, "and passes go on")


async def test_passes_under_load_begin_some_time_apart() -> None:
    all_passes, begun = Passes(), list[float]()

    class Busy:
        def deliver(self) -> Iterator[None]:
            begun.append(time.perf_counter())
            if len(begun) < 5:
                all_passes.add(self)
            yield

    all_passes.add(Busy())
    await wait_until(lambda: len(begun) == 5, "five passes")
    assert min(b - a for a, b in itertools.pairwise(begun)) > passes.PASS_S * 0.9
