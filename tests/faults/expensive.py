"""A client that sends the most expensive requests it can find, one after another and pipelined, from a user of its own.

Each round takes one kind of request after the other. The client reads little of the answers and decodes none, so that
its own cost stays small beside that of the system under test.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import websockets
from websockets.asyncio.client import ClientConnection, connect

from tidewire.client import Client
from tidewire.redis import keyring
from tidewire.redis.backend import Backend

from .pace import BULK, SPRAWL, Pace

NAME = "attacker"
BOOK_ITEMS, BOOK_ITEM_BYTES = 25, 240_000
OPERATIONS_BATCH = 50
"""Requests under way while the data is written."""
UNREAD_S = 4.0
"""Seconds that large answers are left unread."""
ANSWER_S = 15.0
"""Maximum seconds that a round waits for its answers."""

Frame = dict[str, Any]


class Expensive:
    """The client. Counts what it sent and how that was answered."""

    def __init__(self, url: str, key: str, pace: Pace) -> None:
        self.sent: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self._url = url
        self._key = key
        self._pace = pace
        self._ids = itertools.count(1)

    @classmethod
    async def create(cls, backend: Backend, url: str, pace: Pace) -> Expensive:
        """Write the data that the requests are about."""
        service = str(await keyring.create(backend, "service-of-the-attacker", role="service"))
        self = cls(url, str(await keyring.create(backend, NAME)), pace)
        async with Client(url, service, timeout_s=60) as client:
            await self._write_all(client, "papers", (
                {"id": f"{one:05}", "room": f"s{one:05}", "shelf": "all"} for one in range(pace.groups)
            ))  # fmt: skip
            await self._write_all(
                client, "flats", ({"flat": f"s{one:05}", "user": SPRAWL} for one in range(pace.groups))
            )
            await client.put("faces", {"user": SPRAWL})
            text = "x" * BOOK_ITEM_BYTES
            for one in range(BOOK_ITEMS):
                await client.put("pages", {"book": NAME, "id": f"{one:02}", "owner": NAME, "text": text})
            names = [f"n{one}" for one in range(pace.names)]
            await client.put("lists", {"id": NAME, "owner": NAME, "names": names})
            mob = [{"mob": NAME, "user": name} for name in (NAME, *(f"m{one}" for one in range(pace.mob)))]
            for first in range(0, len(mob), BULK):
                some = mob[first : first + BULK]
                await client.transact(*({"action": "put", "table": "mobs", "item": item} for item in some))
        return self

    async def _write_all(self, client: Client, table: str, items: Iterable[Frame]) -> None:
        left = iter(items)
        while some := list(itertools.islice(left, OPERATIONS_BATCH)):
            await asyncio.gather(*(client.put(table, item) for item in some))

    async def run(self, stopping: asyncio.Event) -> None:
        """Round after round, until stopped. A connection that ends is made again."""
        kinds = {
            "index": self._index,
            "unread": self._unread,
            "transactions": self._transactions,
            "updates": self._updates,
            "peers": self._peers,
            "names": self._names,
            "rants": self._rants,
        }
        for name in itertools.cycle(self._pace.attacks):
            if stopping.is_set():
                return
            with contextlib.suppress(OSError, EOFError, TimeoutError, websockets.WebSocketException):
                await kinds[name]()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), self._pace.expensive_pause_s)

    # ── the requests ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _index(self) -> None:
        """Query an index over items of a thousand rooms, of which it may read none."""
        page = {"action": "query", "table": "papers", "index": "by_shelf", "key": "all", "limit": 1000}
        await self._pipelined("index", [page] * 6)

    async def _unread(self) -> None:
        """Ask for pages of 1 MiB on several sockets, and read no answer."""
        page = {"action": "query", "table": "pages", "key": NAME, "limit": 1000}
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                ws = await stack.enter_async_context(self._connection())
                await self._send(ws, "unread", [page] * 16)
            await asyncio.sleep(UNREAD_S)

    async def _transactions(self) -> None:
        """Change 25 large items in a transaction whose last check fails."""
        operations: list[Frame] = [
            {"action": "update", "table": "pages", "key": self._page(one), "set": {"seen": one}}
            for one in range(BOOK_ITEMS - 1)
        ]
        last = {"action": "check", "table": "pages", "key": self._page(BOOK_ITEMS - 1), "if": {"absent": True}}
        await self._pipelined("transact", [{"action": "transact", "operations": [*operations, last]}] * 2)

    async def _updates(self) -> None:
        """Add one to a number in a large item."""
        update = {"action": "update", "table": "pages", "key": self._page(0), "add": {"count": 1}}
        await self._pipelined("update", [update] * 10)

    async def _peers(self) -> None:
        """Get an item whose readers share a group with a user of a thousand groups."""
        await self._pipelined("peers", [{"action": "get", "table": "faces", "key": SPRAWL}] * 10)

    async def _names(self) -> None:
        """Update an item that is shared with tens of thousands of names."""
        update = {"action": "update", "table": "lists", "key": {"id": NAME}, "add": {"count": 1}}
        await self._pipelined("names", [update] * 3)

    async def _rants(self) -> None:
        """Write a hundred items to a room of thousands, in one transaction."""
        items: list[Frame] = [{"mob": NAME, "id": f"{one:02}", "n": next(self._ids)} for one in range(BULK)]
        operations = [{"action": "put", "table": "rants", "item": item} for item in items]
        await self._pipelined("rants", [{"action": "transact", "operations": operations}])

    def _page(self, number: int) -> Frame:
        return {"book": NAME, "id": f"{number:02}"}

    # ── the wire ────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[ClientConnection]:
        headers = {"auth_key": self._key}
        async with asyncio.timeout(ANSWER_S):
            ws = await connect(self._url, additional_headers=headers, compression=None, max_size=None, max_queue=2)
        try:
            async with asyncio.timeout(ANSWER_S):
                await ws.recv()  # the welcome
            yield ws
        finally:
            ws.transport.abort()

    async def _send(self, ws: ClientConnection, kind: str, requests: list[Frame]) -> None:
        for request in requests * self._pace.attack_depth:
            self.sent[kind] += 1
            await ws.send(json.dumps({"id": next(self._ids), **request}))

    async def _pipelined(self, kind: str, requests: list[Frame]) -> None:
        """Send all at once, then wait for the answers."""
        async with self._connection() as ws, asyncio.timeout(ANSWER_S):
            await self._send(ws, kind, requests)
            left = len(requests) * self._pace.attack_depth
            while left:
                head = await ws.recv(decode=False)
                if head.startswith(b'{"type":"reply"'):
                    self.answers[f"{kind} answered"] += 1
                elif head.startswith(b'{"type":"error"'):
                    self.answers[f"{kind} {json.loads(head)['code']}"] += 1
                else:
                    continue  # a change of its own items
                left -= 1
