"""Connections that leave: a drain, and the maximum age."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from unittest.mock import ANY

import pytest
from websockets.exceptions import ConnectionClosed

from tests.helpers import wait_until
from tidewire.testing import Stage

from .conftest import Open, Wire, another_gateway, as_user, make_app


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
        assert alice.ws.close_reason == "this connection has reached its maximum age"
        assert 0 <= int(str(frames[0]["after_ms"])) <= 1000
        again = await as_user(stage, stack, "alice", cursor=alice.welcome["cursor"])
        assert again.welcome["resumed"] is True


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


@pytest.mark.parametrize("drain_seconds", [0.4, 0.0])
async def test_a_drain_does_not_wait_for_ever(stage: Stage, stack: AsyncExitStack, drain_seconds: float) -> None:
    async with another_gateway(stage, drain_seconds=drain_seconds) as (gateway, there):
        alice = await as_user(there, stack, "alice")
        (connection,) = gateway.connections.values()
        connection.answered.clear()
        await gateway.drain()
        assert (await left(alice))[0] == 1012
