"""Connections that leave: a drain, and the maximum age."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from unittest.mock import ANY

import pytest
from websockets.exceptions import ConnectionClosed

from tests.helpers import wait_until
from tidewire.process.lifecycle import Service, listen
from tidewire.process.settings import Settings
from tidewire.services.gateway.service import Gateway, build
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user, make_app


async def left(wire: Wire) -> tuple[int, list[dict[str, object]]]:
    """Return the close code of a connection, and the frames before it, without changes."""
    frames = []
    while True:
        try:
            frame = await wire.receive()
            frames += [frame] if frame["type"] != "change" else []
        except ConnectionClosed:
            return await wire.closed(), frames


async def test_a_connection_of_some_age_is_asked_to_reconnect(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(make_app(), max_connection_s=0.5, drain_seconds=4.0) as stage:
        begun = time.monotonic()
        alice = await as_user(stage, stack, "alice")
        code, frames = await left(alice)
        assert time.monotonic() - begun > 0.4
        assert code == 1012
        assert [frame["type"] for frame in frames] == ["reconnect"]
        assert 0 <= int(str(frames[0]["after_ms"])) <= 1000
        again = await as_user(stage, stack, "alice", cursor=alice.welcome["cursor"])
        assert again.welcome["resumed"] is True


@asynccontextmanager
async def another_gateway(stage: Stage, **options: Any) -> AsyncIterator[tuple[Gateway, Stage]]:
    """A second gateway of a stage, and the stage by way of it."""
    keys = stage.backend.keys
    settings = Settings(stage=keys.stage, partitions=keys.partitions, lease_ms=1000, **options)
    service = Service("gateway", stage.backend, settings)
    ws, http = (listen("127.0.0.1", 0, what) for what in ("ws", "http"))
    gateway = build(service, make_app())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(gateway.listening(ws, http))
        await stack.enter_async_context(service.running())
        addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in (ws, http)]
        yield gateway, Stage(stage.backend, f"ws://{addresses[0]}", f"http://{addresses[1]}", stack)


async def test_a_drain_lets_requests_under_way_be_answered(
    stage: Stage, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = asyncio.Event()

    async def begin(*_: object) -> object:
        await answer.wait()
        return {}

    async with another_gateway(stage, drain_seconds=20.0) as (gateway, there):
        alice, bob = await as_user(there, stack, "alice"), await as_user(there, stack, "bob")
        monkeypatch.setattr(gateway.core, "begin", begin)
        for id_ in range(10):
            await alice.send({"id": id_, "action": "ping"})
        connection = next(one for one in gateway.connections.values() if one.principal.user == "alice")
        await wait_until(lambda: not connection.answered.is_set(), "the requests have arrived")
        draining = asyncio.create_task(gateway.drain())
        assert (await alice.next(type="reconnect"))["after_ms"] <= 1000
        assert await left(bob) == (1012, [ANY]), "who waits for nothing leaves at once"
        assert not alice.ws.close_code, "its requests are under way"
        with pytest.raises(ConnectionRefusedError):
            await as_user(there, stack, "carol")  # nobody listens any more
        answer.set()
        code, frames = await left(alice)
        assert (code, [frame["id"] for frame in frames]) == (1012, list(range(10)))
        await draining
        assert not gateway.connections


async def test_a_drain_does_not_wait_for_ever(stage: Stage, stack: AsyncExitStack) -> None:
    async with another_gateway(stage, drain_seconds=0.4) as (gateway, there):
        alice = await as_user(there, stack, "alice")
        (connection,) = gateway.connections.values()
        connection.answered.clear()
        await gateway.drain()
        assert (await left(alice))[0] == 1012
