"""Random and mutated handshakes and frames, on raw sockets: nothing breaks, and nothing stays behind.

TIDEWIRE_TEST_FUZZ says how many (2,000 by default; `make fuzz` sends 100,000), and TIDEWIRE_TEST_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from tests.helpers import wait_until
from tests.websockets import BINARY, CLOSE, CONT, HANDSHAKE, PING, PONG, TEXT, RawClient, close, frame
from tidewire.testing import Stage

from .conftest import as_user

COUNT = int(os.environ.get("TIDEWIRE_TEST_FUZZ", "2000"))
SEED = int(os.environ.get("TIDEWIRE_TEST_SEED", random.randrange(1 << 32)))
BATCH = 50
"""Connections at a time."""
FRAMES = 20
"""Maximum frames of a connection."""

REQUESTS = [
    {"action": "ping", "id": 1},
    {"action": "whoami", "id": "x"},
    {"action": "get", "table": "notes", "key": {"id": "n"}},
    {"action": "put", "table": "scores", "item": {"id": "s", "n": 1}},
    {"action": "query", "table": "lines", "key": "p", "limit": 10},
    {"action": "follow", "topic": "cell:1"},
    {"action": "unfollow", "topic": "cell:1"},
    {"action": "transact", "operations": [{"action": "put", "table": "scores", "item": {"id": "t"}}]},
    {"action": "auth", "auth_key": "k"},
]


class Fuzzer:
    """Makes bytes that clients might send, and bytes that none would."""

    def __init__(self, seed: int, key: str) -> None:
        self._random = random.Random(seed)
        self._handshake = HANDSHAKE.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {key}\r\n\r\n".encode())

    def connection(self) -> list[bytes]:
        """A handshake, mostly sound, and frames, mostly not."""
        pick = self._random
        handshake = pick.choice([self._handshake] * 6 + [HANDSHAKE, self._mutated(self._handshake), self._noise()])
        return [handshake, *(self._frame() for _ in range(pick.randint(1, FRAMES)))]

    def _frame(self) -> bytes:
        pick = self._random
        match pick.randrange(6):
            case 0:
                return self._noise()
            case 1:
                sound = frame(TEXT, self._request())
                return self._mutated(sound)
            case 2:
                return frame(TEXT, self._mutated(self._request()))
            case 3:
                opcode, fin = pick.choice([CONT, TEXT, BINARY, CLOSE, PING, PONG]), pick.random() < 0.7
                return frame(opcode, self._noise(), fin=fin, rsv=pick.choice([0, 0, 0, 0, 1, 7]))
            case 4:
                return close(pick.choice([None, 0, 1000, 1001, 1005, 1006, 4000, 65535]), self._noise(20))
        return frame(TEXT, self._request())

    def _request(self) -> bytes:
        return json.dumps(self._random.choice(REQUESTS)).encode()

    def _noise(self, most: int = 300) -> bytes:
        return self._random.randbytes(self._random.randrange(most))

    def _mutated(self, data: bytes) -> bytes:
        """Change, drop, repeat or insert some bytes."""
        pick, found = self._random, bytearray(data)
        for _ in range(pick.randint(1, 4)):
            at = pick.randrange(len(found) + 1)
            match pick.randrange(4):
                case 0:
                    found[at : at + 1] = pick.randbytes(1)
                case 1:
                    del found[at : at + pick.randint(1, 20)]
                case 2:
                    found[at:at] = found[at : at + pick.randint(1, 50)]
                case 3:
                    found[at:at] = self._noise(20)
        return bytes(found)


async def send(port: int, pieces: list[bytes], *, ends: bool) -> None:
    """Send all, read what comes until it pauses, and leave."""
    client = RawClient(*await asyncio.open_connection("127.0.0.1", port))
    try:
        for piece in pieces:
            client.send(piece)
        if ends:
            client.writer.write_eof()
        async with asyncio.timeout(0.05):
            while await client.reader.read(1 << 16):
                pass
    except (TimeoutError, ConnectionError):
        pass
    finally:
        client.writer.transport.abort()


def connections() -> list[str]:
    """The tasks that serve connections."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() in ("websocket", "begin")]


async def test_random_handshakes_and_frames_break_nothing_and_leave_nothing(
    stage: Stage, stack: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    print(f"TIDEWIRE_TEST_SEED={SEED}")
    watcher = await as_user(stage, stack, "watcher")
    fuzzer = Fuzzer(SEED, await stage.key("mallory"))
    port = urlsplit(stage.url).port
    assert port
    pick, sent = random.Random(SEED), 0
    served = len(connections())
    with capture_logs() as logs:
        while sent < COUNT:
            some = [fuzzer.connection() for _ in range(BATCH)]
            await asyncio.gather(*(send(port, pieces, ends=pick.random() < 0.3) for pieces in some))
            sent += sum(map(len, some))
            assert await watcher.do("ping") == {}
        await wait_until(lambda: len(connections()) == served, "no connection is left")
    worst = [entry for entry in logs if entry["log_level"] in ("error", "critical") or "exception" in entry]
    assert not worst
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    rows = (await watcher.do("query", table="connections", key="mallory"))["items"]

    async def gone() -> bool:
        return not (await watcher.do("query", table="connections", key="mallory"))["items"]

    await wait_until(gone, f"none of {len(rows)} connections is listed")
