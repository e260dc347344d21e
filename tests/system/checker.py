"""Compare what readers received with the change stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from tidewire.client import Client
from tidewire.errors import TidewireError
from tidewire.model.records import Change, unpack
from tidewire.redis.backend import Backend

Seen = tuple[str, str, int]
"""(table, sort key, version) of a change."""


async def changes(backend: Backend) -> list[Change]:
    """All changes of the stage, in order within each partition."""
    found = []
    for partition in range(backend.keys.partitions):
        entries: Any = await backend.commands.xrange(backend.keys.changes(partition))
        for _, fields in entries:
            found.append(Change(*unpack(fields[b"r"])))
    return found


async def written(backend: Backend, table: str, rooms: Iterable[str]) -> dict[str, list[Seen]]:
    """The changes of a table, by room."""
    by_room: dict[str, list[Seen]] = {room: [] for room in rooms}
    for change in await changes(backend):
        if change.table == table and change.key["room"] in by_room:
            by_room[change.key["room"]].append((table, change.key["id"], change.version))
    return by_room


class Reader:
    """A user who logs all frames, across reconnects."""

    def __init__(self, client: Client, room: str) -> None:
        self.client = client
        self.room = room
        self.seen: list[Seen] = []
        self.resets: list[dict[str, Any]] = []
        self.strange: list[dict[str, Any]] = []
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self.client.events():
                if event["type"] == "reset":
                    self.resets.append(event)
                elif event.get("table") == "messages":
                    if event["key"]["room"] != self.room:
                        self.strange.append(event)
                    self.seen.append(("messages", event["key"]["id"], event["version"]))
        except TidewireError as error:
            self.strange.append({"ended": str(error)})

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def differences(reader: Reader, expected: list[Seen]) -> str:
    """Return in words what is wrong with a reader's changes; '' if nothing is."""
    seen = reader.seen
    if seen == expected and not reader.resets and not reader.strange:
        return ""
    missing = [one for one in expected if one not in set(seen)]
    twice = sorted({one for one in seen if seen.count(one) > 1}) if len(seen) != len(set(seen)) else []
    foreign = [one for one in seen if one not in set(expected)]
    return (
        f"{reader.client.user} in {reader.room}: {len(missing)} missing {missing[:3]}, {len(twice)} twice {twice[:3]}, "
        f"{len(foreign)} not written {foreign[:3]}, {len(reader.resets)} resets {reader.resets[:2]}, "
        f"{len(reader.strange)} strange {reader.strange[:2]}, in order: {[o for o in expected if o in seen] == seen}"
    )
