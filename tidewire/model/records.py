"""Records in Redis, stored as MessagePack arrays of the tuples below.

Several releases read the same records. A new field goes to the end, and has a default.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

JSON = Any
"""A value of JSON: of a request's body, a result, a frame."""
Item = dict[str, Any]
Id = tuple[int, int]
"""The id of an entry in a stream: ms and seq."""


def pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes | str) -> Any:
    return msgpack.unpackb(data, raw=False, strict_map_key=False)


def text(raw: bytes | str) -> str:
    """Decode a name from Redis."""
    return raw.decode() if isinstance(raw, bytes) else raw


class ItemRecord(NamedTuple):
    """A stored item. `item` is None for a tombstone, which remembers the version of a deleted item."""

    version: int
    at: int  # ms since 1970
    by: str
    item: Item | None


class Command(NamedTuple):
    """A request in the command stream of a partition."""

    action: str
    body: dict[str, Any]
    user: str
    role: str  # "client" or "service"
    claims: dict[str, Any]
    connection: str | None
    request: str | None  # the client's request id: a repeat of it returns the first result
    request_ttl_ms: int
    deadline: int  # ms since 1970, server time; later than that, the store does not do it
    reply_to: str  # gateway
    number: int  # of the gateway's requests; it grows, so that a repeat is recognized
    trace: str | None = None  # W3C traceparent


class Reply(NamedTuple):
    """The answer to a command: a result, or an error as {code, message, details}."""

    number: int
    result: JSON
    error: dict[str, Any] | None
    cost_ms: float = 0.0
    """Work that the command made for the machines, in ms of one core, about."""


class FirstReply(NamedTuple):
    """The first reply to a request id, kept for repeats of the request."""

    result: JSON
    error: dict[str, Any] | None
    digest: bytes
    """Of the request's body, as `digest_of` makes it."""


class GatewayOrder(NamedTuple):
    """What a gateway is to do with its connections, in the stream of that gateway."""

    action: str
    fields: dict[str, Any]
    deadline: int  # ms since 1970, server time
    reply_to: str  # gateway
    number: int


class Change(NamedTuple):
    """The record of one write, in the change stream.

    It always has both images: readers of the old one receive a LEAVE.
    """

    event: str  # INSERT, MODIFY or REMOVE; SEND for a message to a user, which has no table
    table: str
    key: dict[str, Any]
    version: int
    new: Item | None
    old: Item | None
    at: int  # ms since 1970
    by: str
    connection: str | None
    request: str | None
    transaction: str | None = None  # equal for all changes of a transaction, which come one after another
    more: bool = False  # whether another change of the transaction follows
    trace: str | None = None  # W3C traceparent
    generation: int = 0  # of the partition when it was written
    previous: Any = None  # id of the change before it, as [ms, seq]: a reader that has not passed that one has a gap
    opens: list[Any] | None = None  # of a membership: `Opened` items, whose visibility may change


class Opened(NamedTuple):
    """The items of one table and group when a membership changes, for the broadcaster to compare."""

    table: str
    records: list[Any]  # `ItemRecord`s, the last in sort order first
    whole: bool  # whether the group has no further items


class Declaration(NamedTuple):
    """A table as declared, for commands that work on a stage without its application."""

    key: tuple[str, ...]
    stream_view: str
    expires: str | None
    indexes: dict[str, tuple[str, str]]


class Authorization(NamedTuple):
    """A question of a gateway to the authorizers."""

    auth_key: str
    reply_to: str
    number: int


class Principal(NamedTuple):
    """The user, role and claims that a credential stands for."""

    user: str
    role: str
    claims: dict[str, Any]
    credential: str  # id of the API key, by which it is revoked
    expires_at: int | None  # ms since 1970


class Credential(NamedTuple):
    """A stored API key. It has the SHA-256 of the secret, never the secret."""

    digest: bytes
    user: str
    role: str
    claims: dict[str, Any]
    created_at: int  # ms since 1970
    expires_at: int | None
    revoked_at: int | None


class FeedBody(NamedTuple):
    """The body of a feed entry: the type of the frame, and the rest of it as JSON text of an object."""

    type: str  # change, message or reset; RECHECK is for the gateway
    rest: bytes
    asks: Any = True  # the condition on a connection's claims, as in tidewire/model/claims.py


RECHECK = "recheck"
"""Type of an entry for gateways: the user may no longer follow all topics, so each connection must ask again."""


class Position(NamedTuple):
    """The position of a change: its partition, generation, and id in the change stream."""

    partition: int
    generation: int
    ms: int
    seq: int

    def __str__(self) -> str:
        return f"{self.partition}-{self.generation}-{self.ms}-{self.seq}"


def id_text(id_: Id) -> str:
    """Write an id as Redis does: (1795409459002, 3) is "1795409459002-3"."""
    return f"{id_[0]}-{id_[1]}"


def stream_id(raw: bytes | str) -> Id:
    """Parse an id: b"1795409459002-3" is (1795409459002, 3)."""
    ms, _, seq = (raw.decode() if isinstance(raw, bytes) else raw).partition("-")
    return int(ms), int(seq or 0)
