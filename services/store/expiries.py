"""Noting the expiry of items that were written before their table declared `expires`, or declared it differently."""

from __future__ import annotations

from typing import NamedTuple

from tidewire.app import App
from tidewire.model.records import pack, unpack
from tidewire.redis.backend import Backend
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import PartitionField
from tidewire.redis.walk import WalkPosition, walk

from .appending import expiry_of, keep_expiry

NOTE_BATCH = 200


class Noted(NamedTuple):
    """How far the items of a table in a partition are noted."""

    attribute: str
    place: WalkPosition | None  # the last noted item; None at the start
    done: bool = False


class Expiries:
    """Walks through the tables of one partition, one step with each batch. Only the owner of the partition uses it."""

    def __init__(self, app: App, backend: Backend, partition: int) -> None:
        self._app = app
        self._backend = backend
        self._partition = partition
        self._noted: dict[str, Noted] | None = None

    async def step(self) -> list[RedisCommand]:
        """Return the commands of the next step, or [] when done.

        They come before those of the batch, which are newer.
        """
        keep = False
        if self._noted is None:
            self._noted, keep = await self._found()
        noted = self._noted
        name = next((name for name, one in noted.items() if not one.done), None)
        if name is None:
            return [self._kept()] if keep else []
        found = await walk(self._backend, self._partition, name, noted[name].place, NOTE_BATCH)
        done = len(found) < NOTE_BATCH
        noted[name] = Noted(noted[name].attribute, None if done else found[-1][0], done)
        table, keys = self._app[name], self._backend.keys
        expiries = keys.expiries(self._partition)
        operations = [keep_expiry(expiries, key, expiry_of(table, record.item)) for _, key, record in found]
        return [*operations, self._kept()]

    def _kept(self) -> RedisCommand:
        return RedisCommand(
            "HSET", self._backend.keys.partition(self._partition), (PartitionField.EXPIRES, pack(self._noted))
        )

    async def _found(self) -> tuple[dict[str, Noted], bool]:
        """Return the notes, and whether they must be written again.

        A note of a table that this application does not declare is dropped, because items are no longer noted for it.
        """
        raw = await self._backend.commands.hget(self._backend.keys.partition(self._partition), PartitionField.EXPIRES)
        stored = unpack(raw) if raw else {}
        found: dict[str, Noted] = {}
        for table in self._app.tables.values():
            if table.expires is None:
                continue
            attribute, place, done = stored.get(table.name, (None, None, False))
            if attribute == table.expires:
                found[table.name] = Noted(attribute, None if place is None else WalkPosition(*place), done)
            else:
                found[table.name] = Noted(table.expires, None)
        return found, any(name not in found or found[name].attribute != one[0] for name, one in stored.items())
