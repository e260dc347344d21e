"""Connections of several gateways, administered from one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import pytest
import websockets

from .conftest import Up, tidewire

SOCKETS = 12
CLOSED_S = 3.0
"""Three times the second within which all sockets of a user close."""


async def sockets_of(up: Up, stack: contextlib.AsyncExitStack, user: str) -> dict[str, list[Any]]:
    """Open sockets of a user, and return them by gateway. The kernel spreads them over both."""
    headers = {"Authorization": f"Bearer {up.keys()[user]}"}
    found: dict[str, list[Any]] = {}
    while len(found) < 2 or sum(map(len, found.values())) < SOCKETS:
        ws = await stack.enter_async_context(websockets.connect(up.url, additional_headers=headers))
        welcome = json.loads(await ws.recv())
        found.setdefault(welcome["connection"].rpartition("-")[0], []).append((welcome["connection"], ws))
    return found


@pytest.mark.real
async def test_a_user_is_kicked_and_written_to_on_every_gateway(new_up: Any) -> None:
    up = new_up("--gateways", "2")
    through = ["--key", up.key("backend", "--role", "service"), "--url", up.http]
    async with contextlib.AsyncExitStack() as stack:
        found = await sockets_of(up, stack, "alice")
        everyone = [one for some in found.values() for one in some]
        for some in found.values():
            id_, ws = some[0]
            sent = await asyncio.to_thread(tidewire, "send", id_, '{"hello":1}', *through)
            assert sent.returncode == 0, sent.stderr
            assert json.loads(sent.stdout)["delivered"]
            async with asyncio.timeout(30):
                while json.loads(await ws.recv()).get("body") != {"hello": 1}:
                    pass
        kicked = await asyncio.to_thread(tidewire, "kick", "alice", *through)
        begun = time.monotonic()
        assert json.loads(kicked.stdout) == {"disconnected": len(everyone)}
        for _, ws in everyone:
            await ws.wait_closed()
            assert ws.close_code == 4403
        took_s = time.monotonic() - begun
        print(f"{len(everyone)} sockets on {len(found)} gateways closed within {took_s:.2f} s of the answer")
        assert took_s < CLOSED_S
    refused = await asyncio.to_thread(tidewire, "kick", "bob", "--key", up.keys()["alice"], "--url", up.http)
    assert (refused.returncode, "requires a service key" in refused.stderr) == (1, True)
