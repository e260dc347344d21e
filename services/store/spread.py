"""About how many feeds a change is appended to, so that its writer is charged for that work.

The broadcaster appends a change to the feed of each user in its audience, after the write was answered. The store
counts named users exactly. It learns the size of a group after the first change to it, and looks again after others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice

from redis.exceptions import RedisError

from tidewire.app import App
from tidewire.audiences import resolve
from tidewire.model.records import Change, Reply
from tidewire.model.values import Scalar
from tidewire.redis.backend import Backend

LOOK_S = 0.25
"""Seconds between two looks at the sizes of the groups that were written to."""
LOOK_BATCH = 500
"""Groups that are looked up in one round trip."""
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
        if len(self._wanted) < MAX_GROUPS_SIZED:
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
        return {
            gateway: [
                reply._replace(cost_ms=reply.cost_ms + self._cost_ms(written.get((gateway, reply.number), ())))
                for reply in some
            ]
            for gateway, some in replies.items()
        }

    def _cost_ms(self, changes: Iterable[Change]) -> float:
        return sum(max(self.recipients(change) - FREE_APPENDS, 0) for change in changes) / APPENDS_PER_MS

    async def run(self) -> None:
        """Look up the sizes of the groups that are written to, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            wanted, self._wanted = self._wanted, set()
            try:
                await self.look(wanted)
            except (RedisError, OSError):
                self._wanted |= wanted

    async def look(self, groups: Iterable[Group]) -> None:
        """Look up the sizes of these groups."""
        left = iter(groups)
        while some := list(islice(left, LOOK_BATCH)):
            orders = [("ZCARD", self._backend.keys.order(membership, group)) for membership, group in some]
            for key, size in zip(some, await self._backend.calls(orders), strict=True):
                self._sizes[key] = int(size)
        while len(self._sizes) > MAX_GROUPS_SIZED:
            self._sizes.popitem(last=False)
