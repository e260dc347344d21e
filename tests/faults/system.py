"""The processes under test: a topology of Redis, two of each service, and what can be done to them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from tests import topologies
from tests.helpers import free_port, wait_until
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect_existing
from tidewire.redis.keys import Keys
from tidewire.services.cli.embedded import Embedded

from .proxy import Proxy
from .schedule import SERVICES, Fault

APPS = {"roll_back": "tests.faults.app:app", "roll_forward": "tests.faults.app_next:app"}
"""The first and the second version of the application, by the fault that leads to it."""
ROOT = Path(__file__).parents[2]
PER_SERVICE = 2
SLOTS_MOVED = 3
STAYS_HUNG_S = 8.0
"""How long a master hangs after a replica has taken its place. Nothing may wait for it then."""
MIXED_S = 2.0
"""Seconds that both versions run side by side, in addition to the time to start the processes."""
SETTLE_S = 3.0
"""Seconds to deliver the last writes to the second version's tables before that version ends."""
READY_S = 180.0
"""Maximum seconds for processes to start, also on a busy machine."""
ENDS_S = 20.0
"""Maximum seconds for a process to drain before it is killed."""
COMMANDS = {
    "": b"FCALL",
    "read": b"$14\r\nbatch_",
    "commit": b"$15\r\ncommit_",
    "link": b"$20\r\nlink_append_",
    "note": b'"table":"notes"',
}
"""The commands that a kind of fault may name, as they appear on the wire."""


class Process:
    """One process, restarted when it ends. `deaths` explains each end that the run did not cause."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, folder: Path = ROOT) -> None:
        self._command = command
        self._folder = folder
        self._environment = environment
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths: list[str] = []
        self._ends = False  # whether it has been told to end
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._keeper = self._keeper or asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            if self.process and (code := self.process.poll()) is not None:
                if not self._ends:
                    self.deaths.append(f"it ended by itself with {code}: {_last_line(self._log)}")
                self._ends = False
                self.start()

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        self._ends = self._ends or number == signal.SIGKILL
        self.process.send_signal(number)

    async def replace(self, command: list[str]) -> None:
        """Drain the process, and run the other command from then on."""
        assert self.process
        self._command, before = command, self.process
        self._ends = True
        before.terminate()
        try:
            await wait_until(lambda: self.process is not before, "it has ended and another has begun", ENDS_S)
        except AssertionError:
            before.kill()
            await wait_until(lambda: self.process is not before, "another has begun")

    async def end(self) -> None:
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def _last_line(log: Path) -> str:
    lines = log.read_text().splitlines()
    return lines[-1] if lines else "it has logged nothing"


def cut(servers: Iterable[topologies.Server], pid: int, lasts_s: float) -> None:
    """Have these servers close all present and new connections of a process for a while."""
    until = time.monotonic() + lasts_s
    while True:
        for server, port in itertools.product(servers, _ports_of(pid)):
            with contextlib.suppress(RedisError):  # not its, or it is away itself
                server.redis.execute_command("CLIENT KILL", "ADDR", f"127.0.0.1:{port}")
        if time.monotonic() > until:
            return
        time.sleep(0.1)


def _ports_of(pid: int) -> set[int]:
    """The local ports of a process's TCP connections; none of one that has just been killed."""
    inodes = set()
    try:
        rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    except OSError:
        return set()
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[9] in inodes}


class Alone:
    """A single server with its append-only file, as `tidewire up` runs it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        data = folder / "redis"
        data.mkdir()
        self._embedded = Embedded(data)
        self.port, self.url = self._embedded.port, self._embedded.url
        self._process = Process(self._embedded.command(), os.environ | environment, folder / "redis.log")
        self.clients = [redis.Redis.from_url(self.url, socket_timeout=5)]

    async def start(self) -> None:
        self._process.start()

    async def do(self, fault: Fault, over: Callable[[], None]) -> None:
        """Kill the server, which restarts on its file; or stop it for a while."""
        if fault.kind == "kill_redis":
            self._process.signal(signal.SIGKILL)
            return
        assert fault.kind == "stall_redis"
        self._process.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            self._process.signal(signal.SIGCONT)

    async def end(self) -> None:
        for client in self.clients:
            client.close()
        await self._process.end()


class Watched:
    """A master and a replica, watched by sentinels."""

    port = None

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._servers = topologies.Sentinels(folder, environment)
        self.url = self._servers.url
        self.clients = [server.redis for server in self._servers.servers]

    async def start(self) -> None:
        await asyncio.to_thread(self._servers.start)

    async def do(self, fault: Fault, over: Callable[[], None]) -> None:
        """Make the replica the master: kill the master, stop it, or have the sentinels swap the two."""
        if fault.kind == "change_places":
            await asyncio.to_thread(self._servers.switch)
        elif fault.kind == "hang_master":
            await asyncio.to_thread(self._servers.hang, over, STAYS_HUNG_S)
        else:
            killed = await asyncio.to_thread(self._servers.fail_over)
            await asyncio.to_thread(self._servers.come_back, killed)

    async def cut(self, pid: int, lasts_s: float) -> None:
        await asyncio.to_thread(cut, self._servers.servers, pid, lasts_s)

    async def end(self) -> None:
        self._servers.close()


class Sharded:
    """Three masters with a replica each."""

    port = None

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._servers = topologies.Cluster(folder, 3, 1, environment)
        self.url = self._servers.url
        self.clients = [server.redis for server in self._servers.servers]

    async def start(self) -> None:
        await asyncio.to_thread(self._servers.start)

    async def do(self, fault: Fault, over: Callable[[], None]) -> None:
        """Have a replica take over, or move slots with keys to another master."""
        keys = Keys("dev", 8)
        slots = [key_slot(keys.changes(partition)) for partition in range(8)]
        choice = random.Random(f"{fault.at_s}{fault.number}")
        if fault.kind == "move_slot":
            for slot in choice.sample(slots, SLOTS_MOVED):
                await asyncio.to_thread(self._servers.move, slot)
        elif fault.kind == "hang_master":
            await asyncio.to_thread(self._servers.hang, choice.choice(slots), over, STAYS_HUNG_S)
        else:
            killed = await asyncio.to_thread(self._servers.fail_over, choice.choice(slots))
            await asyncio.to_thread(self._servers.come_back, killed)

    async def cut(self, pid: int, lasts_s: float) -> None:
        await asyncio.to_thread(cut, self._servers.servers, pid, lasts_s)

    async def end(self) -> None:
        self._servers.close()


class NextVersion(Protocol):
    def __call__(self, *, runs: bool) -> Awaitable[None]: ...


TOPOLOGIES: dict[str, Any] = {"embedded": Alone, "sentinel": Watched, "cluster": Sharded}


class System:
    """The whole system. Clients connect to `url`, whose port the gateways share."""

    def __init__(
        self,
        folder: Path,
        topology: str,
        code: Path | None = None,
        partitions: int = 8,
        locale: Mapping[str, str] | None = None,
    ) -> None:
        """`code`: a folder with another Tidewire in it. `locale`: environment variables for the servers."""
        self.folder = folder
        self.next_version: NextVersion = _nobody
        """Called when writers may begin to use the second version's tables, and before they must stop."""
        self._partitions = partitions
        self.redis: Any = TOPOLOGIES[topology](folder, locale or {})
        self.ws_port = free_port()
        self.url = f"ws://127.0.0.1:{self.ws_port}"
        self._code = code or ROOT
        self.http_port = free_port()
        self._services: dict[str, list[Process]] = {}
        self._proxies: dict[str, list[Proxy]] = {}
        self._admin_ports: dict[tuple[str, int], int] = {}
        self._proxied = contextlib.AsyncExitStack()

    async def start(self) -> None:
        await self.redis.start()
        await wait_until(self._answers, "Redis answers")
        for service in SERVICES:
            self._services[service] = [await self._new(service, number) for number in range(PER_SERVICE)]
        await wait_until(self._ready, f"all services are ready: {self.folder}", READY_S)

    async def end(self) -> None:
        for processes in self._services.values():
            for process in processes:
                await process.end()
        await self._proxied.aclose()
        await self.redis.end()

    @contextlib.asynccontextmanager
    async def backend(self) -> AsyncIterator[Backend]:
        async with await connect_existing(self.redis.url, "dev", self._partitions) as backend:
            yield backend

    async def do(self, fault: Fault, begun: Callable[[], None], over: Callable[[], None]) -> None:
        """Do a fault, and return when it has ended.

        Calls `begun` when it begins: later, if it waits for a command. Calls `over` if it explains no pause from a
        certain moment on, although it has not ended.
        """
        kind, _, at = fault.kind.partition("_")
        if kind == "hold" and at and fault.service:
            await self._proxies[fault.service][fault.number].hold(fault.lasts_s, COMMANDS[at], begun)
            return
        begun()
        if fault.kind in APPS:
            await self._roll(fault.kind)
            return
        if fault.service is None:
            await self.redis.do(fault, over)
            return
        process = self._services[fault.service][fault.number]
        if fault.kind == "kill":
            process.signal(signal.SIGKILL)
        elif fault.kind == "pause":
            process.signal(signal.SIGSTOP)
            await asyncio.sleep(fault.lasts_s)
            process.signal(signal.SIGCONT)
        elif not self._proxies:
            assert kind == "cut"
            assert process.process
            await self.redis.cut(process.process.pid, fault.lasts_s)
        else:
            proxy = self._proxies[fault.service][fault.number]
            if kind == "swallow":
                await proxy.swallow(COMMANDS[at])
            else:
                await getattr(proxy, kind)(fault.lasts_s)

    def proxies(self, service: str) -> list[Proxy]:
        """Return the proxies between the processes of a service and Redis. There are none with several servers."""
        return self._proxies[service]

    async def _new(self, service: str, number: int) -> Process:
        url = self.redis.url
        if self.redis.port is not None:
            proxy = await self._proxied.enter_async_context(Proxy(self.redis.port))
            self._proxies.setdefault(service, []).append(proxy)
            url = url.replace(f":{self.redis.port}", f":{proxy.port}")
        self._admin_ports[service, number] = free_port()
        # One client does its worst, which nothing but the budgets of work and bytes shall contain.
        environment = (
            {"TIDEWIRE_LIMIT_REQUESTS_PER_S": "0"}
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join((str(self._code), str(ROOT))),
                "TIDEWIRE_REDIS": url,
                "TIDEWIRE_WS_PORT": str(self.ws_port),
                "TIDEWIRE_HTTP_PORT": str(self.http_port),
                "TIDEWIRE_ADMIN_PORT": str(self._admin_ports[service, number]),
                "TIDEWIRE_DRAIN_SECONDS": "2",
                "TIDEWIRE_PARTITIONS": str(self._partitions),
                "TIDEWIRE_LOG_LEVEL": "warning",
            }
        )
        process = Process(
            _command(service, "roll_back"), environment, self.folder / f"{service}-{number}.log", self._code
        )
        process.start()
        return process

    async def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            async with self.backend() as backend:  # nothing is loaded there: that is for the code under test
                return bool(await backend.now_ms())
        return False

    async def _ready(self) -> bool:
        return all([await asyncio.to_thread(_is_ready, port) for port in self._admin_ports.values()])

    async def _roll(self, to: str) -> None:
        """Replace the first process of each service, then the others, one after another as they drain."""
        for number in range(PER_SERVICE):
            if to == "roll_back" and number:
                await self.next_version(runs=False)
                await asyncio.sleep(SETTLE_S)
            for service, processes in self._services.items():
                await processes[number].replace(_command(service, to))
                port = self._admin_ports[service, number]
                await wait_until(lambda port=port: asyncio.to_thread(_is_ready, port), f"{service} is ready", READY_S)  # type: ignore[misc]
            await asyncio.sleep(MIXED_S)
            if to == "roll_forward":
                await self.next_version(runs=True)

    def deaths(self) -> list[tuple[str, str]]:
        """Return service and explanation of each end of a process that the run did not cause."""
        return [
            (service, death)
            for service, processes in self._services.items()
            for process in processes
            for death in process.deaths
        ]

    def pids(self) -> list[tuple[str, int]]:
        """Kind of service and process id of all processes that run now."""
        return [
            (service, process.process.pid)
            for service, processes in self._services.items()
            for process in processes
            if process.process
        ]


async def _nobody(*, runs: bool) -> None:
    pass


def _command(service: str, version: str) -> list[str]:
    return [sys.executable, "-m", "tidewire.services.cli.main", service, APPS[version]]


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False
