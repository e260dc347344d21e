"""Users who write and read while faults happen, and log what they were told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from tidewire import keyring
from tidewire.backend import Backend
from tidewire.client import Client
from tidewire.errors import RequestError, TidewireError

LOBBY = "lobby"
"""The room that nobody leaves."""
ROOMS = ("r1", "r2", "r3")
CELLS = ("c1", "c2", "c3")
TENANTS = ("a", "b")
PAIR = ("pair-a", "pair-b")
"""Written together: a live view shows both as of the same transaction."""
SECRET = "what only service keys may see"
PATIENCE_S = 40.0
AWAY_S = 11.0


def digest(image: Any) -> int | None:
    """Of an image as JSON; None for none."""
    return None if image is None else zlib.crc32(msgspec.json.encode(image, order="deterministic"))


class Got(NamedTuple):
    """A frame, as a reader's log keeps it."""

    at_ms: float
    type: str
    topic: str | None
    cursor: str | None
    position: str | None
    event: str | None
    table: str | None
    key: tuple[tuple[str, Any], ...]
    new: int | None
    old: int | None
    body: str | None = None  # of a message


def got(frame: dict[str, Any]) -> Got:
    """A frame that has just come."""
    return Got(
        time.time() * 1000,
        frame["type"],
        frame.get("topic"),
        frame.get("cursor"),
        frame.get("position"),
        frame.get("event"),
        frame.get("table"),
        tuple(sorted((frame.get("key") or {}).items())),
        digest(frame.get("new")),
        digest(frame.get("old")),
        frame["body"] if frame["type"] == "message" else None,
    )


class User(NamedTuple):
    name: str
    key: str
    tenant: str


def tenant_of(user: str) -> str:
    """Of the user of that number: of the tenants in turn."""
    return TENANTS[int(user[1:]) % len(TENANTS)]


class Acknowledged(NamedTuple):
    """A write that was said to be done."""

    request: str
    action: str
    at_ms: float


class Pace(NamedTuple):
    """How much of what is written, in writes of each user and second, and how users come and go."""

    rates: dict[str, float]
    stays_s: tuple[float, float] = (2.0, 10.0)
    """How long somebody is in a room, or out of it."""
    reads_s: tuple[float, float] = (4.0, 20.0)
    """How long a reader stays connected."""
    users: int = 12
    notes: int = 30
    """Of how many ids notes are."""
    flees: bool = False
    """Whether all are in all rooms, and leave them, for a while, a second after a fault has begun."""


ALL = Pace(
    {
        "message": 1.2,
        "edit": 0.4,
        "delete": 0.2,
        "pair": 0.3,
        "post": 0.4,
        "thing": 0.4,
        "unit": 0.4,
        "note": 0.4,
        "notice": 0.2,
        "send": 0.2,
    }
)


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
        self.connected = asyncio.Event()
        self._staying = asyncio.Event()

    def stay(self) -> None:
        """From now on it disconnects no more."""
        self._staying.set()

    async def run(self) -> None:
        while True:
            known = {topic: cursor for topic, cursor in self._topics.items() if cursor}
            options: dict[str, Any] = {"cursor": self._cursor, "topics": known, "timeout_s": 120}
            async with Client(self._url, self.user.key, **options) as client:
                for topic, cursor in self._topics.items():
                    if not cursor:
                        self._topics[topic] = await client.follow(topic)
                # Of what it has not taken yet, the client knows more than this log.
                self._cursor = self._cursor or client.welcomes[0]["cursor"]
                self._topics = client.welcomes[0]["topics"] | self._topics
                self.connected_ms = self.connected_ms or time.time() * 1000
                self.connected.set()
                if not self._staying.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._choice.uniform(*self._pace.reads_s)):
                            await self._read(client)
                    if self._choice.random() < 0.5 and client._ws:
                        client._ws.transport.abort()  # the network's fault; the client comes back by itself
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(self._choice.uniform(*self._pace.reads_s)):
                                await self._read(client)
                else:
                    await self._read(client)
            left = time.time() * 1000
            await asyncio.sleep(self._choice.uniform(0.0, 3.0))
            self.away.append((left, time.time() * 1000))

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
        """Until the stream ends. Raises OSError or EOFError where there is none."""
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
                    if frame["type"] == "welcome":
                        self.connected_ms = self.connected_ms or time.time() * 1000
                        self.connected.set()
                    elif frame["type"] in ("change", "message", "reset"):
                        self.log.append(got(frame))
        finally:
            writer.transport.abort()


class Viewer:
    """A live view, looked at. What is wrong with one is noted at once."""

    def __init__(self, url: str, user: User, table: str, key: dict[str, str], seed: str) -> None:
        self.user = user
        self.table = table
        self.key = key
        self.view: dict[Any, Any] = {}
        self.steps: list[tuple[Any, str]] = []
        """(sort key, request that it is as of) of what changed; (None, "") where it started empty."""
        self.wrong: list[str] = []
        self._url = url
        self._choice = random.Random(seed)
        self._staying = asyncio.Event()
        self.connected = asyncio.Event()

    def stay(self) -> None:
        self._staying.set()

    async def run(self) -> None:
        async with Client(self._url, self.user.key, timeout_s=120) as client:
            self.connected.set()
            breaking = asyncio.create_task(self._break(client))
            try:
                async for view in client.live(self.table, **self.key):
                    self._look(view)
            finally:
                breaking.cancel()

    async def equals(self, stored: Callable[[], Any]) -> bool:
        return bool(self.view == await stored())

    def _look(self, view: dict[Any, Any]) -> None:
        if self.view and not view:
            self.steps.append((None, ""))
        for key, item in view.items():
            if self.view.get(key) != item:
                self.steps.append((key, item["w"]))
        one, other = (view.get(key, {}).get("w") for key in PAIR)
        if one != other:
            self.wrong.append(f"half a transaction: {PAIR[0]} is as of {one}, {PAIR[1]} as of {other}")
        self.view = view

    async def _break(self, client: Client) -> None:
        while not self._staying.is_set():
            await asyncio.sleep(self._choice.uniform(5.0, 20.0))
            if client._ws and not self._staying.is_set():
                client._ws.transport.abort()


class Load:
    """All users."""

    def __init__(self, url: str, http_url: str, seed: int, pace: Pace) -> None:
        self.readers: list[Reader] = []
        self.viewers: list[Viewer] = []
        self._looking: list[Reader | Viewer] = []
        self.acknowledged: list[Acknowledged] = []
        self.refused = 0
        self.unknown = 0
        """Writes of which nobody said whether they were done."""
        self._url = url
        self._http_url = http_url
        self._seed = seed
        self._pace = pace
        self._numbers = itertools.count(1)
        note = _put("notes", id=lambda choice, _: _id(choice, pace.notes), room=lambda choice, _: choice.choice(ROOMS))
        self._writes = _WRITES | {"note": note}
        self._stopping = asyncio.Event()
        self._fleeing = asyncio.Event()
        self._writing: list[asyncio.Task[None]] = []
        self._reading: list[asyncio.Task[None]] = []

    async def start(self, backend: Backend) -> None:
        users = []
        for number in range(self._pace.users):
            name = f"u{number:02}"
            key = await keyring.create(backend, name, claims={"tenant": tenant_of(name)})
            users.append(User(name, str(key), tenant_of(name)))
        service = str(await keyring.create(backend, "service", role="service"))
        async with Client(self._url, service, timeout_s=60) as client:
            for user in users:
                item = {"room": LOBBY, "user": user.name, "w": self.name("first")}
                await client.put("members", item, request=item["w"])
        for number, user in enumerate(users):
            topics = tuple(f"cell:{cell}" for cell in CELLS[: number % 3 + 1])
            for place in range(1 + (number % 3 == 0)):  # some have two connections
                self.readers.append(
                    Reader(self._url, user, topics, self._pace, f"{self._seed} reader {user.name} {place}")
                )
        for user in users[:3]:
            self.readers.append(Listener(self._http_url, user, self._pace, f"{self._seed} listener {user.name}"))
        for user in users[:2]:
            seed = f"{self._seed} viewer {user.name}"
            self.viewers.append(Viewer(self._url, user, "messages", {"room": LOBBY}, seed))
            self.viewers.append(Viewer(self._url, user, "notices", {"tenant": user.tenant}, seed))
        self._looking = [*self.readers, *self.viewers]
        for one in self._looking:
            self._reading.append(asyncio.create_task(one.run()))
        for one in self._looking:
            await asyncio.wait_for(one.connected.wait(), 60)
        for user in users:
            self._writing.append(asyncio.create_task(self._write(user)))
            self._writing.append(asyncio.create_task(self._flee(user) if self._pace.flees else self._come_and_go(user)))
        self._writing.append(asyncio.create_task(self._serve(service)))

    def fault(self) -> None:
        """One has begun."""
        self._fleeing.set()

    async def stop_writing(self) -> None:
        """Until nobody waits for an answer any more. Readers stay connected from now on."""
        self._stopping.set()
        await asyncio.gather(*self._writing)
        for one in self._looking:
            one.stay()

    async def end(self) -> None:
        for task in (*self._writing, *self._reading):
            task.cancel()
        ended = await asyncio.gather(*self._writing, *self._reading, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def name(self, action: str) -> str:
        """A new request id."""
        return f"{action}-{next(self._numbers):07}"

    # ── writers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _done(self, action: str, writing: Callable[[str], Any]) -> None:
        """One write, noted when it is acknowledged."""
        request = self.name(action)
        try:
            await writing(request)
        except TidewireError as error:
            if isinstance(error, RequestError) and not error.retry and error.code != "timeout":
                self.refused += 1  # not a member any more, or there is no such item
            else:
                self.unknown += 1
        else:
            self.acknowledged.append(Acknowledged(request, action, time.time() * 1000))

    async def _write(self, user: User) -> None:
        choice = random.Random(f"{self._seed} writer {user.name}")
        kinds, weights = zip(*((kind, rate) for kind, rate in self._pace.rates.items() if kind != "send"), strict=True)
        async with Client(self._url, user.key, timeout_s=PATIENCE_S) as client:
            while not self._stopping.is_set():
                (kind,) = choice.choices(kinds, weights)
                await self._done(kind, lambda w: self._writes[kind](client, choice, user, w))  # noqa: B023 - awaited here
                await asyncio.sleep(choice.expovariate(sum(weights)))

    async def _come_and_go(self, user: User) -> None:
        choice = random.Random(f"{self._seed} comes and goes {user.name}")
        inside: set[str] = set()
        async with Client(self._url, user.key, timeout_s=PATIENCE_S) as client:
            while not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), choice.uniform(*self._pace.stays_s))
                room = choice.choice(ROOMS)
                if room in inside:
                    inside.discard(room)
                    key = {"room": room, "user": user.name}
                    await self._done("leave", lambda w: client.delete("members", key, request=w))  # noqa: B023
                else:
                    inside.add(room)
                    item = {"room": room, "user": user.name}
                    await self._done("join", lambda w: client.put("members", item | {"w": w}, request=w))  # noqa: B023

    async def _flee(self, user: User) -> None:
        async with Client(self._url, user.key, timeout_s=PATIENCE_S) as client:
            while not self._stopping.is_set():
                for room in ROOMS:
                    item = {"room": room, "user": user.name}
                    await self._done("join", lambda w: client.put("members", item | {"w": w}, request=w))  # noqa: B023
                self._fleeing.clear()
                ends = [asyncio.create_task(event.wait()) for event in (self._fleeing, self._stopping)]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.cancel()
                for room in ROOMS:
                    key = {"room": room, "user": user.name}
                    await self._done("leave", lambda w: client.delete("members", key, request=w))  # noqa: B023
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), AWAY_S)

    async def _serve(self, key: str) -> None:
        """What only service keys may: messages to users, and attributes that are hidden."""
        rate = self._pace.rates.get("send", 0.0)
        choice = random.Random(f"{self._seed} service")
        async with Client(self._url, key, timeout_s=PATIENCE_S) as client:
            while rate and not self._stopping.is_set():
                user = f"u{choice.randrange(self._pace.users):02}"
                await self._done("send", lambda w: client.request("send", user=user, body=w, request=w))  # noqa: B023
                item = {"room": choice.choice((LOBBY, *ROOMS)), "id": _id(choice, 20), "secret": SECRET}
                await self._done(
                    "secret",
                    lambda w: client.put("messages", item | {"w": w}, request=w),  # noqa: B023
                )
                await asyncio.sleep(choice.expovariate(rate * self._pace.users))


def _id(choice: random.Random, count: int) -> str:
    return f"{choice.randrange(count):02}"


def _room(choice: random.Random) -> str:
    return choice.choice((LOBBY, LOBBY, *ROOMS))


def _put(table: str, **fields: Callable[[random.Random, User], Any]) -> Callable[..., Any]:
    async def put(client: Client, choice: random.Random, user: User, w: str) -> None:
        item = {name: made(choice, user) for name, made in fields.items()}
        await client.put(table, item | {"w": w, "by": user.name}, request=w)

    return put


async def _edit(client: Client, choice: random.Random, user: User, w: str) -> None:
    key = {"room": _room(choice), "id": _id(choice, 20)}
    await client.update("messages", key, set={"w": w}, add={"edits": 1}, request=w)


async def _delete(client: Client, choice: random.Random, user: User, w: str) -> None:
    key = {"room": _room(choice), "id": _id(choice, 20)}
    await client.delete("messages", key, request=w)


async def _pair(client: Client, choice: random.Random, user: User, w: str) -> None:
    await client.transact(
        *(
            {"action": "put", "table": "messages", "item": {"room": LOBBY, "id": id_, "w": w, "by": user.name}}
            for id_ in PAIR
        ),
        request=w,
    )


def _in_a_room(choice: random.Random, _: User) -> str:
    return _room(choice)


_WRITES: dict[str, Callable[..., Any]] = {
    "message": _put("messages", room=_in_a_room, id=lambda choice, _: _id(choice, 20)),
    "edit": _edit,
    "delete": _delete,
    "pair": _pair,
    "post": _put(
        "posts",
        room=_in_a_room,
        id=lambda choice, _: _id(choice, 10),
        tenant=lambda choice, _: choice.choice(TENANTS),
    ),
    "thing": _put(
        "things",
        id=lambda choice, _: _id(choice, 20),
        owner=lambda choice, _: f"u{choice.randrange(12):02}",
        guest=lambda choice, _: f"u{choice.randrange(12):02}",
    ),
    "unit": _put("units", id=lambda choice, _: _id(choice, 15), cell=lambda choice, _: choice.choice(CELLS)),
    "notice": _put("notices", tenant=lambda _, user: user.tenant, id=lambda choice, _: _id(choice, 10)),
}
