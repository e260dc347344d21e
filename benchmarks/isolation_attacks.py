"""The attacks of benchmarks/isolation.py, and the process that does one.

The process reads a line, an Order, and writes one when it is ready. It begins with the next line that it reads, and at
the end writes what it was answered, by count. It has a low priority: an attacker has a machine of its own, and must not
take this one from those that it attacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from benchmarks.isolation_socket import UNREACHABLE, Frame, Socket, connected, names
from tidewire.redis.backend import Backend
from tidewire.services.cli.service import start

NICE = 10
SOCKETS, DEPTH = 4, 8
"""Connections of an attacker, and requests under way on each, unless the attack says otherwise."""
PAUSE_S = 0.05
"""Before a connection is made again."""
WINDOW_MS = 3_600_000

(ATTACKER,) = names("attacker", 1, attacked=True)
(BUSY,) = names("busy", 1, attacked=True)
"""A user in a thousand groups."""
(BOX,) = names("box", 1, attacked=True)
(LISTED,) = names("list", 1, attacked=True)
(TAG,) = names("tag", 1, attacked=True)
(PROFILE,) = names("profile", 1, attacked=True)
(HALL,) = names("hall", 1, attacked=True)
"""A group of many."""
(CELL,) = (name.removeprefix("cell:") for name in names("cell:", 1, attacked=True))
USERS = (ATTACKER, BUSY)

GROUPS, DOCUMENTS, HALL_MEMBERS, NAMES = 1000, 3000, 2000, 25_000
LARGE_ITEMS, LARGE_BYTES = 25, 240_000
FRAME_BYTES = 1 << 20


class Order(msgspec.Struct):
    case: str
    url: str
    ws_port: int
    http_port: int
    auth_keys: dict[str, str]
    seconds: float


class Attacker:
    """One client, for a time."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.answers: Counter[str] = Counter()
        self.waiting = 0
        """Requests without an answer so far."""
        self._until = time.monotonic() + order.seconds

    def going(self) -> bool:
        return time.monotonic() < self._until

    async def connections(self, user: str | None = ATTACKER) -> AsyncIterator[Socket]:
        """One connection, and the next when that has ended."""
        auth_key = None if user is None else self.order.auth_keys[user]
        while self.going():
            try:
                async with connected(self.order.url, auth_key) as socket:
                    yield socket
            except UNREACHABLE as error:
                self.answers[f"refused: {type(error).__name__}"] += 1
            await asyncio.sleep(PAUSE_S)

    async def flood(self, frames: Callable[[], Frame], sockets: int = SOCKETS, depth: int = DEPTH) -> None:
        """Keep that many requests under way."""

        async def one_after_another(socket: Socket) -> None:
            while self.going():
                answer = await self.ask(socket, **frames())
                if answer.get("code") == "disconnected":
                    return

        async def connection() -> None:
            async for socket in self.connections():
                await asyncio.gather(*(one_after_another(socket) for _ in range(depth)))

        await asyncio.gather(*(connection() for _ in range(sockets)))

    async def ask(self, socket: Socket, **fields: Any) -> Frame:
        """The answer to a request, counted."""
        self.waiting += 1
        answer = await socket.ask(**fields)
        self.waiting -= 1
        self.answers["ok" if answer["type"] == "reply" else answer["code"]] += 1
        return answer

    async def raw(self, port: int, begin: bytes, drip: bytes = b"", every_s: float = 0.5) -> None:
        """Open TCP connections one after another. Each sends a prefix, and then stalls until it is closed."""
        while self.going():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                self.answers["refused"] += 1
                await asyncio.sleep(PAUSE_S)
                continue
            self.answers["opened"] += 1
            with contextlib.suppress(OSError):
                writer.write(begin)
                while self.going():
                    writer.write(drip)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(every_s):
                            if not await reader.read(4096):
                                break
            writer.transport.abort()


# ── before ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def fill(service: Socket, table: str, items: Iterable[Frame]) -> None:
    """Write items, some at a time."""
    left = iter(items)
    while some := list(itertools.islice(left, 64)):
        for answer in await asyncio.gather(*(service.ask("put", table=table, item=item) for item in some)):
            assert answer["type"] == "reply", answer


async def nothing(service: Socket, stage: Backend) -> None:
    """Nothing is needed before."""


async def documents(service: Socket, stage: Backend) -> None:
    await fill(service, "documents", ({"id": f"d{n}", "group": f"g{n}", "tag": TAG} for n in range(DOCUMENTS)))
    while True:  # until the index has followed
        found, after = 0, dict[str, object]()
        while True:
            answer = await service.ask("query", table="documents", index="by_tag", key=TAG, limit=1000, **after)
            found += len(answer["result"]["items"])
            if answer["result"]["next"] is None:
                break
            after = {"after": answer["result"]["next"]}
        if found == DOCUMENTS:
            return
        await asyncio.sleep(0.1)


async def boxes(service: Socket, stage: Backend) -> None:
    text = "x" * LARGE_BYTES
    for number in range(LARGE_ITEMS):
        await fill(service, "boxes", [{"box": BOX, "id": f"b{number:02}", "owner": ATTACKER, "n": 0, "text": text}])


async def busy(service: Socket, stage: Backend) -> None:
    """A user in many groups, and a profile that only this user may read."""
    await fill(service, "groups", ({"group": f"g{n}", "user": BUSY} for n in range(GROUPS)))
    await fill(service, "profiles", [{"id": PROFILE, "owner": BUSY}])


async def listed(service: Socket, stage: Backend) -> None:
    to = [f"u{n:05}" for n in range(NAMES)]
    await fill(service, "lists", [{"id": LISTED, "owner": ATTACKER, "to": [ATTACKER, *to], "n": 0}])


async def hall(service: Socket, stage: Backend) -> None:
    """A group whose members' feeds are open."""
    members = [ATTACKER, *(f"m{n}" for n in range(HALL_MEMBERS))]
    await fill(service, "groups", ({"group": HALL, "user": name} for name in members))
    for name in members:
        feed = stage.keys.user_feed(name)
        await stage.functions.feed_open(stage.keys.home_of(feed), feed, WINDOW_MS)


# ── the attacks ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def costly_first_frame(attacker: Attacker) -> None:
    name = "a" * 500_000
    zeros = ",".join("0" * ((FRAME_BYTES - len(name) - 100) // 2))
    await _first_frames(attacker, f'{{"action":"auth","{name}":[{zeros}]}}')


async def large_auth_key(attacker: Attacker) -> None:
    await _first_frames(attacker, f'{{"action":"auth","auth_key":"{"k" * (FRAME_BYTES - 100)}"}}')


async def _first_frames(attacker: Attacker, frame: str) -> None:
    async def connection() -> None:
        async for socket in attacker.connections(None):
            with contextlib.suppress(ConnectionClosed):
                await socket.ws.send(frame)
                await socket.ws.wait_closed()
            attacker.answers[f"closed with {socket.ws.close_code}"] += 1

    await asyncio.gather(*(connection() for _ in range(SOCKETS)))


async def hidden_index(attacker: Attacker) -> None:
    await attacker.flood(lambda: {"action": "query", "table": "documents", "index": "by_tag", "key": TAG}, depth=3)


async def unread_pages(attacker: Attacker) -> None:
    """Ask for large pages, and never read; connections are left when their answers have filled all buffers."""

    async def connection() -> None:
        auth_key = attacker.order.auth_keys[ATTACKER]
        while attacker.going():
            try:
                headers = {"Authorization": f"Bearer {auth_key}"}
                ws = await connect(attacker.order.url, additional_headers=headers, compression=None, ping_interval=None)
            except UNREACHABLE as error:
                attacker.answers[f"refused: {type(error).__name__}"] += 1
                await asyncio.sleep(PAUSE_S)
                continue
            ws.transport.pause_reading()
            with contextlib.suppress(ConnectionClosed):
                for number in range(64):
                    query = {"id": number, "action": "query", "table": "boxes", "key": BOX, "limit": 1000}
                    await ws.send(msgspec.json.encode(query), text=True)
                    attacker.answers["asked"] += 1
                await asyncio.sleep(1)
            ws.transport.abort()

    await asyncio.gather(*(connection() for _ in range(SOCKETS)))


async def failing_transaction(attacker: Attacker) -> None:
    keys = [{"box": BOX, "id": f"b{number:02}"} for number in range(LARGE_ITEMS)]
    updates = [{"action": "update", "table": "boxes", "key": key, "add": {"n": 1}} for key in keys[:-1]]
    check = {"action": "check", "table": "boxes", "key": keys[-1], "if": {"version": 1_000_000}}
    await attacker.flood(lambda: {"action": "transact", "operations": [*updates, check]})


async def large_updates(attacker: Attacker) -> None:
    key = {"box": BOX, "id": "b00"}
    await attacker.flood(lambda: {"action": "update", "table": "boxes", "key": key, "add": {"n": 1}})


async def silence(attacker: Attacker) -> None:
    """Connections that say nothing, half of a request's head, or its body byte by byte."""
    ws, http = attacker.order.ws_port, attacker.order.http_port
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-"
    body = b"POST /v1/ping HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n{"
    kinds = [(port, begin, drip) for port in (ws, http) for begin, drip in ((b"", b""), (head, b"a"))]
    await asyncio.gather(
        *(attacker.raw(*kind) for kind in kinds for _ in range(50)),
        *(attacker.raw(http, body, b" ") for _ in range(20)),
    )


async def many_requests(attacker: Attacker) -> None:
    key = {"box": BOX, "id": "none"}
    await attacker.flood(lambda: {"action": "get", "table": "boxes", "key": key}, sockets=20, depth=64)


async def profile_of_the_busy(attacker: Attacker) -> None:
    await attacker.flood(lambda: {"action": "get", "table": "profiles", "key": PROFILE}, depth=3)


async def backtracking_topic(attacker: Attacker) -> None:
    topic = "square:" + "-" * 1017
    await attacker.flood(lambda: {"action": "follow", "topic": topic}, depth=1)


async def pings(attacker: Attacker) -> None:
    """Ping frames at full speed, from a client that reads no pong."""
    ping = (
        b"\x89\xfd\0\0\0\0" + b"p" * 125
    )  # RFC 6455 §5.2: FIN and ping; masked, 125 bytes; a mask that changes nothing

    async def connection() -> None:
        async for socket in attacker.connections():
            transport = socket.ws.transport
            transport.pause_reading()
            while attacker.going() and not transport.is_closing():
                if transport.get_write_buffer_size() < 1 << 20:
                    transport.write(ping * 1000)
                    attacker.answers["pings"] += 1000
                await asyncio.sleep(0)

    await asyncio.gather(*(connection() for _ in range(SOCKETS)))


async def come_and_go(attacker: Attacker) -> None:
    async def connection() -> None:
        async for _ in attacker.connections(BUSY):
            attacker.answers["connected"] += 1

    await asyncio.gather(*(connection() for _ in range(SOCKETS)))


async def rewinds(attacker: Attacker) -> None:
    async def connection(number: int) -> None:
        topic = f"cell:{CELL}"
        async for socket in attacker.connections():
            cursor = (await socket.ask("follow", topic=topic)).get("result", {}).get("cursor")
            for post in range(5 if cursor else 0):
                item = {"id": f"p{number}-{post}-{cursor}", "cell": CELL, "text": "x" * 60_000}
                await attacker.ask(socket, action="put", table="posts", item=item)
            while attacker.going():
                answer = await attacker.ask(socket, action="follow", topic=topic, cursor=cursor)
                if answer.get("code") == "disconnected":
                    break

    await asyncio.gather(*(connection(number) for number in range(SOCKETS)))


async def many_names(attacker: Attacker) -> None:
    await attacker.flood(lambda: {"action": "update", "table": "lists", "key": LISTED, "add": {"n": 1}}, depth=2)


async def flapping(attacker: Attacker) -> None:
    member = {"group": HALL, "user": ATTACKER}
    turns = itertools.cycle(
        (
            {"action": "put", "table": "groups", "item": member},
            {"action": "delete", "table": "groups", "key": member},
        )
    )
    await attacker.flood(lambda: next(turns), sockets=1)


async def large_group(attacker: Attacker) -> None:
    items = [{"group": HALL, "id": f"t{number}", "text": "x" * 1000} for number in range(100)]

    def transaction() -> Frame:
        now = time.time()  # else it would change nothing
        puts = [{"action": "put", "table": "talk", "item": item | {"at": now}} for item in items]
        return {"action": "transact", "operations": puts}

    await attacker.flood(transaction, depth=2)


class Attack(NamedTuple):
    what: str
    prepare: Callable[[Socket, Backend], Awaitable[None]]
    run: Callable[[Attacker], Awaitable[None]]


ATTACKS = {
    "L1": Attack("costly first frame without a credential", nothing, costly_first_frame),
    "L2": Attack("index query over 3,000 unreadable items", documents, hidden_index),
    "L3": Attack("pages of 1 MiB, never read", boxes, unread_pages),
    "L4": Attack("failing transaction over 25 large items", boxes, failing_transaction),
    "L5": Attack("updates of a 240 KB item", boxes, large_updates),
    "L6": Attack("silent and half-open connections", nothing, silence),
    "L7": Attack("1,280 requests under way", nothing, many_requests),
    "L8": Attack("get through peers of a user in 1,000 groups", busy, profile_of_the_busy),
    "L9": Attack("follow that makes a matcher backtrack", nothing, backtracking_topic),
    "L10": Attack("auth_key of 1 MB", nothing, large_auth_key),
    "L11": Attack("pings by a peer that never reads", nothing, pings),
    "L13": Attack("a member of 1,000 groups comes and goes", busy, come_and_go),
    "L14": Attack("follow with an old cursor", nothing, rewinds),
    "names": Attack("updates of an item shared with 25,000 names", listed, many_names),
    "flapping": Attack("joins and leaves of one group", nothing, flapping),
    "group": Attack("transactions of 100 to 2,000 open feeds", hall, large_group),
}
"""The attacks by number of their case, or by name."""


async def main() -> None:
    lines = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    order = msgspec.json.decode(await lines.readline(), type=Order)
    os.nice(NICE)
    print("ready", flush=True)
    await lines.readline()
    attacker = Attacker(order)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(order.seconds):
            await ATTACKS[order.case].run(attacker)
    # Those that are cancelled now have not been answered.
    answers = attacker.answers | ({"unanswered": attacker.waiting} if attacker.waiting else {})
    print(msgspec.json.encode(answers).decode(), flush=True)


if __name__ == "__main__":
    start(main())
