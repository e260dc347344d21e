"""Noting the expiry of items that were written before their table declared it."""

from __future__ import annotations

from typing import Any

import pytest

from tidewire import App, everyone, testing
from tidewire.model.records import unpack
from tidewire.redis.backend import Backend
from tidewire.redis.keys import PartitionField
from tidewire.services.store import expiries as expiries_module
from tidewire.services.store.expiries import Expiries

COUNT = 7


def make_app(expires: str | None) -> App:
    app = App("test")
    app.table("notes", key="id", readers=everyone, writers=everyone, expires=expires)
    return app


async def filled(stage: testing.Stage) -> None:
    """Write items, of which every second has a time in `until` and all have one in `ends`."""
    client = await stage.client("alice")
    for n in range(COUNT):
        item: dict[str, Any] = {"id": n, "ends": 4_000_000_000 + n}
        await client.put("notes", item | ({"until": 3_000_000_000 + n} if n % 2 else {}))


async def carry_out(expiries: Expiries, backend: Backend) -> int:
    """Carry out all steps, and return how many there were."""
    steps = 0
    while commands := await expiries.step():
        steps += 1
        await backend.calls((command.command, command.key, *command.args) for command in commands)
    return steps


async def noted(backend: Backend) -> dict[int, float]:
    found: Any = await backend.commands.zrange(backend.keys.expiries(0), 0, -1, withscores=True)
    return {unpack(member)[1]: score for member, score in found}


async def test_all_items_are_noted_in_steps_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiries_module, "NOTE_BATCH", 3)
    async with testing.run(make_app(None), partitions=1) as stage:
        await filled(stage)
        assert await carry_out(Expiries(make_app("until"), stage.backend, 0), stage.backend) == 3
        assert await noted(stage.backend) == {n: 3_000_000_000 + n for n in range(COUNT) if n % 2}
        assert await carry_out(Expiries(make_app("until"), stage.backend, 0), stage.backend) == 0, "it is done"


async def test_the_next_owner_goes_on_where_the_last_one_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiries_module, "NOTE_BATCH", 3)
    async with testing.run(make_app(None), partitions=1) as stage:
        await filled(stage)
        first = await Expiries(make_app("until"), stage.backend, 0).step()
        await stage.backend.calls((command.command, command.key, *command.args) for command in first)
        assert await carry_out(Expiries(make_app("until"), stage.backend, 0), stage.backend) == 2
        assert await noted(stage.backend) == {n: 3_000_000_000 + n for n in range(COUNT) if n % 2}


async def test_another_attribute_is_noted_anew() -> None:
    async with testing.run(make_app(None), partitions=1) as stage:
        await filled(stage)
        await carry_out(Expiries(make_app("until"), stage.backend, 0), stage.backend)
        await carry_out(Expiries(make_app("ends"), stage.backend, 0), stage.backend)
        assert await noted(stage.backend) == {n: 4_000_000_000 + n for n in range(COUNT)}


async def test_a_table_that_no_longer_expires_is_forgotten_and_noted_anew_later() -> None:
    async with testing.run(make_app(None), partitions=1) as stage:
        await filled(stage)
        await carry_out(Expiries(make_app("until"), stage.backend, 0), stage.backend)
        assert await carry_out(Expiries(make_app(None), stage.backend, 0), stage.backend) == 1
        kept: Any = await stage.backend.commands.hget(stage.backend.keys.partition(0), PartitionField.EXPIRES)
        assert unpack(kept) == {}
        assert await carry_out(Expiries(make_app("until"), stage.backend, 0), stage.backend) == 1
