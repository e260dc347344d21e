"""The whole system in a test's own process, on fakeredis. Sockets, frames and services are the real ones.

    async with tidewire.testing.run(app) as stage:
        alice = await stage.client("alice")
        await alice.put("notes", {"id": "n1"})
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

import fakeredis
from redis.asyncio import Redis

from tidewire import keyring
from tidewire.app import App
from tidewire.backend import Backend
from tidewire.client import Client
from tidewire.keys import Keys
from tidewire.lifecycle import Service, listen
from tidewire.settings import Settings


def fake_backend(server: fakeredis.FakeServer, keys: Keys) -> Backend:
    """A backend on a fake server; several on one server see the same data."""
    clients: list[Redis] = [fakeredis.FakeAsyncRedis(server=server) for _ in range(2)]
    return Backend(clients[0], clients[1], keys)


class Stage:
    """A running system."""

    def __init__(self, backend: Backend, url: str, http_url: str, stack: contextlib.AsyncExitStack) -> None:
        self.backend = backend
        self.url = url
        self.http_url = http_url
        self._stack = stack

    async def key(self, user: str, *, role: str = "client", claims: dict[str, Any] | None = None) -> str:
        """A new auth_key of that user."""
        return str(await keyring.create(self.backend, user, role=role, claims=claims))

    async def client(self, user: str, *, role: str = "client", claims: dict[str, Any] | None = None) -> Client:
        """A connected client of that user; it is closed with the stage."""
        key = await self.key(user, role=role, claims=claims)
        return await self._stack.enter_async_context(Client(self.url, key))


@contextlib.asynccontextmanager
async def run(app: App, *, backend: Backend | None = None, **settings: Any) -> AsyncIterator[Stage]:
    """Run store, broadcaster, authorizer and gateway until the block is left. `settings` as in tidewire.settings."""
    # By name: this module is shared, and what is shared imports no service.
    services = {
        kind: import_module(f"tidewire.services.{kind}.service")
        for kind in ("store", "broadcaster", "authorizer", "gateway")
    }
    app.check()
    chosen = Settings(**settings)
    keys = Keys(chosen.stage, chosen.partitions)
    server = fakeredis.FakeServer()
    async with contextlib.AsyncExitStack() as stack:

        def another() -> Backend:
            return backend if backend is not None else fake_backend(server, keys)

        shared = await stack.enter_async_context(another())
        await shared.open_stage()
        for kind in ("store", "broadcaster", "authorizer"):
            service = Service(kind, await stack.enter_async_context(another()), chosen)
            services[kind].build(service, *(() if kind == "authorizer" else (app,)))
            await stack.enter_async_context(service.running())
        ws, http = (listen("127.0.0.1", 0, what) for what in ("ws", "http"))
        service = Service("gateway", await stack.enter_async_context(another()), chosen)
        gateway = services["gateway"].build(service, app)
        await stack.enter_async_context(gateway.listening(ws, http))
        await stack.enter_async_context(service.running())
        ports = [listener.getsockname()[1] for listener in (ws, http)]
        clients = await stack.enter_async_context(contextlib.AsyncExitStack())
        yield Stage(shared, f"ws://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", clients)
