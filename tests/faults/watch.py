"""Measurements beside the load: a prober for each partition, the table `connections`, and memory."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tidewire.client import Client
from tidewire.errors import TidewireError
from tidewire.redis import keyring
from tidewire.redis.backend import Backend

from .logs import Absence, Peak, Probe, Reconnect, Span
from .readers import open_connection

PROBE_PAUSE_S = 0.5
LOOK_PAUSE_S = 2.0
MAX_UNSEEN_MS = 6_000
MEMORY_PAUSE_S = 2.0
LAG_PAUSE_S, LAG_S = 0.1, 0.3
"""Seconds between two checks of the checker's own lag, and the shortest lag that counts."""


class Prober:
    """A user whose item and feed are in one partition. It writes a number, and waits for the change."""

    def __init__(self, url: str, partition: int, name: str, key: str) -> None:
        self.partition = partition
        self.name = name
        self._url = url
        self._key = key
        self._sent: dict[int, float] = {}
        self._delivered: dict[int, float] = {}
        self._client: Client | None = None
        self.reconnects: list[Reconnect] = []
        self._connection: str | None = None
        self._open_ms = 0.0

    def online(self) -> str | None:
        return open_connection(self._client)

    def probes(self) -> list[Probe]:
        """Every write that was begun, in order."""
        return [Probe(self.partition, one, since, self._delivered.get(one)) for one, since in self._sent.items()]

    async def run(self, stopping: asyncio.Event) -> None:
        """Write twice a second until stopped, each time when the write before is answered."""
        async with Client(self._url, self._key, timeout_s=120) as client:
            self._client = client
            reading = asyncio.create_task(self._read(client))
            try:
                number = 0
                while not stopping.is_set():
                    number += 1
                    self._sent[number] = time.time() * 1000
                    with contextlib.suppress(TidewireError):
                        await client.put("probes", {"user": self.name, "n": number})
                    await asyncio.sleep(PROBE_PAUSE_S)
                    self._look(time.time() * 1000)
                await asyncio.sleep(1.0)
            finally:
                self._client = None
                reading.cancel()

    async def _read(self, client: Client) -> None:
        """A later number, or a reset of the feed, stands for those before it: order is the checker's business."""
        async for frame in client.events():
            now = time.time() * 1000
            if frame["type"] == "change" and frame["table"] == "probes" and frame.get("new"):
                self._note(frame["new"]["n"], now)
            elif frame["type"] == "reset" and "table" not in frame:
                self._note(max(self._sent, default=0), now)

    def _look(self, now: float) -> None:
        """Note whether the connection is still the same one."""
        if (connection := self.online()) is None:
            return
        if self._connection not in (None, connection):
            self.reconnects.append(Reconnect(self.name, self._open_ms, now))
        self._connection, self._open_ms = connection, now

    def _note(self, last: int, now: float) -> None:
        for number in range(last, 0, -1):
            if number in self._delivered:
                return
            self._delivered[number] = now


async def probers(backend: Backend, url: str) -> list[Prober]:
    """One for each partition."""
    found = []
    for partition in range(backend.keys.partitions):
        names = (f"p{partition}-{one}" for one in range(100_000))
        name = next(name for name in names if backend.keys.partition_of(name) == partition)
        found.append(Prober(url, partition, name, str(await keyring.create(backend, name))))
    return found


Online = Callable[[], Iterable[tuple[str, str]]]
"""Gives (user, connection) of every connection that is open now."""


class Connections:
    """Compares the table `connections` with the connections that are open."""

    def __init__(self, url: str, key: str, online: Online) -> None:
        self.absences: list[Absence] = []
        self.looks = 0
        self._url = url
        self._key = key
        self._online = online
        self._missing: dict[tuple[str, str], float] = {}
        self._looked_ms = 0.0

    async def run(self) -> None:
        async with Client(self._url, self._key, timeout_s=5) as client:
            while True:
                begun = time.time() * 1000
                before = set(self._online())
                with contextlib.suppress(TidewireError):
                    listed = await self._listed(client, sorted({user for user, _ in before}))
                    self._compare(before & set(self._online()), listed, begun, time.time() * 1000)
                await asyncio.sleep(LOOK_PAUSE_S)

    async def _listed(self, client: Client, users: Sequence[str]) -> set[tuple[str, str]]:
        pages = await asyncio.gather(*(client.query("connections", user, limit=1000) for user in users))
        return {(user, one["item"]["connection"]) for user, page in zip(users, pages, strict=True)
                for one in page["items"]}  # fmt: skip

    def _compare(self, online: set[tuple[str, str]], listed: set[tuple[str, str]], begun: float, now: float) -> None:
        """Note which connections are missing. Beyond MAX_UNSEEN_MS between two looks, nothing is known of the time."""
        self.looks += 1
        if begun - self._looked_ms > MAX_UNSEEN_MS:
            self._missing.clear()
        self._looked_ms = now
        missing = online - listed
        for one in self._missing.keys() - missing:
            del self._missing[one]
        for user, connection in missing:
            since = self._missing.setdefault((user, connection), begun)
            self.absences.append(Absence(user, connection, since, now))


class Lag:
    """Notes when this process got no turn for long: its own figures then say nothing of the system."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.longest_s = 0.0

    async def run(self) -> None:
        while True:
            begun = time.time()
            await asyncio.sleep(LAG_PAUSE_S)
            late_s = time.time() - begun - LAG_PAUSE_S
            self.longest_s = max(self.longest_s, late_s)
            if late_s > LAG_S:
                self.spans.append(Span(begun * 1000, time.time() * 1000))


class Memory:
    """The most memory that each process, and each server, has had."""

    def __init__(self, pids: Callable[[], Iterable[tuple[str, int]]], redis: Callable[[], Iterable[Any]]) -> None:
        self._pids = pids
        self._redis = redis
        self._most: dict[str, int] = {}

    def peaks(self) -> list[Peak]:
        return [Peak(who, size) for who, size in sorted(self._most.items())]

    async def run(self) -> None:
        while True:
            for who, pid in self._pids():
                self._note(who, resident_peak_bytes(pid))
            for client in self._redis():
                self._note("redis", await asyncio.to_thread(used_memory_peak_bytes, client))
            await asyncio.sleep(MEMORY_PAUSE_S)

    def _note(self, who: str, size_bytes: int) -> None:
        self._most[who] = max(self._most.get(who, 0), size_bytes)


def resident_peak_bytes(pid: int) -> int:
    """The most that a process has had in memory so far; 0 for one that has ended."""
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()):
            return int(found[1]) * 1024
    return 0


def used_memory_peak_bytes(client: Any) -> int:
    """Return the most memory that a server has used since its start, in bytes; 0 when it does not answer."""
    from redis.exceptions import RedisError

    with contextlib.suppress(RedisError, OSError):
        return int(client.info("memory")["used_memory_peak"])
    return 0
