"""Two versions of an application on one stage: no reader loses a change of a table that only one declares."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from importlib import import_module
from typing import Any

import pytest

from tests.helpers import wait_until
from tidewire import App, everyone
from tidewire.model.records import unpack
from tidewire.process.lifecycle import Service, listen
from tidewire.process.partition.worker import Worker
from tidewire.process.settings import Settings
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.testing import Stage

from .conftest import Wire, as_user, eventually

pytestmark = pytest.mark.real

PARTITIONS = 4
KEYS = Keys("any", PARTITIONS)
ROOMS = [
    next(f"r{n}" for n in range(100) if KEYS.partition_of(f"r{n}") == partition) for partition in range(PARTITIONS)
]
"""One room in each partition."""


def version(number: int) -> App:
    """Version 2 adds a table read by a membership that both have, and a membership with a table of its own."""
    app = App("rolling")
    rooms = app.membership("members", group="room", member="user", writers=everyone)
    app.table("notes", key=("room", "id"), readers=rooms.of("room"), writers=everyone)
    if number == 2:
        app.table("secrets", key=("room", "id"), readers=rooms.of("room"), writers=everyone)
        guests = app.membership("guests", group="room", member="user", writers=everyone)
        app.table("menus", key=("room", "id"), readers=guests.of("room"), writers=everyone)
    app.check()
    return app


class Rolling:
    """Services of both versions on one stage."""

    def __init__(self, address: str, name: str) -> None:
        self.address = address
        self.keys = Keys(name, PARTITIONS)
        self.settings = Settings(stage=name, partitions=PARTITIONS, lease_ms=1500, drain_seconds=0.02)

    @contextlib.asynccontextmanager
    async def backend(self) -> AsyncIterator[Backend]:
        async with await connect(self.address, self.keys) as backend:
            yield backend

    @contextlib.asynccontextmanager
    async def running(self, kind: str, app: App) -> AsyncIterator[Worker]:
        """A store or a broadcaster."""
        async with self.backend() as backend:
            service = Service(kind, backend, self.settings)
            worker: Worker = import_module(f"tidewire.services.{kind}.service").build(service, app)
            async with service.running():
                yield worker

    @contextlib.asynccontextmanager
    async def gateway(self, app: App) -> AsyncIterator[Stage]:
        """A gateway with an authorizer, and its clients."""
        async with self.backend() as backend, AsyncExitStack() as stack:
            authorizer = Service("authorizer", backend, self.settings)
            import_module("tidewire.services.authorizer.service").build(authorizer)
            await stack.enter_async_context(authorizer.running())
            service = Service("gateway", backend, self.settings)
            gateway = import_module("tidewire.services.gateway.service").build(service, app)
            ws, http = (listen("127.0.0.1", 0, what) for what in ("ws", "http"))
            await stack.enter_async_context(gateway.listening(ws, http))
            await stack.enter_async_context(service.running())
            clients = await stack.enter_async_context(AsyncExitStack())
            ports = [listener.getsockname()[1] for listener in (ws, http)]
            yield Stage(backend, f"ws://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", clients)


async def own_something(*workers: Worker) -> None:
    await wait_until(lambda: all(worker.partitions for worker in workers), "each worker owns a partition")


async def keys_received(reader: Wire, table: str, last: str) -> list[str]:
    """Return the frames of a table in the order of arrival, up to one with that id from each room."""
    left, received = set(ROOMS), []
    while left:
        frame = await reader.next(type="change", table=table)
        received.append(f"{frame['key']['room']} {frame['event']} {frame['key'].get('id')}")
        if frame["key"].get("id") == last:
            left.discard(frame["key"]["room"])
    return received


@pytest.mark.parametrize(("membership", "table"), [("members", "secrets"), ("guests", "menus")])
async def test_an_index_that_only_another_version_knows_is_left_to_it(
    server: str, stack: AsyncExitStack, membership: str, table: str
) -> None:
    rolling, old, new = Rolling(server, f"left-{table}"), version(1), version(2)
    await stack.enter_async_context(rolling.running("store", old))
    before = await stack.enter_async_context(rolling.running("broadcaster", old))
    after_store = await stack.enter_async_context(rolling.running("store", new))
    after = await stack.enter_async_context(rolling.running("broadcaster", new))
    await own_something(before, after, after_store)
    async with rolling.gateway(new) as stage, AsyncExitStack() as clients:
        admin = await as_user(stage, clients, "admin", role="service")
        removed, added = [await as_user(stage, clients, name) for name in ("removed", "added")]
        for room in ROOMS:
            await admin.do("put", table=membership, item={"room": room, "user": "removed"})
            await admin.do("put", table=table, item={"room": room, "id": "1"})
        received = await keys_received(removed, table, "1")
        assert {line for line in received if "INSERT" in line or "ENTER" in line} != set(), received
        for room in ROOMS:
            await admin.do("put", table=membership, item={"room": room, "user": "added"})
            await admin.do("delete", table=membership, key={"room": room, "user": "removed"})
            await admin.do("put", table=table, item={"room": room, "id": "2"})
            await admin.do("put", table="notes", item={"room": room, "id": "end"})
        await keys_received(added, table, "2")
        await removed.do("ping")
        assert not [f for f in removed.frames if f.get("table") == table and f["key"].get("id") == "2"]
    async with rolling.backend() as backend:
        marks = [await backend.commands.hget(backend.keys.partition(n), "unknown") for n in range(PARTITIONS)]
        assert marks == [None] * PARTITIONS, "nobody passed what it did not know"
    assert set(before.partitions) & set(after.partitions) == set()


@pytest.mark.parametrize(("membership", "table"), [("members", "secrets"), ("guests", "menus")])
async def test_an_index_that_no_live_store_knew_is_repaired_by_one_that_does(
    server: str, stack: AsyncExitStack, membership: str, table: str
) -> None:
    """Only the store and the gateway are of version 2 when a membership ends; then the broadcaster is rolled too."""
    rolling, old, new = Rolling(server, f"repaired-{table}"), version(1), version(2)
    await stack.enter_async_context(rolling.running("store", new))
    stage = await stack.enter_async_context(rolling.gateway(new))
    async with AsyncExitStack() as clients, rolling.backend() as backend:
        admin = await as_user(stage, clients, "admin", role="service")
        removed, added = [await as_user(stage, clients, name) for name in ("removed", "added")]
        async with rolling.running("broadcaster", new):
            for room in ROOMS:
                await admin.do("put", table=membership, item={"room": room, "user": "removed"})
                await admin.do("put", table=table, item={"room": room, "id": "1"})
            await keys_received(removed, table, "1")
        async with rolling.running("broadcaster", old):
            for room in ROOMS:
                await admin.do("put", table=membership, item={"room": room, "user": "added"})
                await admin.do("delete", table=membership, key={"room": room, "user": "removed"})

            async def noted() -> bool:
                names = [await backend.commands.hget(backend.keys.partition(n), "unknown") for n in range(PARTITIONS)]
                return all(name is not None and unpack(name) for name in names)

            await eventually(noted)
        async with rolling.running("broadcaster", new):
            for reader in (removed, added):
                await reader.next(type="reset", topic=None, table=None)
            for room in ROOMS:
                await admin.do("put", table=table, item={"room": room, "id": "2"})
            await keys_received(added, table, "2")
            await removed.do("ping")
            received: list[Any] = [f for f in removed.frames if f.get("table") == table]
            assert not [f for f in received if f["key"].get("id") == "2"]
            names = [await backend.commands.hget(backend.keys.partition(n), "unknown") for n in range(PARTITIONS)]
            assert not any(name and unpack(name) for name in names), "the marks are gone"
