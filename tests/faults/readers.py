"""Users who read: feeds by websocket and by server-sent events, and live views. They log all frames."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from tidewire.client import Client
from tidewire.errors import TidewireError

from .logs import Got, User, got
from .pace import Pace


def open_connection(client: Client | None) -> str | None:
    """The id of a client's connection, if it has been welcomed and is open."""
    return client.connection if client and client._ws and client._welcomed.is_set() else None


def break_off(client: Client) -> None:
    """End a client's connection as a network that fails does."""
    if client._ws:
        client._ws.transport.abort()


class Reader:
    """One connection of a user, again and again, each time from where it stopped."""

    def __init__(self, url: str, user: User, topics: tuple[str, ...], pace: Pace, seed: str) -> None:
        self.user = user
        self.log: list[Got] = []
        self.away: list[tuple[float, float]] = []
        """When it had disconnected by itself, in ms since 1970."""
        self.connected_ms = 0.0
        self._url = url
        self._choice = random.Random(seed)
        self._pace = pace
        self._cursor: str | None = None
        self._topics = dict.fromkeys(topics, "")
        self._client: Client | None = None
        self.connected = asyncio.Event()
        self._staying = asyncio.Event()

    def stay(self) -> None:
        """Stay connected from now on."""
        self._staying.set()

    def online(self) -> str | None:
        """The id of its connection while that is open."""
        return open_connection(self._client)

    async def run(self) -> None:
        while True:
            known = {topic: cursor for topic, cursor in self._topics.items() if cursor}
            options: dict[str, Any] = {"cursor": self._cursor, "topics": known, "timeout_s": 120}
            async with Client(self._url, self.user.key, **options) as client:
                for topic, cursor in self._topics.items():
                    if not cursor:
                        self._topics[topic] = await client.follow(topic)
                # The client may have received frames that this log lacks.
                self._cursor = self._cursor or client.welcomes[0]["cursor"]
                self._topics = client.welcomes[0]["topics"] | self._topics
                self.connected_ms = self.connected_ms or time.time() * 1000
                self._client = client
                self.connected.set()
                try:
                    await self._stay_a_while(client)
                finally:
                    self._client = None
            left = time.time() * 1000
            await asyncio.sleep(self._choice.uniform(0.0, 3.0))
            self.away.append((left, time.time() * 1000))

    async def _stay_a_while(self, client: Client) -> None:
        if self._staying.is_set():
            await self._read(client)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._choice.uniform(*self._pace.reads_s)):
                await self._read(client)
        if self._choice.random() < 0.5:
            break_off(client)  # the client comes back by itself
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._choice.uniform(*self._pace.reads_s)):
                    await self._read(client)

    async def _read(self, client: Client) -> None:
        async for frame in client.events():
            one = got(frame)
            self.log.append(one)
            if one.cursor is None:
                continue
            if one.topic is None:
                self._cursor = one.cursor
            else:
                self._topics[one.topic] = one.cursor


class Listener(Reader):
    """A reader by server-sent events, as a browser's EventSource: each time from the id that it had last."""

    def __init__(self, url: str, user: User, pace: Pace, seed: str) -> None:
        super().__init__(url, user, (), pace, seed)
        self._id = ""
        self._connection: str | None = None

    def online(self) -> str | None:
        return self._connection

    async def run(self) -> None:
        while True:
            stays_s = None if self._staying.is_set() else self._choice.uniform(*self._pace.reads_s)
            left = None
            try:
                async with asyncio.timeout(stays_s) as staying:
                    await self._listen()
            except TimeoutError:
                left = time.time() * 1000 if staying.expired() else None
            except (OSError, EOFError):
                pass
            await asyncio.sleep(self._choice.uniform(0.2, 2.0))
            if left:
                self.away.append((left, time.time() * 1000))

    async def _listen(self) -> None:
        """Read until the stream ends. Raises OSError or EOFError if there is no stream."""
        host = urlsplit(self._url)
        stream, writer = await asyncio.open_connection(host.hostname, host.port, limit=1 << 22)
        try:
            last_id = f"Last-Event-ID: {self._id}\r\n" if self._id else ""
            head = f"GET /v1/feed HTTP/1.1\r\nHost: {host.netloc}\r\nauth_key: {self.user.key}\r\n{last_id}\r\n"
            writer.write(head.encode())
            status = await stream.readline()
            if b" 200 " not in status:
                raise EOFError(status)
            id_ = ""
            while line := await stream.readline():  # the lines between, of sizes of chunks, are of no account
                if line.startswith(b"id: "):
                    id_ = line[4:].decode().strip()
                elif line.startswith(b"data: "):
                    frame = json.loads(line[6:])
                    self._id = id_
                    self._take(frame)
        finally:
            self._connection = None
            writer.transport.abort()

    def _take(self, frame: dict[str, Any]) -> None:
        if frame["type"] == "welcome":
            self._connection = frame["connection"]
            self.connected_ms = self.connected_ms or time.time() * 1000
            self.connected.set()
        elif frame["type"] in ("change", "message", "reset"):
            self.log.append(got(frame))


class Viewer:
    """A live view, looked at. What is wrong with one is noted at once.

    `together` names the items that are written in one transaction: () for none, None for all of them.
    """

    def __init__(
        self,
        url: str,
        user: User,
        table: str,
        key: dict[str, str],
        seed: str,
        together: tuple[str, ...] | None = (),
    ) -> None:
        self.user = user
        self.table = table
        self.key = key
        self.view: dict[Any, Any] = {}
        self.steps: list[tuple[Any, str]] = []
        """(sort key, request that it is as of) of what changed; (None, "") where it started empty."""
        self.wrong: list[str] = []
        self._url = url
        self._choice = random.Random(seed)
        self._together = together
        self._client: Client | None = None
        self._staying = asyncio.Event()
        self.connected = asyncio.Event()

    def stay(self) -> None:
        self._staying.set()

    def online(self) -> str | None:
        return open_connection(self._client)

    async def run(self) -> None:
        async with Client(self._url, self.user.key, timeout_s=120) as client:
            self._client = client
            self.connected.set()
            breaking = asyncio.create_task(self._break(client))
            try:
                async for view in client.live(self.table, **self.key):
                    self._look(view)
            finally:
                self._client = None
                breaking.cancel()

    async def equals(self, stored: Callable[[], Any]) -> bool:
        return bool(self.view == await stored())

    def _look(self, view: dict[Any, Any]) -> None:
        if self.view and not view:
            self.steps.append((None, ""))
        for key, item in view.items():
            if self.view.get(key) != item:
                self.steps.append((key, item["w"]))
        self.wrong += half_of_it(view, view.keys() if self._together is None else self._together)
        self.view = view

    async def _break(self, client: Client) -> None:
        while not self._staying.is_set():
            await asyncio.sleep(self._choice.uniform(5.0, 20.0))
            if not self._staying.is_set():
                break_off(client)


def half_of_it(view: dict[Any, Any], together: Any) -> list[str]:
    """Return what a view shows of a transaction that it shows only in part. Missing items count too."""
    as_of: dict[Any, Any] = {}
    for key in together:
        as_of.setdefault(view.get(key, {}).get("w"), key)
    if len(as_of) < 2:
        return []
    (one, first), (other, second) = list(as_of.items())[:2]
    return [f"half a transaction: {first} is as of {one}, {second} is as of {other}"]


class Follower(Reader):
    """A user that joins a flat, follows its topic, leaves the flat, and listens for what should not come."""

    def __init__(self, url: str, user: User, flat: str, pace: Pace, seed: str) -> None:
        super().__init__(url, user, (), pace, seed)
        self.flat = flat

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TidewireError):
                async with Client(self._url, self.user.key, timeout_s=60) as client:
                    self.connected_ms = self.connected_ms or time.time() * 1000
                    self.connected.set()
                    self._client = client
                    reading = asyncio.create_task(self._read(client))
                    try:
                        await self._follow(client)
                    finally:
                        self._client = None
                        reading.cancel()
            await asyncio.sleep(0.5)

    async def _follow(self, client: Client) -> None:
        while True:
            with contextlib.suppress(TidewireError):  # outside just now
                await client.follow(f"flat:{self.flat}")
            await asyncio.sleep(self._choice.uniform(0.2, 1.0))
