"""The items of one partition key as they are, put together from pages of a query and from the frames of feeds. Pure.

A frame may come before or after the page that has its change, and twice, in the user's feed and in a topic's. What
is known of a key is always known as of a position, and nothing older takes its place.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

from tidewire.model.values import Scalar, canonical, sort_bytes

Frame = dict[str, Any]
Item = dict[str, Any]
Place = tuple[int, int, int]
"""A position within its partition: generation, ms, seq."""


def place(position: str) -> Place:
    _, generation, ms, seq = position.split("-")
    return int(generation), int(ms), int(seq)


class Held(NamedTuple):
    """What is known of one key."""

    at: Place
    item: Item | None  # None: it is not in view
    left: bool = False  # it went out of sight, as against being gone


class View:
    """One partition key of a table. `shown` is what a reader may see of it, once it `is_whole`."""

    def __init__(self, table: str, attribute: str, value: Scalar) -> None:
        self.table = table
        self.attribute = attribute
        self.value = canonical(value)
        self.unread: dict[Scalar, int] = {}
        """Keys that changed without an image, and to which version: to be read."""
        self.loads = 0
        """How often it has started over."""
        self.sort: str | None = None
        """The sort attribute, once a page has told it."""
        self.start_over()

    def start_over(self) -> None:
        """Nothing is known."""
        self.loads += 1
        self._held: dict[Scalar, Held] = {}
        self._bounds: list[bytes] = []  # of the pages, in order: the bytes of the last key of each…
        self._places: list[Place] = []  # … and as of when each is
        self._floor: Place | None = None  # nothing of before is in sight
        self._begun: dict[str | None, list[Frame]] = {}  # by topic: the frames of a transaction that is not whole yet
        self.unread.clear()
        self.is_loaded = False

    # ── what comes in ───────────────────────────────────────────────────────────────────────────────────────────────

    def concerns(self, reset: Frame) -> bool:
        """Whether a reset is about this."""
        if reset.get("table", self.table) != self.table:
            return False
        return self.attribute not in (reset.get("key") or {}) or reset["key"][self.attribute] == self.value

    def take(self, frame: Frame) -> bool:
        """A `change`; whether anything may be seen of it now. A transaction counts when its last frame is there."""
        topic = frame.get("topic")
        begun = self._begun.setdefault(topic, [])
        if begun and begun[0].get("transaction") != frame.get("transaction"):
            self._all(begun)  # its last frames were not for this reader
            begun.clear()
        mine = frame["table"] == self.table and frame["key"].get(self.attribute) == self.value
        if frame.get("more"):
            begun.append(frame)
            return False
        self._all(begun)
        moved = bool(begun) or mine
        del self._begun[topic]
        if mine:
            self._change(frame)
        return moved

    def _all(self, frames: list[Frame]) -> None:
        for frame in frames:
            if frame["table"] == self.table and frame["key"].get(self.attribute) == self.value:
                self._change(frame)

    def _change(self, frame: Frame) -> None:
        at, event = place(frame["position"]), frame["event"]
        gone = event in ("REMOVE", "LEAVE")
        if event == "LEAVE" and len(frame["key"]) == 1:
            self._leave_all(at)
            return
        key = self._key_in(frame["key"])
        held = self._known(key)
        if held and not (at > held.at or (at == held.at and held.left and event != "LEAVE")):
            return
        self.unread.pop(key, None)
        if not gone and "new" not in frame:
            self.unread[key] = frame["version"]
            return
        self._held[key] = Held(at, None if gone else frame["new"], event == "LEAVE")

    def _leave_all(self, at: Place) -> None:
        """Nothing of it is in sight from there on."""
        self._floor = at if self._floor is None else max(at, self._floor)
        self._held = {key: held for key, held in self._held.items() if held.at > at}
        self.unread.clear()

    def read(self, key: Scalar, item: Item, version: int, position: str) -> None:
        """One item as it was read by itself.

        It counts if it is as its frame says. One that is newer already, or gone, is left for the frame that tells of
        that: else it might be shown without what was written together with it.
        """
        if self.unread.get(key) == version:
            del self.unread[key]
            self._held[key] = Held(place(position), item)

    def page(self, items: list[Item], key: list[str], position: str, after: Scalar | None, *, last: bool) -> None:
        """A page of the query: what it lacks of its range is not there, as of its position."""
        self.sort = key[1] if len(key) == 2 else None
        at = place(position)
        found = {self.value if self.sort is None else canonical(item[self.sort]): item for item in items}
        low = b"" if after is None else sort_bytes(after)
        high = b"\xff" if last or self.sort is None else sort_bytes(max(found, key=sort_bytes))
        self._bounds.append(high)
        self._places.append(at)
        for name, held in list(self._held.items()):
            if held.at <= at and low < sort_bytes(name) <= high:
                del self._held[name]
                self.unread.pop(name, None)
        for name, item in found.items():
            if name not in self._held:
                self._held[name] = Held(at, item)
        self.is_loaded = last

    def _key_in(self, key: dict[str, Scalar]) -> Scalar:
        """The key of a frame as it is known here: its sort-key value, where it has one."""
        return canonical(next((value for name, value in key.items() if name != self.attribute), self.value))

    def _known(self, key: Scalar) -> Held | None:
        """What is held of a key, or since when it is known not to be there."""
        held = self._held.get(key)
        if held:
            return held
        page = bisect_left(self._bounds, sort_bytes(key))
        since = self._places[page] if page < len(self._bounds) else self._floor
        if since is None:
            return None
        return Held(max(since, self._floor or since), None)

    # ── what is seen ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there, and no part of a transaction."""
        return self.is_loaded and not self.unread

    @property
    def is_of_one_moment(self) -> bool:
        """Whether all pages are as of the same position."""
        return len(set(self._places)) <= 1

    def shown(self) -> dict[Scalar, Item]:
        """The items by sort key, in its order; in a table without one, by the partition key."""
        names = sorted((name for name, held in self._held.items() if held.item is not None), key=sort_bytes)
        return {name: item for name in names if (item := self._held[name].item) is not None}
