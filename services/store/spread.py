"""About how many feeds a change is appended to, so that its writer is charged for that work.

The broadcaster appends a change to the feed of each user in its audience, after the write was answered. The store
counts named users exactly. It learns the size of a group after the first change to it, and looks again every second.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from redis.exceptions import RedisError

from tidewire.app import App
from tidewire.audiences import resolve
from tidewire.model.records import Change, Reply
from tidewire.model.values import Scalar
from tidewire.redis.backend import Backend

LOOK_S = 1.0
MAX_GROUPS_SIZED = 10_000
"""Maximum groups whose size is remembered. Beyond it, the one written to least recently is forgotten."""
APPENDS_PER_MS = 50
"""Appends that cost about 1 ms of the broadcaster and of Redis together."""
FREE_APPENDS = 16
"""Appends of a change that cost its writer nothing extra."""

Group = tuple[str, Scalar]


class Spread:
    """The sizes of groups that were written to. `run` looks them up."""

    def __init__(self, app: App, backend: Backend) -> None:
        self._app = app
        self._backend = backend
        self._sizes: OrderedDict[Group, int] = OrderedDict()
        self._wanted: set[Group] = set()

    def size(self, membership: str, group: Scalar) -> int:
        """Return the number of members of a group, as far as it is known."""
        key = (membership, group)
        self._wanted.add(key)
        if key not in self._sizes:
            return 0
        self._sizes.move_to_end(key)
        return self._sizes[key]

    def recipients(self, change: Change) -> int:
        """Return about how many users receive a change. One whose audience cannot be computed counts none."""
        table = self._app.tables.get(change.table)
        if table is None:
            return 0
        try:
            return max(
                (resolve(table.readers, image).count(image, self.size) for image in (change.new, change.old) if image),
                default=0,
            )
        except Exception:  # a fault of the application, which the broadcaster counts and logs
            return 0

    def charged(
        self, replies: Mapping[str, list[Reply]], written: Mapping[tuple[str, int], list[Change]]
    ) -> Mapping[str, list[Reply]]:
        """Return the replies, by gateway, with the cost of appending the changes that each command wrote."""
        for (gateway, number), changes in written.items():
            appends = sum(max(self.recipients(change) - FREE_APPENDS, 0) for change in changes)
            if appends:
                some = replies[gateway]
                at = next(at for at, reply in enumerate(some) if reply.number == number)
                some[at] = some[at]._replace(cost_ms=some[at].cost_ms + appends / APPENDS_PER_MS)
        return replies

    async def run(self) -> None:
        """Look up the sizes of the groups that are written to, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S if self._sizes else LOOK_S / 10)
            wanted, self._wanted = self._wanted, set()
            try:
                await self.look(wanted)
            except (RedisError, OSError):
                self._wanted |= wanted

    async def look(self, groups: Iterable[Group]) -> None:
        """Look up the sizes of these groups."""
        some = list(groups)
        orders = [("ZCARD", self._backend.keys.order(membership, group)) for membership, group in some]
        for key, size in zip(some, await self._backend.calls(orders) if orders else (), strict=True):
            self._sizes[key] = int(size)
        while len(self._sizes) > MAX_GROUPS_SIZED:
            self._sizes.popitem(last=False)
