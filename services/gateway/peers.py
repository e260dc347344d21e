"""The peer of a connection: a websocket (`websocket`), or a reader of server-sent events (`event_stream`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from .frames import Gathered

Take = Callable[[str | bytes], Awaitable[None]]
Mark = tuple[str | None, str]
"""The cursor that a frame moves its peer to: (topic, cursor), with None for the user's own feed."""


class Peer(Protocol):
    """What a connection needs of its peer."""

    binary: bool
    source_ip: str
    user_agent: str

    def is_open(self) -> bool:
        """Whether frames can still be sent to the peer."""

    def queued_bytes(self) -> int:
        """Bytes that were written and that the socket has not taken."""

    def write(self, data: bytes, *marks: Mark) -> None:
        """Queue a frame without waiting."""

    def write_gathered(self, gathered: Gathered) -> None:
        """Queue all of these frames without waiting."""

    def write_raw(self, data: bytes) -> None:
        """Queue data of an administrator as a frame of its own, without waiting: text if it is UTF-8."""

    async def send(self, data: bytes, *marks: Mark) -> None:
        """Queue a frame, waiting while the peer is slow. Raises ConnectionClosed."""

    async def close(self, code: int, reason: str) -> None:
        """Close with a websocket close code."""

    async def receive(self, take: Take) -> None:
        """Pass each frame that the peer sends to `take`, until the connection is closed."""
