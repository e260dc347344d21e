"""Peers that say too much, too little or the wrong thing, and peers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import time
import tracemalloc
from http import HTTPStatus

import pytest
from websockets.exceptions import ConnectionClosed

from tests.helpers import wait_until
from tests.websockets import (
    BINARY,
    CLOSE,
    CONT,
    HANDSHAKE,
    PING,
    PONG,
    TEXT,
    WAIT_S,
    RawClient,
    Received,
    close,
    echo,
    frame,
    listening,
)
from tidewire.services.gateway import opening, websocket
from tidewire.services.gateway.opening import OpeningHandshake
from tidewire.services.gateway.upgrade import MAX_HEAD_BYTES, Refusal
from tidewire.services.gateway.websocket import CLOSED, MAX_MESSAGES, MAX_PONGS, Websocket
from tidewire.tasks import end


def count(reason: str) -> float:
    """How many websockets were closed for a reason."""
    value: float = CLOSED.labels(reason)._value.get()
    return value


async def ended(client: RawClient) -> None:
    """Wait until the server has ended the connection, whatever it sends before."""
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(ConnectionResetError):
            while await client.reader.read(65536):
                pass
    client.writer.close()


# ── too little ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("begin", [b"", b"GET /v1 HTTP/1.1\r\nHost: x\r\n"])
async def test_a_handshake_that_does_not_come_is_ended(monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    monkeypatch.setattr(opening, "HEAD_S", 0.1)
    before = count("slow_handshake")
    async with listening() as server:
        client = await server.raw()
        client.writer.write(begin)
        await ended(client)
    assert count("slow_handshake") == before + 1


async def test_a_silent_peer_is_closed_and_one_that_answers_pings_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_S", 0.3)
    before = count("silent")
    async with listening() as server:
        silent, living = await server.client(), await server.client()

        async def live() -> None:
            while True:
                assert await living.next() == Received(PING, b"")
                living.send(frame(PONG))

        answering = asyncio.create_task(live())
        *pings, last = await silent.all()
        assert {ping.opcode for ping in pings} == {PING}
        assert (last.opcode, last.code) == (CLOSE, 1011)
        silent.writer.close()
        await asyncio.sleep(1)
        await end([answering])
        living.send(frame(TEXT, b"here"))
        found = await living.next()
        while found.opcode == PING:
            found = await living.next()
        assert found == Received(TEXT, b"here")
        living.writer.close()
    assert count("silent") == before + 1


async def test_a_peer_that_reads_nothing_is_closed_also_if_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_S", 0.1)
    monkeypatch.setattr(websocket, "UNREAD_S", 0.3)
    before = count("unread")

    async def talk(opening: OpeningHandshake) -> None:
        ws = opening.accept("", None)
        while True:
            await ws.send(b"x" * 100_000)

    async with listening(talk) as server:
        client = await server.client()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(WAIT_S):
            while count("unread") == before:
                client.send(frame(PING))
                await asyncio.sleep(0.05)
        client.writer.transport.abort()


async def test_a_peer_that_reads_slowly_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_S", 0.1)
    monkeypatch.setattr(websocket, "UNREAD_S", 0.5)
    payload = b"x" * 20_000_000

    async def talk(opening: OpeningHandshake) -> None:
        ws = opening.accept("", None)
        ws.binary = True
        await ws.send(payload)
        await ws.send(b"end")

    before = count("unread")
    async with listening(talk) as server:
        client = await server.client()
        read_bytes = 0
        while read_bytes < len(payload):  # for two seconds at least, which is longer than the limit
            await asyncio.sleep(0.02)
            client.send(frame(PONG))
            read_bytes += len(await client.reader.read(200_000))
        await ended(client)
    assert count("unread") == before


# ── too much ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_of_many_pings_the_last_are_answered() -> None:
    async with listening() as server:
        client = await server.client()
        client.send(*(frame(PING, b"%d" % n) for n in range(10_000)), frame(TEXT, b"end"))
        pongs = []
        while (found := await client.next()).opcode == PONG:
            pongs.append(int(found.payload))
        assert found == Received(TEXT, b"end"), "all were read"
        assert pongs == sorted(set(pongs)), "in their order"
        assert set(range(10_000 - MAX_PONGS, 10_000)) <= set(pongs), "the last ones are answered"
        client.writer.close()


async def test_nothing_is_read_from_a_peer_whose_messages_wait() -> None:
    begin = asyncio.Event()
    taken = 0
    ws: Websocket

    async def serve(opening: OpeningHandshake) -> None:
        nonlocal taken, ws
        ws = opening.accept("", None)
        await begin.wait()
        while True:
            await ws.recv()
            taken += 1

    async with listening(serve) as server:
        client = await server.client()
        sent = 0
        message = frame(BINARY, b"x" * 10_000)
        while client.writer.transport.get_write_buffer_size() < 1 << 20:
            client.send(message)
            sent += 1
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        assert len(ws._messages) == MAX_MESSAGES, "10,000 bytes each"
        begin.set()
        await wait_until(lambda: taken == sent, "all messages are taken")
        client.writer.close()


async def test_large_messages_that_wait_are_bounded_in_bytes() -> None:
    ws: Websocket

    async def serve(opening: OpeningHandshake) -> None:
        nonlocal ws
        ws = opening.accept("", None)
        await asyncio.sleep(WAIT_S)

    async with listening(serve) as server:
        client = await server.client()
        client.send(*(frame(BINARY, b"x" * 400_000) for _ in range(10)))
        await wait_until(lambda: len(ws._messages) >= 3, "some have arrived")
        await asyncio.sleep(0.2)
        assert len(ws._messages) == 3, "the third one exceeds 1 MiB"
        client.writer.transport.abort()


async def test_tiny_fragments_take_no_more_than_their_bytes() -> None:
    ws: Websocket

    async def serve(opening: OpeningHandshake) -> None:
        nonlocal ws
        ws = opening.accept("", None)
        await ws.send((await ws.recv()).encode())  # type: ignore[union-attr]

    async with listening(serve) as server:
        client = await server.client()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        client.send(frame(TEXT, b"a", fin=False), *(frame(CONT, fin=False) for _ in range(50_000)))
        client.send(frame(PING, b"read"))
        assert (await client.next()).payload == b"read"
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 2_000_000, "50,000 fragments are held as one byte"
        client.send(frame(CONT, b"b"))
        assert (await client.next()).payload == b"ab"
        client.writer.close()


async def test_a_flood_of_one_peer_does_not_delay_another() -> None:
    async with listening() as server:
        flooding = [await server.client() for _ in range(10)]
        client = await server.client()
        pings = frame(PING) * 40_000
        for one in flooding:
            one.writer.write(pings)
        begun = time.perf_counter()
        client.send(frame(TEXT, b"me too"))
        assert await client.next() == Received(TEXT, b"me too")
        echo_s = time.perf_counter() - begun
        floods = asyncio.gather(*(one.all() for one in flooding))
        for one in flooding:
            one.send(close(1000))
        await floods
        flood_s = time.perf_counter() - begun
        print(f"an echo took {1000 * echo_s:.0f} ms beside floods of {1000 * flood_s:.0f} ms")
        assert echo_s < flood_s / 3
        for one in (client, *flooding):
            one.writer.close()


async def test_a_peer_beyond_the_limit_of_connections_is_ended() -> None:
    before = count("full")
    async with listening(max_connections=2) as server:
        first, second = await server.client(), await server.client()
        await ended(await server.raw())
        assert count("full") == before + 1
        first.writer.close()
        await wait_until(lambda: len(server.websockets) == 1, "the first one has gone")
        third = await server.client()
        for one in (second, third):
            one.send(frame(TEXT, b"x"))
            assert (await one.next()).payload == b"x"
            one.writer.close()


# ── the wrong thing ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ((b"GET", b"POST"), 405),
        ((b"HTTP/1.1", b"HTTP/1.0"), 505),
        ((b"HTTP/1.1", b"HTTP/2"), 400),
        ((b"GET /v1", b"GET"), 400),
        ((b"GET /v1", b"GET /v 1"), 400),
        ((b"Host: localhost", b"Host localhost"), 400),
        ((b"Host: localhost", b"Host : localhost"), 400),
        ((b"Host: localhost", b"Host: local\r host"), 400),
        ((b"Host: localhost", b"Host: localhost\r\n continued: here"), 400),
        ((b"Host: localhost", b"Host: local\0host"), 400),
        ((b"Host: localhost\r\n", b""), 400),
        ((b"Host: localhost", b"Host: localhost\r\nHost: other"), 400),
        ((b"Upgrade: websocket", b"Upgrade: h2c"), 426),
        ((b"keep-alive, Upgrade", b"keep-alive"), 426),
        ((b"Version: 13", b"Version: 8"), 426),
        ((b"Sec-WebSocket-Version: 13\r\n", b""), 426),
        ((b"dGhlIHNhbXBsZSBub25jZQ==", b"dGhlIHNhbXBsZSBub25j"), 400),
        ((b"dGhlIHNhbXBsZSBub25jZQ==", b"no base64"), 400),
        ((b"Sec-WebSocket-Key", b"Sec-WebSocket-Kez"), 400),
        ((b"Host: localhost", b"Host: localhost\r\nX: " + b"x" * 40_000), 431),
        ((b"Host: localhost", b"Host: localhost\r\n" + b"X: y\r\n" * 130 + b"Z: z"), 431),
        ((b"GET /v1", b"GET /" + b"v" * 40_000), 414),
        ((b"Host: localhost", b"Host: " + b"x" * MAX_HEAD_BYTES), 431),
    ],
)
async def test_a_request_that_is_no_handshake_is_refused(changed: tuple[bytes, bytes], status: int) -> None:
    request = HANDSHAKE.replace(*changed)
    assert request != HANDSHAKE
    async with listening() as server:
        client = await server.raw()
        client.writer.write(request)
        answer = await client.reader.read()
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b'"type":"error"' in answer
    client.writer.close()


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_a_handshake_may_come_in_pieces_and_frames_with_it(size: int) -> None:
    data = HANDSHAKE + frame(TEXT, b"early") + frame(TEXT, b"bird")
    async with listening() as server:
        client = await server.raw()
        for at in range(0, len(data), size):
            client.writer.write(data[at : at + size])
            await asyncio.sleep(0)
        await client.reader.readuntil(b"\r\n\r\n")
        assert [await client.next(), await client.next()] == [Received(TEXT, b"early"), Received(TEXT, b"bird")]
        client.writer.close()


async def test_frames_wait_while_the_handshake_is_decided_and_a_refusal_is_told() -> None:
    decided = asyncio.Event()

    async def serve(opening: OpeningHandshake) -> None:
        await decided.wait()
        if "refused" in opening.request.path:
            raise Refusal(HTTPStatus.FORBIDDEN, "not you")
        await echo(opening)

    async with listening(serve) as server:
        client, other = await server.raw(), await server.raw()
        client.writer.write(HANDSHAKE + frame(TEXT, b"x" * 300_000))
        other.writer.write(HANDSHAKE.replace(b"/v1", b"/refused") + frame(TEXT, b"x"))
        await asyncio.sleep(0.1)
        decided.set()
        await client.reader.readuntil(b"\r\n\r\n")
        assert len((await client.next()).payload) == 300_000
        assert b"403" in await other.reader.read()
        for one in (client, other):
            one.writer.close()


async def test_a_peer_that_leaves_before_the_decision_is_not_served() -> None:
    asked, told = asyncio.Event(), list[str]()

    async def serve(opening: OpeningHandshake) -> None:
        asked.set()
        try:
            await asyncio.sleep(WAIT_S)
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async with listening(serve) as server:
        client = await server.raw()
        client.writer.write(HANDSHAKE)
        await asked.wait()
        client.writer.transport.abort()
        await wait_until(lambda: told == ["cancelled"], "its handler ends")


async def test_a_fault_of_the_handler_closes_with_1011_and_its_end_with_1000() -> None:
    async def serve(opening: OpeningHandshake) -> None:
        ws = opening.accept("", None)
        if await ws.recv() == "fail":
            raise ValueError("a fault")

    async with listening(serve) as server:
        for said, code in (("fail", 1011), ("end", 1000)):
            client = await server.client()
            client.send(frame(TEXT, said.encode()))
            (last,) = await client.all()
            assert last.code == code
            client.writer.close()


async def test_what_is_sent_after_the_close_frame_of_the_server_is_not_begun() -> None:
    served = list[str | bytes]()

    async def serve(opening: OpeningHandshake) -> None:
        ws = opening.accept("", None)
        served.append(await ws.recv())
        closing = asyncio.create_task(ws.close(1012, "leaving"))
        with contextlib.suppress(ConnectionClosed):
            while True:
                served.append(await ws.recv())
        await closing
        with pytest.raises(ConnectionClosed):
            await ws.send(b"too late")

    async with listening(serve) as server:
        client = await server.client()
        client.send(frame(TEXT, b"in time"))
        only = await client.next()
        assert only.code == 1012
        client.send(frame(TEXT, b"too late"), close(1012))
        assert await client.all() == []
        client.writer.close()
    assert served == ["in time"]
