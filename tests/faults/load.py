"""The whole load: the users, their tasks, and their notes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

from tests.helpers import wait_until
from tidewire.client import Client
from tidewire.errors import RequestError, TidewireError
from tidewire.redis import keyring
from tidewire.redis.backend import Backend

from .expensive import Expensive
from .logs import Acknowledged, Late, User
from .pace import CELLS, CLUBS, FLATS, HALL, LOBBY, ROOMS, SECRET, Pace, flat_of, tenant_of
from .readers import Follower, Listener, Reader, Viewer
from .watch import Prober, probers
from .writers import OF_THE_NEXT, Writer, number, writes_of

PATIENCE_S = 40.0
AWAY_S = 11.0
CONNECTED_S = 120.0
OPENING_BATCH = 100
"""Members that one transaction adds to the hall."""


class Load:
    """All users."""

    def __init__(self, url: str, http_url: str, seed: int, pace: Pace) -> None:
        self.readers: list[Reader] = []
        self.followers: list[Follower] = []
        self.viewers: list[Viewer] = []
        self.probers: list[Prober] = []
        self.acknowledged: list[Acknowledged] = []
        self.late: list[Late] = []
        self.expensive: Expensive | None = None
        self.refused = 0
        self.unknown = 0
        """Writes whose outcome is unknown."""
        self.service_key = ""
        self._url = url
        self._http_url = http_url
        self._seed = seed
        self._pace = pace
        self._numbers = itertools.count(1)
        self._writes = writes_of(pace)
        self._next = asyncio.Event()  # whether the second version of the application may be written to
        self._next_writes = 0  # under way
        self._stopping = asyncio.Event()
        self._fleeing = asyncio.Event()
        self._writing: list[asyncio.Task[None]] = []
        self._reading: list[asyncio.Task[None]] = []

    # ── the beginning and the end ───────────────────────────────────────────────────────────────────────────────────

    async def start(self, backend: Backend) -> None:
        users = [await self._user(backend, f"u{one:02}") for one in range(self._pace.users)]
        flapping = [await self._user(backend, f"x{one}") for one in range(2 * ("flap" in self._pace.parts))]
        self.service_key = str(await keyring.create(backend, "service", role="service"))
        async with Client(self._url, self.service_key, timeout_s=60) as client:
            await self._open(client, users)
        if "probes" in self._pace.parts:
            self.probers = await probers(backend, self._url)
        self._seat(users, flapping)
        for one in self.looking:
            self._reading.append(asyncio.create_task(one.run()))
        for one in self.looking:
            await asyncio.wait_for(one.connected.wait(), CONNECTED_S)
        if "expensive" in self._pace.parts:
            self.expensive = await Expensive.create(backend, self._url, self._pace)
        self._begin_writing(users, flapping)

    async def _user(self, backend: Backend, name: str) -> User:
        tenant = tenant_of(name)
        return User(name, str(await keyring.create(backend, name, claims={"tenant": tenant})), tenant)

    async def _open(self, client: Client, users: Iterable[User]) -> None:
        """The groups as they are before anybody is connected."""
        for user in users:
            item = {"room": LOBBY, "user": user.name, "w": self.name("first")}
            await client.put("members", item, request=item["w"])
            if "flap" in self._pace.parts:
                await client.put("flats", {"flat": flat_of(user.name), "user": user.name})
        if "crowd" in self._pace.parts:
            names = [f"c{one:05}" for one in range(self._pace.crowd)]
            for first in range(0, len(names), OPENING_BATCH):
                items = ({"hall": HALL, "user": name} for name in names[first : first + OPENING_BATCH])
                await client.transact(*({"action": "put", "table": "crowd", "item": item} for item in items))

    def _seat(self, users: list[User], flapping: list[User]) -> None:
        """Create the readers."""
        parts, pace = self._pace.parts, self._pace
        for at, user in enumerate(users):
            topics = tuple(f"cell:{cell}" for cell in CELLS[: at % 3 + 1])
            if "flap" in parts:
                topics += (f"flat:{flat_of(user.name)}",)
            for place in range(1 + (at % 3 == 0)):  # some have two connections
                self.readers.append(Reader(self._url, user, topics, pace, f"{self._seed} reader {user.name} {place}"))
        for user in users[:3]:
            self.readers.append(Listener(self._http_url, user, pace, f"{self._seed} listener {user.name}"))
        for user in users[:2]:
            seed = f"{self._seed} viewer {user.name}"
            lobby, tenant = {"room": LOBBY}, {"tenant": user.tenant}
            self.viewers.append(Viewer(self._url, user, "messages", lobby, seed, ("pair-a", "pair-b")))
            self.viewers.append(Viewer(self._url, user, "notices", tenant, seed))
            if "bulk" in parts:
                self.viewers.append(Viewer(self._url, user, "rows", lobby, seed, None))
        for at, user in enumerate(flapping):
            self.readers.append(Reader(self._url, user, (), pace, f"{self._seed} reader {user.name}"))
            flat = f"f{at % FLATS}"
            self.followers.append(Follower(self._url, user, flat, pace, f"{self._seed} follower {user.name}"))

    @property
    def looking(self) -> list[Reader | Viewer]:
        """All readers that are checked."""
        return [*self.readers, *self.viewers, *self.followers]

    def _begin_writing(self, users: list[User], flapping: list[User]) -> None:
        coroutines: list[Any] = [self._serve()]
        for user in users:
            coroutines += (self._write(user), self._flee(user) if self._pace.flees else self._come_and_go(user))
            if "crowd" in self._pace.parts:
                coroutines.append(self._come_and_go(user, "crowd", "hall", (HALL,), self._pace.hall_stays_s))
            if "next" in self._pace.parts:
                coroutines.append(self._come_and_go(user, "clubs", "club", CLUBS, is_next=True))
        coroutines += (self._flap(user, follower.flat) for user, follower in zip(flapping, self.followers, strict=True))
        coroutines += (prober.run(self._stopping) for prober in self.probers)
        if self.expensive:
            coroutines.append(self.expensive.run(self._stopping))
        self._writing = [asyncio.create_task(one) for one in coroutines]

    def fault(self) -> None:
        """Note that a fault has begun."""
        self._fleeing.set()

    async def next_version(self, *, runs: bool) -> None:
        """Say whether the second version of the application runs everywhere: only then is it written to.

        Until all that is under way to its tables has been answered.
        """
        if runs:
            self._next.set()
            return
        self._next.clear()
        await wait_until(lambda: not self._next_writes, "no write to the second version is under way", PATIENCE_S + 10)

    async def stop_writing(self) -> None:
        """Stop writing, and wait for all answers. Readers stay connected from now on."""
        self._stopping.set()
        await asyncio.gather(*self._writing)
        for one in self.looking:
            one.stay()

    async def end(self) -> None:
        """Cancel all tasks. Raises the error of one that has failed."""
        tasks = (*self._writing, *self._reading)
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
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

    def _writer(self, name: str, key: str) -> Writer:
        return Writer(self._url, name, key, self.late, PATIENCE_S)

    async def _pause(self, pause_s: float) -> None:
        """Wait for that time, or until writing stops."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause_s)

    @contextlib.asynccontextmanager
    async def _to_the_next(self) -> Any:
        """A write to a table of the second version: True where it may be made now."""
        if not self._next.is_set():
            yield False
            return
        self._next_writes += 1
        try:
            yield True
        finally:
            self._next_writes -= 1

    async def _write(self, user: User) -> None:
        choice = random.Random(f"{self._seed} writer {user.name}")
        kinds, weights = zip(*((kind, rate) for kind, rate in self._pace.rates.items() if kind != "send"), strict=True)
        async with self._writer(user.name, user.key) as client:
            while not self._stopping.is_set():
                (kind,) = choice.choices(kinds, weights)
                write = self._writes[kind]
                if kind in OF_THE_NEXT:
                    async with self._to_the_next() as may:
                        if may:
                            await self._done(kind, lambda w: write(client, choice, user, w))  # noqa: B023 - awaited here
                else:
                    await self._done(kind, lambda w: write(client, choice, user, w))  # noqa: B023 - awaited here
                await asyncio.sleep(choice.expovariate(sum(weights)))

    async def _come_and_go(
        self,
        user: User,
        table: str = "members",
        attribute: str = "room",
        groups: tuple[str, ...] = ROOMS,
        stays_s: tuple[float, float] | None = None,
        *,
        is_next: bool = False,
    ) -> None:
        named = "" if table == "members" else f" {table}"
        choice = random.Random(f"{self._seed} comes and goes {user.name}{named}")
        inside: set[str] = set()
        async with self._writer(user.name, user.key) as client:
            while not self._stopping.is_set():
                await self._pause(choice.uniform(*(stays_s or self._pace.stays_s)))
                group = choice.choice(groups)
                async with self._to_the_next() if is_next else contextlib.nullcontext(True) as may:
                    if may:
                        (inside.discard if group in inside else inside.add)(group)
                        await self._join(client, table, {attribute: group, "user": user.name}, inside=group in inside)

    async def _join(self, client: Client, table: str, key: dict[str, str], *, inside: bool) -> None:
        if inside:
            await self._done("join", lambda w: client.put(table, key | {"w": w}, request=w))
        else:
            await self._done("leave", lambda w: client.delete(table, key, request=w))

    async def _flee(self, user: User) -> None:
        async with self._writer(user.name, user.key) as client:
            while not self._stopping.is_set():
                for room in ROOMS:
                    await self._join(client, "members", {"room": room, "user": user.name}, inside=True)
                self._fleeing.clear()
                ends = [asyncio.create_task(event.wait()) for event in (self._fleeing, self._stopping)]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.cancel()
                for room in ROOMS:
                    await self._join(client, "members", {"room": room, "user": user.name}, inside=False)
                await self._pause(AWAY_S)

    async def _flap(self, user: User, flat: str) -> None:
        """Join and leave many times a second, then stay in or out for a while."""
        choice = random.Random(f"{self._seed} flaps {user.name}")
        key = {"flat": flat, "user": user.name}
        async with self._writer(user.name, user.key) as client:
            while not self._stopping.is_set():
                for _ in range(self._pace.flaps):
                    await self._join(client, "flats", key, inside=True)
                    await self._join(client, "flats", key, inside=False)
                await self._pause(choice.uniform(*self._pace.flap_pause_s))
                await self._join(client, "flats", key, inside=True)
                await self._pause(choice.uniform(*self._pace.flap_pause_s))

    async def _serve(self) -> None:
        """Do what only service keys may do: send messages to users, and write hidden attributes."""
        rate = self._pace.rates.get("send", 0.0)
        choice = random.Random(f"{self._seed} service")
        async with self._writer("service", self.service_key) as client:
            while rate and not self._stopping.is_set():
                user = f"u{choice.randrange(self._pace.users):02}"
                await self._done("send", lambda w: client.request("send", user=user, body=w, request=w))  # noqa: B023
                item = {"room": choice.choice((LOBBY, *ROOMS)), "id": number(choice, 20), "secret": SECRET}
                await self._done(
                    "secret",
                    lambda w: client.put("messages", item | {"w": w}, request=w),  # noqa: B023
                )
                await asyncio.sleep(choice.expovariate(rate * self._pace.users))
