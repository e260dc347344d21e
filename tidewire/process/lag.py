"""How far the groups that read streams are behind."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from redis.exceptions import ResponseError

from tidewire.redis.backend import Backend
from tidewire.redis.keys import ConsumerGroup, Keys


class Lag(NamedTuple):
    """Entries that a group has not read, and entries that it has read and not acknowledged."""

    lag: int
    pending: int


def streams_of(keys: Keys, group: ConsumerGroup) -> list[bytes]:
    """Return the streams that a group reads, by partition if it has partitions."""
    if group == ConsumerGroup.AUTHORIZER:
        return [keys.authorizations()]
    stream = keys.commands if group == ConsumerGroup.STORE else keys.changes
    return [stream(partition) for partition in range(keys.partitions)]


async def lag_of(backend: Backend, stream: bytes, group: str) -> Lag | None:
    """Return how far a group is behind in a stream. None if the group does not exist."""
    try:
        found = await backend.commands.xinfo_groups(stream)
    except ResponseError:
        return None  # no such stream yet
    for one in found:
        if one["name"] == group.encode():
            return Lag(int(one.get("lag") or 0), int(one["pending"]))
    return None


async def total_lag(backend: Backend, group: ConsumerGroup) -> Lag:
    """Return how far a group is behind in all of its streams together."""
    streams = streams_of(backend.keys, group)
    found = [one for one in await asyncio.gather(*(lag_of(backend, stream, group) for stream in streams)) if one]
    return Lag(sum(one.lag for one in found), sum(one.pending for one in found))
