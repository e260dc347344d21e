"""The current items of one partition key, from the pages of a query and the frames of feeds. No I/O.

A frame may arrive before or after the page that contains its change, and twice: in the user's feed and in a topic. The
state of each key has a position, and nothing older replaces it.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

from tidewire.model.records import Item
from tidewire.model.values import Scalar, canonical, sort_bytes

Frame = dict[str, Any]
PartitionPosition = tuple[int, int, int]
"""A position within its partition: generation, ms, seq."""


def parse_position(position: str) -> PartitionPosition:
    """Parse the position of a frame or a page."""
    _, generation, ms, seq = position.split("-")
    return int(generation), int(ms), int(seq)


class Held(NamedTuple):
    """The state of one key, as of a position."""

    at: PartitionPosition
    item: Item | None
    """None: the reader does not see it."""
    left: bool = False
    """Whether it became invisible, and may still exist."""


class LiveItems:
    """The items of one partition key. `shown` returns what the application may see, once it `is_whole`."""

    def __init__(self, table: str, attribute: str, value: Scalar) -> None:
        self.table = table
        self.attribute = attribute
        self.value = canonical(value)
        self.unread: dict[Scalar, int] = {}
        """Keys whose change came without an image, with the version to read."""
        self.loads = 0
        """Number of times that the items were forgotten and loaded."""
        self.sort: str | None = None
        """The sort attribute, known after the first page."""
        self.start_over()

    def start_over(self) -> None:
        """Forget everything."""
        self.loads += 1
        self._held: dict[Scalar, Held] = {}
        self._bounds: list[bytes] = []  # the bytes of the last key of each page, in order
        self._positions: list[PartitionPosition] = []  # of the pages
        self._floor: PartitionPosition | None = None  # items of before are invisible
        self._begun: dict[str | None, list[Frame]] = {}  # by topic: frames of an incomplete transaction
        self.unread.clear()
        self.is_loaded = False

    # ── input ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def concerns(self, reset: Frame) -> bool:
        """Whether a reset is about these items."""
        if reset.get("table", self.table) != self.table:
            return False
        return self.attribute not in (reset.get("key") or {}) or reset["key"][self.attribute] == self.value

    def take(self, frame: Frame) -> bool:
        """Apply a `change`, and return whether the items may differ now.

        Frames of a transaction are applied together, when its last one has arrived.
        """
        topic = frame.get("topic")
        begun = self._begun.setdefault(topic, [])
        if begun and begun[0].get("transaction") != frame.get("transaction"):
            self._all(begun)  # its last frames were for other readers
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
        at, event = parse_position(frame["position"]), frame["event"]
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

    def _leave_all(self, at: PartitionPosition) -> None:
        """Mark all items as invisible from a position on."""
        self._floor = at if self._floor is None else max(at, self._floor)
        self._held = {key: held for key, held in self._held.items() if held.at > at}
        self.unread.clear()

    def read(self, key: Scalar, item: Item, version: int, position: str) -> None:
        """Take an item that was read because its frame had no image.

        It counts only in the version of the frame. A newer version has a frame of its own. Showing it earlier would
        separate it from other writes of its transaction.
        """
        if self.unread.get(key) == version:
            del self.unread[key]
            self._held[key] = Held(parse_position(position), item)

    def page(self, items: list[Item], key: list[str], position: str, after: Scalar | None, *, last: bool) -> None:
        """Take a page of the query. Keys of its range that it lacks do not exist, as of its position."""
        self.sort = key[1] if len(key) == 2 else None
        at = parse_position(position)
        found = {self.value if self.sort is None else canonical(item[self.sort]): item for item in items}
        low = b"" if after is None else sort_bytes(after)
        high = b"\xff" if last or self.sort is None else sort_bytes(max(found, key=sort_bytes))
        self._bounds.append(high)
        self._positions.append(at)
        for name, held in list(self._held.items()):
            if held.at <= at and low < sort_bytes(name) <= high:
                del self._held[name]
                self.unread.pop(name, None)
        for name, item in found.items():
            if name not in self._held:
                self._held[name] = Held(at, item)
        self.is_loaded = last

    def _key_in(self, key: dict[str, Scalar]) -> Scalar:
        """The key of a frame: its sort-key value, or the partition key in a table without one."""
        return canonical(next((value for name, value in key.items() if name != self.attribute), self.value))

    def _known(self, key: Scalar) -> Held | None:
        """The state of a key, or since when it is known not to exist."""
        held = self._held.get(key)
        if held:
            return held
        page = bisect_left(self._bounds, sort_bytes(key))
        since = self._positions[page] if page < len(self._bounds) else self._floor
        if since is None:
            return None
        return Held(max(since, self._floor or since), None)

    # ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def is_whole(self) -> bool:
        """Whether all items are known, and no transaction is shown in part."""
        return self.is_loaded and not self.unread

    @property
    def is_of_one_moment(self) -> bool:
        """Whether all pages have the same position."""
        return len(set(self._positions)) <= 1

    def shown(self) -> dict[Scalar, Item]:
        """Return the items by sort key, in its order. In a table without one, the item is under the partition key."""
        names = sorted((name for name, held in self._held.items() if held.item is not None), key=sort_bytes)
        return {name: item for name in names if (item := self._held[name].item) is not None}
