"""The bodies of frames, as the broadcaster encodes them once for all readers. No I/O."""

from __future__ import annotations

from typing import Any, NamedTuple

from tidewire.app import Table
from tidewire.model.records import Item, Position


class ItemFrame(NamedTuple):
    """A frame about an item, as of one change."""

    table: Table
    key: dict[str, Any]
    version: int
    new: Item | None
    old: Item | None
    at: int
    by: str

    def body(self, position: Position, event: str) -> dict[str, Any]:
        """Return the frame for one event, without its cursor.

        It holds no image that readers of the event may not see.
        """
        frame: dict[str, Any] = {
            "position": str(position),
            "event": event,
            "table": self.table.name,
            "key": self.key,
            "version": self.version,
        }
        if event == "ENTER":
            frame["new"] = self._visible(self.new)
        elif event != "LEAVE":
            if self.table.stream_view in ("NEW_IMAGE", "NEW_AND_OLD_IMAGES"):
                frame["new"] = self._visible(self.new)
            if self.table.stream_view in ("OLD_IMAGE", "NEW_AND_OLD_IMAGES"):
                frame["old"] = self._visible(self.old)
        frame |= {"at": self.at, "by": self.by}
        return frame

    def _visible(self, image: Item | None) -> Item | None:
        return None if image is None else self.table.visible(image, "client")


class PlainFrame(NamedTuple):
    """A frame about no item: a message, a reset or a recheck."""

    fields: dict[str, Any]

    def body(self, position: Position, event: str) -> dict[str, Any]:
        """Return the frame. It is the same for every event."""
        return self.fields
