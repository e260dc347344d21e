"""Bytes of the answers that are under way, and whether there is room for one more. No I/O but waiting for room.

The store sends answers through Redis, so a small request can put a large answer there. Before the gateway passes a
request on, it reserves the most bytes that its answer can have. The real size takes their place when the answer comes,
and the room is free again when the answer has been handed to the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable

from tidewire.errors import Overloaded
from tidewire.model.protocol import Get, Query, Transact, Update

PAGE_BYTES = 1 << 20
"""A page of a query ends at this size."""
SMALL_BYTES = 4096
"""An answer that carries no item."""
ENVELOPE_BYTES = 256
"""What an answer says of an item beside the item."""
USER_SHARE = 2
"""The budget of a user in this gateway, in budgets of a connection."""
GATEWAY_SHARE = 16
"""The budget of the gateway, in budgets of a connection."""
LOOK_S = 0.1
"""Time between two looks at whether the peer of a waiting request is gone."""
MAX_WAIT_S = 2.0
"""Longest time for a request to wait for room in its user's budget or the gateway's."""


def max_bytes(request: object, item_bytes: int) -> int:
    """The most bytes that the answer of a request can have, with items of at most that size."""
    item = (item_bytes or PAGE_BYTES) + ENVELOPE_BYTES
    match request:
        case Query():
            most: int = min(max(request.limit, 1) * item, PAGE_BYTES + item)
            return most
        case Get() | Update():
            return item
        case Transact():
            updates: int = sum(operation.get("action") == "update" for operation in request.operations)
            return SMALL_BYTES + len(request.operations) * ENVELOPE_BYTES + updates * item
    return SMALL_BYTES


class Room:
    """Bytes that one answer takes, until it is closed."""

    def __init__(self, budget: AnswerBudget, owners: tuple[str, ...], size_bytes: int) -> None:
        self._budget = budget
        self._owners = owners
        self._size_bytes = size_bytes

    def resize(self, size_bytes: int) -> None:
        """The answer has come, and has this size."""
        self._budget.change(self._owners, size_bytes - self._size_bytes)
        self._size_bytes = size_bytes

    def close(self) -> None:
        """The answer has left. May be called again."""
        self.resize(0)

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AnswerBudget:
    """Bytes reserved per connection, per user and in all. Whoever holds nothing always gets room for one answer."""

    def __init__(self, connection_bytes: int) -> None:
        self._most = {"c": connection_bytes, "u": USER_SHARE * connection_bytes, "g": GATEWAY_SHARE * connection_bytes}
        self._held: Counter[str] = Counter()
        self._freed = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        return self._held["g"]

    def change(self, owners: tuple[str, ...], by: int) -> None:
        for owner in owners:
            self._held[owner] += by
            if not self._held[owner]:
                del self._held[owner]
        if by < 0:
            self._freed.set()

    def full(self, owners: tuple[str, ...], size_bytes: int) -> str | None:
        """The first owner whose budget has no room for so many bytes."""
        for owner in owners:
            most, held = self._most[owner[0]], self._held[owner]
            if most and held and held + size_bytes > most:
                return owner
        return None

    async def room(
        self, connection: str | None, user: str | None, size_bytes: int, gone: Callable[[], bool] = lambda: False
    ) -> Room:
        """Room for an answer, as soon as there is any. Without a user, no user's budget counts.

        Waits for as long as the connection's own answers take it up. Raises Overloaded when the user's budget or the
        gateway's has no room for a while: nothing was done then. An answer to a peer that is `gone` is not waited for.
        """
        owners = ("g",) + ((f"u{user}",) if user is not None else ()) + ((f"c{connection}",) if connection else ())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MAX_WAIT_S
        while (owner := self.full(owners[::-1], size_bytes)) is not None and not gone():
            if owner[0] == "c":
                deadline = loop.time() + MAX_WAIT_S
            elif loop.time() >= deadline:
                raise Overloaded(_refusal(owner, self._most[owner[0]]))
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._freed.wait()
        self.change(owners, size_bytes)
        return Room(self, owners, size_bytes)


def _refusal(owner: str, most: int) -> str:
    whose = "of this user" if owner[0] == "u" else "of this gateway"
    return (
        f"the answers {whose} that are under way have {most} bytes (TIDEWIRE_LIMIT_ANSWER_BYTES, times "
        f"{USER_SHARE if owner[0] == 'u' else GATEWAY_SHARE}): read them, or ask for less at a time"
    )
