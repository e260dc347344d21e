"""Redis stalls, or a gateway is paused: the living are not taken for dead, and the dead are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.protocol import State

from tests.helpers import LONG, wait_until
from tidewire.redis import keyring

from .conftest import Up, descendants

SOCKETS = 100
USERS = 10

long = pytest.mark.skipif(not LONG, reason="takes half a minute: done by make test-long")


class Sockets:
    """Raw websockets, which do not reconnect, by connection id."""

    def __init__(self, up: Up) -> None:
        self.up = up
        self.by_id: dict[str, ClientConnection] = {}
        self._reading: list[asyncio.Task[None]] = []

    async def open(self, stack: contextlib.AsyncExitStack, key: str) -> None:
        ws = await stack.enter_async_context(
            websockets.connect(self.up.url, additional_headers={"auth_key": key}, proxy=None, ping_interval=None)
        )
        welcome = json.loads(await ws.recv())
        self.by_id[welcome["connection"]] = ws
        self._reading.append(asyncio.create_task(self._read(ws)))

    async def _read(self, ws: ClientConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for _ in ws:
                pass

    def closed(self) -> dict[str, int | None]:
        return {id_: ws.close_code for id_, ws in self.by_id.items() if ws.state is not State.OPEN}

    def of_gateway(self, gateway: str) -> set[str]:
        return {id_ for id_ in self.by_id if id_.rpartition("-")[0] == gateway}


@contextlib.asynccontextmanager
async def connected(up: Up) -> AsyncIterator[tuple[Sockets, Any, Any]]:
    """A hundred sockets on two gateways, and a service's client and a backend to look with."""
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(await up.backend())
        keys = [str(await keyring.create(backend, f"user{number}")) for number in range(USERS)]
        sockets = Sockets(up)
        for number in range(SOCKETS):
            await sockets.open(stack, keys[number % USERS])
        service = await stack.enter_async_context(
            up.client("job", str(await keyring.create(backend, "job", role="service")))
        )
        await wait_until(lambda: all_listed(service, sockets), "all connections are listed")
        yield sockets, service, backend


async def listed(service: Any) -> set[str]:
    """Ids of all connections of the users, as the table `connections` has them."""
    pages = [await service.query("connections", f"user{number}", limit=1000) for number in range(USERS)]
    return {entry["item"]["connection"] for page in pages for entry in page["items"]}


async def all_listed(service: Any, sockets: Sockets) -> bool:
    return sockets.by_id.keys() <= await listed(service)


async def owners(up: Up) -> dict[str, list[str | None]]:
    groups = (await up.status())["groups"]
    return {kind: [one["owner"] for one in groups[kind]["partitions"]] for kind in ("store", "broadcaster")}


def server_pid(up: Up) -> int:
    assert up.process
    found = [pid for pid in descendants(up.process.pid) if "valkey-server" in _command(pid)]
    assert len(found) == 1, found
    return found[0]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


@contextlib.asynccontextmanager
async def paused(pid: int, for_s: float) -> AsyncIterator[None]:
    """The process is stopped from the start of the block, for that long at least."""
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(for_s))
            yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("stall_s", [4.0, pytest.param(8.0, marks=long)])
async def test_a_stall_of_redis_closes_no_socket_and_loses_no_connection(new_up: Any, stall_s: float) -> None:
    up = new_up("--gateways", "2", "--stores", "2", "--broadcasters", "2")

    async def equal_shares() -> bool:
        """No process hands a partition to another any more: what changes hands later was taken over."""
        return all(
            None not in names and sorted(Counter(names).values()) == [len(names) // 2] * 2
            for names in (await owners(up)).values()
        )

    await wait_until(equal_shares, "both stores and both broadcasters have their shares of the partitions")
    async with connected(up) as (sockets, service, _):
        before = await owners(up)
        async with paused(server_pid(up), stall_s):
            write = asyncio.create_task(service.put("messages", {"room": "r", "id": "m", "text": "in the stall"}))
        await write
        await service.put("messages", {"room": "r", "id": "m2", "text": "after it"})
        # Long enough for a wrong judgement: a lease of contact, two looks and the sweep.
        await asyncio.sleep(10)
        assert sockets.closed() == {}, "no socket is closed"
        missing = sockets.by_id.keys() - await listed(service)
        assert not missing, f"{len(missing)} of {SOCKETS} live connections are not in the table"
        log = up.log.read_text()
        assert "connections_swept" not in log
        assert "gateway_swept" not in log
        assert await owners(up) == before, "nobody took over from the living"


@long
@pytest.mark.slow
async def test_a_gateway_that_is_paused_is_swept_and_its_clients_come_back(new_up: Any) -> None:
    up = new_up("--gateways", "2")
    async with connected(up) as (sockets, service, _):
        gateways = {one["id"]: one["pid"] for one in (await up.status())["services"] if one["kind"] == "gateway"}
        # Not the one that the looking client is connected to.
        looking = service.connection.rpartition("-")[0]
        victim = next(gateway for gateway in gateways if gateway != looking)
        gone, stayed = sockets.of_gateway(victim), sockets.of_gateway(looking)
        assert gone
        assert stayed

        async def swept() -> bool:
            return not gone & await listed(service)

        async with paused(gateways[victim], 7):
            await wait_until(swept, "the connections of the paused gateway are gone")
        await asyncio.wait_for(asyncio.gather(*(sockets.by_id[id_].wait_closed() for id_ in gone)), 30)
        assert sockets.closed() == dict.fromkeys(gone, 1012), "its sockets, and only those, are closed"
        await asyncio.sleep(2)
        assert await listed(service) == stayed, "nothing of it is put back"


@pytest.mark.slow
async def test_a_killed_gateway_is_noticed_within_seconds(new_up: Any) -> None:
    up = new_up("--gateways", "2")
    async with connected(up) as (sockets, service, _):
        gateways = {one["id"]: one["pid"] for one in (await up.status())["services"] if one["kind"] == "gateway"}
        looking = service.connection.rpartition("-")[0]
        victim = next(gateway for gateway in gateways if gateway != looking)
        gone = sockets.of_gateway(victim)
        begun = asyncio.get_running_loop().time()
        os.kill(gateways[victim], signal.SIGKILL)

        async def swept() -> bool:
            return not gone & await listed(service)

        await wait_until(swept, "the connections of the killed gateway are gone", 15)
        print(f"swept {asyncio.get_running_loop().time() - begun:.1f} s after the kill")
