"""A live view against a plain dict: in whatever order frames and pages come, nothing goes back, and all agree."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import LONG
from tidewire.client.live_items import LiveItems

Frame = dict[str, Any]
KEYS = ["a", "b", "c", "d"]
PAGE = 2


class Store:
    """One partition-key value: its items, which of them the reader sees, and what both feeds have yet to deliver."""

    def __init__(self) -> None:
        self.seq = 0
        self.items: dict[str, dict[str, Any]] = {}
        self.hidden: set[str] = set()
        self.feeds: dict[str | None, deque[Frame]] = {None: deque(), "t": deque()}

    @property
    def position(self) -> str:
        return f"3-0-1000-{self.seq}"

    def seen(self) -> dict[str, Any]:
        return {key: item for key, item in sorted(self.items.items()) if key not in self.hidden}

    def tell(self, key: str, event: str, *, both: bool, **more: Any) -> None:
        frame = {"type": "change", "table": "m", "key": {"room": "r", "id": key}, "event": event, **more}
        frame["position"] = self.position
        if event not in ("LEAVE", "REMOVE"):
            frame["new"] = self.items[key]
        self.feeds[None].append(frame)
        if both:
            self.feeds["t"].append(frame | {"topic": "t"})

    def put(self, key: str, *, both: bool = False, **more: Any) -> None:
        self.seq += 1
        event = "MODIFY" if key in self.items else "INSERT"
        self.items[key] = {"room": "r", "id": key, "n": self.seq, **({"t": more["transaction"]} if more else {})}
        if key not in self.hidden:
            self.tell(key, event, both=both, **more)

    def delete(self, key: str, *, both: bool) -> None:
        if key in self.items:
            self.seq += 1
            del self.items[key]
            if key not in self.hidden:
                self.tell(key, "REMOVE", both=both)
            self.hidden.discard(key)

    def hide_or_show(self, key: str, *, both: bool) -> None:
        if key in self.items:
            self.seq += 1
            self.items[key] = self.items[key] | {"n": self.seq}
            self.hidden ^= {key}
            self.tell(key, "LEAVE" if key in self.hidden else "ENTER", both=both)

    def transact(self) -> None:
        """All keys that are seen get the same `t`."""
        name, keys = f"t{self.seq}", [key for key in KEYS if key not in self.hidden]
        for key in keys:
            more = {"more": True} if key != keys[-1] else {}
            self.put(key, transaction=name, **more)

    def leave(self) -> None:
        """The reader is no longer entitled to anything of it."""
        self.seq += 1
        self.hidden = set(self.items)
        frame = {"type": "change", "table": "m", "key": {"room": "r"}, "event": "LEAVE", "position": self.position}
        self.feeds[None].append(frame)

    def page(self, view: LiveItems, after: str | None) -> str | None:
        """Give the next page; where to go on, None at the end."""
        rest = [item for key, item in self.seen().items() if after is None or key > after]
        last = len(rest) <= PAGE
        view.page(rest[:PAGE], ["room", "id"], self.position, after, last=last)
        return None if last else str(rest[PAGE - 1]["id"])


OPS = st.one_of(
    st.tuples(st.sampled_from(["put", "delete", "hide_or_show"]), st.sampled_from(KEYS), st.booleans()),
    st.tuples(st.sampled_from(["transact", "leave", "page", "own", "topic", "reset"])),
)


@settings(deadline=None, max_examples=2000 if LONG else 300)
@given(st.lists(OPS, max_size=40))
def test_no_item_goes_back_no_transaction_is_half_and_in_the_end_it_is_the_store(ops: list[Any]) -> None:  # noqa: C901
    store, view = Store(), LiveItems("m", "room", "r")
    after: str | None = None
    newest: dict[str, int] = {}
    delivered = {None: 0, "t": 0}

    def look() -> None:
        if not view.is_whole:
            return
        shown: dict[Any, Any] = view.shown()
        for key, item in shown.items():
            assert item["n"] >= newest.get(key, 0), f"{key} went back"
            newest[key] = item["n"]
        if delivered["t"] > delivered[None] or not view.is_of_one_moment:
            return  # the topic is ahead: it may tell of what came after a transaction
        names = [item.get("t") for item in shown.values() if item.get("t")]
        for item in shown.values():
            later = [name for name in names if int(name[1:]) >= item["n"]]
            assert not later, f"{item} is of before {later}, which changed all"

    def deliver(topic: str | None) -> None:
        feed = store.feeds[topic]
        if feed:
            frame = feed.popleft()
            delivered[topic] = int(frame["position"].rpartition("-")[2])
            view.take(frame)
            look()

    def page() -> None:
        nonlocal after
        if not view.is_loaded:
            after = store.page(view, after)
            look()

    for name, *args in ops:
        match name:
            case "page":
                page()
            case "own" | "topic":
                deliver(None if name == "own" else "t")
            case "reset":
                view.start_over()
                after = None
            case "transact" | "leave":
                getattr(store, name)()
            case _:
                getattr(store, name)(args[0], both=args[1])
    while any(store.feeds.values()):
        deliver(None)
        deliver("t")
    while not view.is_loaded:
        page()
    assert view.is_whole
    assert view.shown() == store.seen()


def change(event: str, seq: int, key: Any = "a", **more: Any) -> Frame:
    frame: Frame = {"table": "m", "key": {"room": "r", "id": key}, "event": event, "position": f"3-0-1000-{seq}"}
    return frame | ({"new": {"room": "r", "id": key, "n": seq}} if event not in ("REMOVE", "LEAVE") else {}) | more


def loaded() -> LiveItems:
    view = LiveItems("m", "room", "r")
    view.page([], ["room", "id"], "3-0-1000-0", None, last=True)
    return view


@pytest.mark.parametrize("order", [0, 1])
def test_of_two_frames_of_one_position_the_one_that_leaves_does_not_count(order: int) -> None:
    view = loaded()
    view.take(change("INSERT", 1))
    frames = [change("LEAVE", 2, topic="t"), change("MODIFY", 2)]
    for frame in frames[::-1] if order else frames:
        view.take(frame)
    assert view.shown()["a"]["n"] == 2


def test_a_later_generation_is_newer_whatever_its_time() -> None:
    view = loaded()
    view.take(change("INSERT", 9))
    view.take(change("MODIFY", 1) | {"position": "3-1-5-0"})
    assert view.shown()["a"]["n"] == 1


def bare(seq: int, key: str = "a", **more: Any) -> Frame:
    """Without an image."""
    frame = change("MODIFY", seq, key, version=seq, **more)
    del frame["new"]
    return frame


def image(key: str, n: int) -> dict[str, Any]:
    return {"room": "r", "id": key, "n": n}


def test_a_change_without_an_image_is_read_again() -> None:
    view = loaded()
    view.take(bare(1))
    assert (view.unread, view.is_whole) == ({"a": 1}, False)
    view.read("a", image("a", 1), 1, "3-0-1000-1")
    assert (view.shown(), view.is_whole) == ({"a": image("a", 1)}, True)


def test_a_version_newer_than_the_frame_waits_for_its_own_frame() -> None:
    view = loaded()
    for frame in (bare(1, "a", transaction="T1", more=True), bare(1, "b", transaction="T1")):
        view.take(frame)
    view.read("a", image("a", 1), 1, "3-0-1000-1")
    # Both were written once more, together: to show this one beside the other's older state were half of that.
    view.read("b", image("b", 2), 2, "3-0-1000-2")
    assert not view.is_whole
    for frame in (bare(2, "a", transaction="T2", more=True), bare(2, "b", transaction="T2")):
        view.take(frame)
    view.read("b", image("b", 2), 2, "3-0-1000-2")
    assert not view.is_whole
    view.read("a", image("a", 2), 2, "3-0-1000-2")
    assert (view.shown(), view.is_whole) == ({"a": image("a", 2), "b": image("b", 2)}, True)


def test_other_tables_and_other_partition_keys_are_not_its() -> None:
    view = loaded()
    assert not view.take(change("INSERT", 1) | {"table": "x"})
    assert not view.take(change("INSERT", 1) | {"key": {"room": "other", "id": "a"}})
    assert view.shown() == {}


@pytest.mark.parametrize(
    ("reset", "concerned"),
    [
        ({}, True),
        ({"topic": "t"}, True),
        ({"table": "m"}, True),
        ({"table": "x"}, False),
        ({"table": "m", "key": {"room": "r"}}, True),
        ({"table": "m", "key": {"room": "other"}}, False),
    ],
)
def test_a_reset_concerns_what_it_names(reset: Frame, concerned: bool) -> None:
    assert loaded().concerns(reset) is concerned


def test_a_table_without_a_sort_key_has_its_item_under_the_partition_key() -> None:
    view = LiveItems("m", "id", 1)
    view.page([{"id": 1.0, "text": "x"}], ["id"], "3-0-1000-0", None, last=True)
    assert view.shown() == {1: {"id": 1.0, "text": "x"}}
    view.take({"table": "m", "key": {"id": 1}, "event": "REMOVE", "position": "3-0-1000-1"})
    assert view.shown() == {}


def test_it_is_in_the_order_of_the_sort_key() -> None:
    view = loaded()
    for number in (10, 9, -1, 2.5):
        view.take(change("INSERT", int(number) + 5, number))
    assert list(view.shown()) == [-1, 2.5, 9, 10]
