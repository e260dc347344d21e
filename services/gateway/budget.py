"""Bounds the bytes of answers in flight. No I/O; only `room` waits.

The store sends answers through Redis, so a small request can put a large answer there. Before the gateway passes a
request on, it reserves the maximum size of its answer. The actual size replaces it when the answer arrives. The room is
free again when the socket has the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

from tidewire.errors import Overloaded
from tidewire.model.protocol import Get, Query, Transact, Update

PAGE_BYTES = 1 << 20
"""Size at which a page of a query ends."""
SMALL_BYTES = 4096
"""Maximum size of an answer without an item."""
ENVELOPE_BYTES = 256
"""Maximum size of what an answer says of an item beside the item itself."""
USER_FACTOR = 2
"""Budget of a user in this gateway, as a multiple of a connection's budget."""
GATEWAY_FACTOR = 16
"""Budget of the gateway, as a multiple of a connection's budget."""
CHECK_S = 0.1
"""Seconds between two checks whether the peer of a waiting request is gone."""
MAX_WAIT_S = 2.0
"""Maximum seconds for a request to wait for room in its user's budget or the gateway's."""


def max_bytes(request: object, item_bytes: int) -> int:
    """Return the maximum size of the answer to a request, if items have at most `item_bytes`."""
    item = (item_bytes or PAGE_BYTES) + ENVELOPE_BYTES
    match request:
        case Query():
            page: int = min(max(request.limit, 1) * item, PAGE_BYTES + item)
            return page
        case Get() | Update():
            return item
        case Transact():
            updates: int = sum(operation.get("action") == "update" for operation in request.operations)
            return SMALL_BYTES + len(request.operations) * ENVELOPE_BYTES + updates * item
    return SMALL_BYTES


class Room:
    """The bytes that one answer occupies until the room is closed."""

    def __init__(self, budget: AnswerBudget, owners: tuple[str, ...], size_bytes: int) -> None:
        self._budget = budget
        self._owners = owners
        self._size_bytes = size_bytes

    def resize(self, size_bytes: int) -> None:
        """Replace the reserved size by the actual one."""
        self._budget.change(self._owners, size_bytes - self._size_bytes)
        self._size_bytes = size_bytes

    def close(self) -> None:
        """Free the bytes. May be called again."""
        self.resize(0)

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AnswerBudget:
    """Reserved bytes of each connection, each user and the gateway.

    An owner that holds nothing gets room for any answer.
    """

    def __init__(self, connection_bytes: int) -> None:
        self._limits = {
            "c": connection_bytes,
            "u": USER_FACTOR * connection_bytes,
            "g": GATEWAY_FACTOR * connection_bytes,
        }
        self._held: Counter[str] = Counter()
        self._freed = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        return self._held["g"]

    def change(self, owners: tuple[str, ...], by: int) -> None:
        """Add to the bytes that the owners hold."""
        for owner in owners:
            self._held[owner] += by
            if not self._held[owner]:
                del self._held[owner]
        if by < 0:
            self._freed.set()

    def full(self, owners: tuple[str, ...], size_bytes: int) -> str | None:
        """Return the first owner whose budget has no room for that many bytes, or None."""
        for owner in owners:
            limit, held = self._limits[owner[0]], self._held[owner]
            if limit and held and held + size_bytes > limit:
                return owner
        return None

    async def room(
        self, connection: str | None, user: str | None, size_bytes: int, gone: Callable[[], bool] = lambda: False
    ) -> Room:
        """Reserve room for an answer. Without a user, no user's budget counts.

        Waits as long as the connection's own answers fill its budget, unless its peer is `gone`.

        Raises:
            Overloaded: the user's budget or the gateway's had no room for `MAX_WAIT_S`. Nothing was done.
        """
        owners = ("g",) + ((f"u{user}",) if user is not None else ()) + ((f"c{connection}",) if connection else ())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MAX_WAIT_S
        while (owner := self.full(owners[::-1], size_bytes)) is not None and not gone():
            if owner[0] == "c":
                deadline = loop.time() + MAX_WAIT_S
            elif loop.time() >= deadline:
                raise Overloaded(_refusal(owner, self._limits[owner[0]]))
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await self._freed.wait()
        self.change(owners, size_bytes)
        return Room(self, owners, size_bytes)


def _refusal(owner: str, limit: int) -> str:
    whose = "of this user" if owner[0] == "u" else "of this gateway"
    return (
        f"the answers {whose} in flight would exceed {limit} bytes (TIDEWIRE_LIMIT_ANSWER_BYTES, times "
        f"{USER_FACTOR if owner[0] == 'u' else GATEWAY_FACTOR}): read them, or ask for less at a time"
    )
