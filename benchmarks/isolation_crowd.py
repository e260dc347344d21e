"""The measured users of benchmarks/isolation.py, as a process: they write, read, and note how long each thing took.

Reads JSON lines: first a Plan, then {"phase": name or null}, at last {"end": true}. Writes a line when all users are
connected, and at the end one line with all that was noted. What is sent without a phase is not noted.

Requests are sent when they are due, whatever is unanswered, and count from that moment on: a server that stands still
is measured by all that is due meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import defaultdict
from typing import Any, NamedTuple

import msgspec

from benchmarks.isolation_socket import UNREACHABLE, Frame, Socket, connected
from tidewire.services.cli.service import start
from tidewire.tasks import end

WRITES_S, READS_S = 2.0, 1.0
"""Requests per second of each user."""
PATIENCE_S = 15.0
"""Seconds that a user waits for an answer: longer than the server does."""
LAG_LOOK_S = 0.01
IDS = 20
"""Items of one user, written in turn."""


class Member(NamedTuple):
    """A user: what it writes lies in `box` and goes to the user `to`, whose mail to it lies in `inbox`."""

    name: str
    auth_key: str
    box: str
    inbox: str
    to: str
    where: str


class Plan(msgspec.Struct):
    url: str
    members: list[Member]


class Sample(NamedTuple):
    phase: str
    where: str  # "same" or "other": the attacker's partition, or not
    kind: str  # "reply", "delivered" or "read"
    took_s: float
    outcome: str  # "ok", an error code, "unanswered", "disconnected" or "undelivered"


class Sent(NamedTuple):
    phase: str | None
    at: float


class Crowd:
    """The users of one process, and what they note."""

    def __init__(self, plan: Plan) -> None:
        self.url = plan.url
        self.phase: str | None = None
        self.samples: list[Sample] = []
        self.lags: dict[str, list[float]] = defaultdict(list)
        self.reconnects = 0
        self.resets = 0
        self.undelivered: dict[tuple[str, int], Sent] = {}
        """Writes that were said to be done, or may still be, by box and number."""
        self.users = [User(self, member) for member in plan.members]
        self.where = {member.box: member.where for member in plan.members}

    def note(self, sent: Sent, where: str, kind: str, outcome: str) -> None:
        if sent.phase is not None:
            self.samples.append(Sample(sent.phase, where, kind, time.perf_counter() - sent.at, outcome))

    def delivered(self, frame: Frame) -> None:
        if frame["type"] == "reset":
            self.resets += 1
        elif frame["type"] == "change" and frame["table"] == "mail":
            new = frame["new"]
            if sent := self.undelivered.pop((new["box"], new["n"]), None):
                self.note(sent, self.where[new["box"]], "delivered", "ok")

    async def watch_lag(self) -> None:
        """Note how late the loop wakes a sleeper: beyond that, nothing here can be measured."""
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(LAG_LOOK_S)
            if self.phase is not None:
                self.lags[self.phase].append(time.perf_counter() - begun - LAG_LOOK_S)

    async def until_done(self) -> None:
        """Wait for what is still under way, at most as long as a user does."""
        deadline = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < deadline and (self.undelivered or any(user.asking for user in self.users)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for (box, _), sent in self.undelivered.items():
            self.note(sent, self.where[box], "delivered", "undelivered")

    def result(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "lags": self.lags,
            "reconnects": self.reconnects,
            "resets": self.resets,
        }


class User:
    """Writes mail and reads its own, on one connection that it makes again when it ends."""

    def __init__(self, crowd: Crowd, member: Member) -> None:
        self.online = asyncio.Event()
        self.asking: set[asyncio.Task[None]] = set()
        self._crowd = crowd
        self._member = member
        self._socket: Socket | None = None
        self._cursor: str | None = None
        self._numbers = itertools.count(1)

    async def keep_connected(self) -> None:
        member = self._member
        while True:
            try:
                async with connected(
                    self._crowd.url, member.auth_key, cursor=self._cursor, take=self._take
                ) as self._socket:
                    await self._socket.ws.wait_closed()
            except UNREACHABLE:
                pass
            self.online.clear()
            self._crowd.reconnects += 1
            await asyncio.sleep(random.uniform(0.1, 0.5))

    def _take(self, frame: Frame) -> None:
        self._cursor = frame.get("cursor", self._cursor)
        if frame["type"] == "welcome":
            self.online.set()
        else:
            self._crowd.delivered(frame)

    async def write(self) -> None:
        await self._regularly(WRITES_S, self._write)

    async def read(self) -> None:
        await self._regularly(READS_S, self._read)

    async def _regularly(self, rate_s: float, what: Any) -> None:
        due = time.perf_counter() + random.uniform(0, 1 / rate_s)
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(what(Sent(self._crowd.phase, due)))
            self.asking.add(task)
            task.add_done_callback(self.asking.discard)
            due += 1 / rate_s

    async def _write(self, sent: Sent) -> None:
        member, number = self._member, next(self._numbers)
        item = {"box": member.box, "id": f"i{number % IDS}", "author": member.name, "to": member.to, "n": number}
        place = (member.box, number)
        self._crowd.undelivered[place] = sent
        outcome = await self._ask("put", table="mail", item=item | {"text": "x" * 100})
        self._crowd.note(sent, member.where, "reply", outcome)
        if outcome != "ok":
            self._crowd.undelivered.pop(place, None)  # nothing was promised

    async def _read(self, sent: Sent) -> None:
        outcome = await self._ask("query", table="mail", key=self._member.inbox, limit=10)
        self._crowd.note(sent, self._member.where, "read", outcome)

    async def _ask(self, action: str, **fields: Any) -> str:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.online.wait()
                assert self._socket
                answer = await self._socket.ask(action, **fields)
        except TimeoutError:
            return "unanswered"
        return "ok" if answer["type"] == "reply" else str(answer["code"])


async def main() -> None:
    lines = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    crowd = Crowd(msgspec.json.decode(await lines.readline(), type=Plan))
    keeping = [asyncio.create_task(user.keep_connected()) for user in crowd.users]
    keeping.append(asyncio.create_task(crowd.watch_lag()))
    async with asyncio.timeout(60):
        for user in crowd.users:
            await user.online.wait()
    print("connected", flush=True)
    working = [asyncio.create_task(work) for user in crowd.users for work in (user.write(), user.read())]
    while "end" not in (said := json.loads(await lines.readline() or b'{"end": true}')):
        crowd.phase = said["phase"]
    await end(working)
    await crowd.until_done()
    await end(keeping)
    print(json.dumps(crowd.result()), flush=True)


if __name__ == "__main__":
    start(main())
