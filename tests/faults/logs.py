"""The notes of the users under test, as plain values for the checker."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from .images import digest


class Span(NamedTuple):
    """A stretch of time, in ms since 1970."""

    since_ms: float
    until_ms: float


class Window(NamedTuple):
    """A fault: its stretch of time in ms since 1970, and its kind."""

    since_ms: float
    until_ms: float
    kind: str


class Got(NamedTuple):
    """A frame, as a reader's log keeps it."""

    at_ms: float
    type: str
    topic: str | None
    cursor: str | None
    position: str | None
    event: str | None
    table: str | None
    key: tuple[tuple[str, Any], ...]
    new: int | None
    old: int | None
    body: str | None = None  # of a message
    transaction: str | None = None
    more: bool = False


def got(frame: dict[str, Any]) -> Got:
    """A frame that has just come."""
    return Got(
        time.time() * 1000,
        frame["type"],
        frame.get("topic"),
        frame.get("cursor"),
        frame.get("position"),
        frame.get("event"),
        frame.get("table"),
        tuple(sorted((frame.get("key") or {}).items())),
        digest(frame.get("new")),
        digest(frame.get("old")),
        frame["body"] if frame["type"] == "message" else None,
        frame.get("transaction"),
        bool(frame.get("more")),
    )


class User(NamedTuple):
    name: str
    key: str
    tenant: str


class Acknowledged(NamedTuple):
    """A write that was said to be done."""

    request: str
    action: str
    at_ms: float


class Late(NamedTuple):
    """A request that the system answered with `timeout`, or did not answer at all."""

    user: str
    action: str
    since_ms: float
    until_ms: float


class Probe(NamedTuple):
    """One small write of a partition's prober. `delivered_ms` is None while its change has not come."""

    partition: int
    number: int
    since_ms: float
    delivered_ms: float | None


class Absence(NamedTuple):
    """A connection that was open all the while, and was not in the table `connections`."""

    user: str
    connection: str
    since_ms: float
    until_ms: float


class Reconnect(NamedTuple):
    """A prober's connection that was replaced by another one. `since_ms` is when it was last seen open."""

    user: str
    since_ms: float
    at_ms: float


class Peak(NamedTuple):
    """The most memory that a process had, in bytes."""

    who: str  # the kind of service, or redis
    size_bytes: int
