"""Items that were there before their table named an attribute of expiry, or this one: they come to expire too."""

from __future__ import annotations

from typing import NamedTuple

from tidewire.app import App
from tidewire.model.records import pack, unpack
from tidewire.redis.backend import Backend
from tidewire.redis.functions import RedisCommand
from tidewire.redis.keys import PartitionField
from tidewire.redis.walk import WalkPosition, walk

from .appending import expiry_of, keep_expiry

AT_A_TIME = 200


class Noted(NamedTuple):
    """How far a table's items of a partition are noted as those that expire."""

    attribute: str
    place: WalkPosition | None  # the last one that was; None at the start
    done: bool = False


class Expiries:
    """Works through the tables of one partition, a step with each batch. Used by the partition's owner alone."""

    def __init__(self, app: App, backend: Backend, partition: int) -> None:
        self._app = app
        self._backend = backend
        self._partition = partition
        self._noted: dict[str, Noted] | None = None

    async def step(self) -> list[RedisCommand]:
        """To be done before all else that is in the batch, which may know better; [] when there is nothing left."""
        keep = False
        if self._noted is None:
            self._noted, keep = await self._found()
        noted = self._noted
        name = next((name for name, one in noted.items() if not one.done), None)
        if name is None:
            return [self._kept()] if keep else []
        found = await walk(self._backend, self._partition, name, noted[name].place, AT_A_TIME)
        done = len(found) < AT_A_TIME
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
        """What is noted, and whether less of it holds than was kept.

        What this application does not declare is forgotten: from now on it is written without being noted.
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
