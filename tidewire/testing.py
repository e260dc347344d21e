"""All services in the process of a test, on fakeredis. Declarations, frames and sockets are the real ones.

async with tidewire.testing.run(app) as stage:
    alice = await stage.client("alice")
    await alice.put("notes", {"id": "n1"})
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import structlog

try:
    import fakeredis
except ImportError:
    raise ImportError("tidewire.testing runs on fakeredis: pip install 'tidewire[testing]'") from None

from tidewire.app import App
from tidewire.client import Client
from tidewire.errors import ConfigurationError
from tidewire.process.lifecycle import Service, listen
from tidewire.process.settings import Settings
from tidewire.redis import keyring
from tidewire.redis.backend import BLOCK_MS, Backend, StreamEntries, StreamEntry
from tidewire.redis.keys import Keys
from tidewire.services.wiring import WIRING

T = TypeVar("T")


class FakeBackend(Backend):
    """A backend on a fake server. Several on one server share its data."""

    def __init__(self, server: fakeredis.FakeServer, keys: Keys) -> None:
        super().__init__(fakeredis.FakeAsyncRedis(server=server), keys)

    def another(self) -> None:
        """Return None: a fake server wakes blocked readers on the event loop of the writer, so it needs one thread."""

    async def _wait(self, read: Callable[[], Awaitable[list[T]]]) -> list[T]:
        # fakeredis does not block on an existing empty stream, so ask again, with growing pauses.
        pause_s, deadline = 0.001, time.monotonic() + BLOCK_MS / 1000
        while not (found := await read()) and time.monotonic() < deadline:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.016)
        return found

    async def read(self, streams: Mapping[bytes, bytes | str], count: int | None = None) -> list[StreamEntries]:
        return await self._wait(lambda: self.read_now(streams, count, None))

    async def read_group(self, stream: bytes, group: str, consumer: str, count: int) -> list[StreamEntry]:
        return await self._wait(lambda: self.read_group_now(stream, group, consumer, count, None))


class Stage:
    """A running stage: its addresses, keys and clients."""

    def __init__(self, backend: Backend, url: str, http_url: str, stack: contextlib.AsyncExitStack) -> None:
        self.backend = backend
        self.url = url
        self.http_url = http_url
        self._stack = stack

    async def key(self, user: str, *, role: str = "client", claims: dict[str, Any] | None = None) -> str:
        """Create a credential for a user, and return it."""
        return str(await keyring.create(self.backend, user, role=role, claims=claims))

    async def client(self, user: str, *, role: str = "client", claims: dict[str, Any] | None = None) -> Client:
        """Connect a client of a user. It is closed with the stage."""
        key = await self.key(user, role=role, claims=claims)
        return await self._stack.enter_async_context(Client(self.url, key))


@contextlib.asynccontextmanager
async def run(app: App, *, backend: Backend | None = None, **settings: Any) -> AsyncIterator[Stage]:
    """Run all services while the block runs.

    Args:
        app: the application.
        backend: a real server instead of fakeredis.
        settings: settings by name, such as `partitions=2`. docs/operations.md lists them without their prefix. A user's
            requests a second are not limited unless `limit_requests_per_s` is given.

    Unless the test has configured structlog, only warnings are logged.

    Raises:
        ConfigurationError: a declaration is wrong, or there is no such setting.
    """
    app.check()
    if unknown := settings.keys() - set(Settings.__struct_fields__):
        known = ", ".join(Settings.__struct_fields__)
        raise ConfigurationError(f"there is no setting {', '.join(sorted(unknown))}; there are {known}")
    if not structlog.is_configured():
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    # Tests make requests faster than people do.
    chosen = Settings(**{"limit_requests_per_s": 0, **settings})
    keys = Keys(chosen.stage, chosen.partitions)
    server = fakeredis.FakeServer()
    async with contextlib.AsyncExitStack() as stack:
        shared = await stack.enter_async_context(backend or FakeBackend(server, keys))
        await shared.open_stage()

        async def another() -> Backend:
            # A shared backend is closed once, after its last user.
            return shared if backend else await stack.enter_async_context(FakeBackend(server, keys))

        ws, http = (stack.enter_context(listen("127.0.0.1", 0, what)) for what in ("ws", "http"))
        for wiring in WIRING.values():
            service = Service(wiring.kind, await another(), chosen)
            built = wiring.build(service, app)
            if wiring.listens:
                await stack.enter_async_context(built.listening(ws, http))
            await stack.enter_async_context(service.running())
        ports = [listener.getsockname()[1] for listener in (ws, http)]
        clients = await stack.enter_async_context(contextlib.AsyncExitStack())
        yield Stage(shared, f"ws://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", clients)
