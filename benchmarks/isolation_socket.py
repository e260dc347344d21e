"""A websocket for benchmarks: it neither retries nor reconnects, so that each answer is seen as it came."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlencode

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from tidewire.redis.keys import Keys
from tidewire.tasks import end

Frame = dict[str, Any]

DISCONNECTED: Frame = {"type": "error", "code": "disconnected"}
"""Stands for the answer of a request whose connection ended before it came."""

STAGE, PARTITIONS = "bench", 8
ATTACKED = 3
"""The partition of the attacker's data."""

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class Socket:
    """One open connection. `take` gets each frame that is no answer."""

    def __init__(self, ws: ClientConnection, take: Callable[[Frame], None] | None) -> None:
        self.ws = ws
        self._take = take
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[Frame]] = {}
        self._is_closed = False

    async def ask(self, action: str, **fields: Any) -> Frame:
        """The answer to a request: a reply, an error, or DISCONNECTED."""
        return await (await self.begin(action, **fields))

    async def begin(self, action: str, **fields: Any) -> asyncio.Future[Frame]:
        """Send a request; the future gets its answer."""
        id_ = next(self._ids)
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            answer.set_result(DISCONNECTED)
            return answer
        self._open[id_] = answer
        with contextlib.suppress(ConnectionClosed):  # `read` answers it
            await self.ws.send(_encode({"id": id_, "action": action, **fields}), text=True)
        return answer

    async def read(self) -> None:
        """Take frames until the connection ends."""
        try:
            async for message in self.ws:
                self._received(message)
        except ConnectionClosed:
            pass
        finally:
            self._is_closed = True
            for answer in self._open.values():
                if not answer.done():
                    answer.set_result(DISCONNECTED)

    def _received(self, message: str | bytes) -> None:
        # Changes are not decoded for somebody who does not look at them: an attacker's time is the machine's.
        if self._take is None and not message.startswith(('{"type":"reply"', '{"type":"error"')):  # type: ignore[arg-type]
            return
        frame = _decode(message)
        if frame["type"] not in ("reply", "error"):
            if self._take:
                self._take(frame)
            return
        answer = self._open.pop(frame["id"], None)
        if answer and not answer.done():
            answer.set_result(frame)


@contextlib.asynccontextmanager
async def connected(
    url: str, auth_key: str | None, *, cursor: str | None = None, take: Callable[[Frame], None] | None = None
) -> AsyncIterator[Socket]:
    """A connection that is read in the background. Raises OSError or WebSocketException where there is none."""
    headers = {} if auth_key is None else {"Authorization": f"Bearer {auth_key}"}
    address = f"{url}/?{urlencode({'cursor': cursor})}" if cursor else f"{url}/"
    ws = await connect(address, additional_headers=headers, compression=None, max_size=None, ping_interval=None)
    socket = Socket(ws, take)
    reading = asyncio.create_task(socket.read())
    try:
        yield socket
    finally:
        ws.transport.abort()
        await end([reading])


def names(prefix: str, count: int, *, attacked: bool | None = None) -> list[str]:
    """Names that lie in the attacked partition, or outside of it, or anywhere."""
    keys = Keys(STAGE, PARTITIONS)
    found = (f"{prefix}{number}" for number in itertools.count())
    chosen = (name for name in found if attacked is None or (keys.partition_of(name) == ATTACKED) is attacked)
    return list(itertools.islice(chosen, count))


UNREACHABLE = (OSError, WebSocketException, TimeoutError)
"""The errors of `connected` when a connection is refused or fails."""
