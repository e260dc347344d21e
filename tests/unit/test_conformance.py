"""RFC 6455 by raw frames: the behaviour that the case groups 1 to 7 and 10 of the Autobahn test suite ask for."""

from __future__ import annotations

import asyncio

import pytest

from tests.helpers import wait_until
from tests.websockets import (
    BINARY,
    CLOSE,
    CONT,
    MAX_BYTES,
    PING,
    PONG,
    TEXT,
    WAIT_S,
    Received,
    close,
    frame,
    listening,
)

DONE = close(1000)
FAILED, INVALID, TOO_BIG = 1002, 1007, 1009


async def answers(*frames: bytes, chop: int | None = None) -> list[Received]:
    """Return what an echo server answers to these frames, and then to a close frame."""
    async with listening() as server:
        client = await server.client()
        client.send(*frames, chop=chop)
        found: list[Received] = []
        awaited = sum(one[0] & 0x80 and one[0] & 15 in (CONT, TEXT, BINARY, PING) for one in map(bytes, frames))
        for _ in range(awaited):
            found.append(await client.next())
            if found[-1].opcode == CLOSE:
                break
        client.send(DONE)
        found += await client.all()
        client.writer.close()
        return found


async def echoed(*frames: bytes, chop: int | None = None) -> list[Received]:
    """Return what was answered to sound frames, without the close frame at the end."""
    *found, last = await answers(*frames, chop=chop)
    assert (last.opcode, last.code) == (CLOSE, 1000)
    return found


async def failure(*frames: bytes, chop: int | None = None) -> int | None:
    """Return the code with which the server ends a connection that sends these frames and no close frame."""
    async with listening() as server:
        found = await server.exchange(frames, chop=chop)
    assert found[-1].opcode == CLOSE
    return found[-1].code


# ── 1: data ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 125, 126, 127, 128, 65535, 65536])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
async def test_messages_of_each_form_of_length_are_echoed(opcode: int, size: int) -> None:
    payload = b"*" * size if opcode == TEXT else b"\xfe" * size
    assert await echoed(frame(opcode, payload)) == [Received(opcode, payload)]
    assert await echoed(frame(opcode, payload), chop=997) == [Received(opcode, payload)]


# ── 2: pings and pongs ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("payload", [b"", b"Hello, world!", b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", b"\xfe" * 125])
@pytest.mark.parametrize("chop", [None, 1])
async def test_a_ping_is_answered_with_its_payload(payload: bytes, chop: int | None) -> None:
    assert await echoed(frame(PING, payload), chop=chop) == [Received(PONG, payload)]


async def test_a_ping_of_more_than_125_bytes_fails_the_connection() -> None:
    assert await failure(frame(PING, b"\xfe" * 126)) == FAILED


async def test_a_pong_that_nobody_asked_for_is_ignored() -> None:
    assert await echoed(frame(PONG), frame(PONG, b"unsolicited"), frame(PING, b"p")) == [Received(PONG, b"p")]


@pytest.mark.parametrize("chop", [None, 1])
async def test_ten_pings_get_ten_pongs(chop: int | None) -> None:
    pings = [b"payload-%d" % n for n in range(10)]
    assert await echoed(*(frame(PING, one) for one in pings), chop=chop) == [Received(PONG, one) for one in pings]


# ── 3 and 4: reserved bits and opcodes ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rsv", range(1, 8))
@pytest.mark.parametrize("opcode", [TEXT, BINARY, PING, CLOSE])
async def test_a_reserved_bit_fails_the_connection(rsv: int, opcode: int) -> None:
    assert await failure(frame(opcode, b"\x03\xe8", rsv=rsv)) == FAILED


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
async def test_a_reserved_opcode_fails_the_connection(opcode: int) -> None:
    assert await failure(frame(opcode, b"payload")) == FAILED
    assert await failure(frame(opcode)) == FAILED


async def test_a_frame_that_is_not_masked_fails_the_connection() -> None:
    assert await failure(frame(TEXT, b"plain", masked=False)) == FAILED


# ── 5: fragments ────────────────────────────────────────────────────────────────────────────────────────────────────


def parts(opcode: int, *payloads: bytes) -> list[bytes]:
    """A message in fragments."""
    last = len(payloads) - 1
    return [frame(CONT if n else opcode, one, fin=n == last) for n, one in enumerate(payloads)]


@pytest.mark.parametrize("opcode", [PING, PONG, CLOSE])
async def test_a_control_frame_in_fragments_fails_the_connection(opcode: int) -> None:
    assert await failure(*parts(opcode, b"one", b"two")) == FAILED


@pytest.mark.parametrize("chop", [None, 1])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
async def test_fragments_are_put_together(opcode: int, chop: int | None) -> None:
    assert await echoed(*parts(opcode, b"fragment1", b"", b"fragment2"), chop=chop) == [
        Received(opcode, b"fragment1fragment2")
    ]


@pytest.mark.parametrize("chop", [None, 1])
async def test_a_ping_amid_fragments_is_answered_at_once(chop: int | None) -> None:
    first, second, third = parts(TEXT, b"one", b"two", b"three")
    pinged = [first, frame(PING, b"a"), second, frame(PING, b"b"), third]
    assert await echoed(*pinged, chop=chop) == [
        Received(PONG, b"a"),
        Received(PONG, b"b"),
        Received(TEXT, b"onetwothree"),
    ]


@pytest.mark.parametrize("fin", [True, False])
async def test_a_continuation_of_nothing_fails_the_connection(fin: bool) -> None:
    assert await failure(frame(CONT, b"lost", fin=fin)) == FAILED
    async with listening() as server:
        client = await server.client()
        client.send(frame(TEXT, b"whole"))
        assert await client.next() == Received(TEXT, b"whole")
        client.send(frame(CONT, b"lost", fin=fin), frame(TEXT, b"more"))
        (only,) = await client.all()
        assert only.code == FAILED
        client.writer.close()


async def test_a_message_within_another_fails_the_connection() -> None:
    assert await failure(frame(TEXT, b"one", fin=False), frame(TEXT, b"two")) == FAILED


# ── 6: UTF-8 ────────────────────────────────────────────────────────────────────────────────────────────────────────

VALID = [
    "Hello-µ@ßöäüàá-UTF-8!!",
    "κόσμε",
    "\x00",
    "\x7f",
    "\x80",
    "\u07ff",
    "\u0800",
    "\ud7ff",
    "\ue000",
    "\ufffd",
    "\ufffe\uffff",
    "\U00010000",
    "\U0010ffff",
    "\U0001fffe",
]


@pytest.mark.parametrize("text", VALID)
async def test_valid_text_is_echoed_however_it_is_cut(text: str) -> None:
    data = text.encode()
    assert await echoed(frame(TEXT, data)) == [Received(TEXT, data)]
    single = [data[n : n + 1] for n in range(len(data))]
    assert await echoed(*parts(TEXT, *single)) == [Received(TEXT, data)], "in fragments of one byte"
    assert await echoed(frame(TEXT, data), chop=1) == [Received(TEXT, data)]


INVALID_TEXT = [
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited",
    b"\xce\xba\xe1",
    b"\xf8\x88\x80\x80\x80",
    b"\xfc\x84\x80\x80\x80\x80",
    b"\xf7\xbf\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"\x80",
    b"\xbf",
    b"\x80\xbf\x80",
    b"\xc0\x20\xc1\x20",
    b"\xe0\x20",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xf0\x80\x80\xaf",
    b"\xc1\xbf",
    b"\xed\xa0\x80",
    b"\xed\xbf\xbf",
    b"\xed\xa0\x80\xed\xb0\x80",
    b"\xfe",
    b"\xff",
]


@pytest.mark.parametrize("data", INVALID_TEXT)
async def test_text_that_is_not_utf8_fails_the_connection(data: bytes) -> None:
    assert await failure(frame(TEXT, data)) == INVALID
    assert await failure(*parts(TEXT, data[:1], data[1:])) == INVALID
    assert await echoed(frame(BINARY, data)) == [Received(BINARY, data)], "which is no matter in binary"


# ── 7: closing ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def closed(*frames: bytes) -> list[Received]:
    async with listening() as server:
        return await server.exchange(frames)


async def test_a_message_is_echoed_before_the_close() -> None:
    assert await echoed(frame(TEXT, b"Hello World!")) == [Received(TEXT, b"Hello World!")]


@pytest.mark.parametrize(("opcode", "payload"), [(CLOSE, b"\x03\xe8"), (PING, b"late"), (TEXT, b"late")])
async def test_nothing_after_a_close_frame_is_answered(opcode: int, payload: bytes) -> None:
    assert await closed(close(1000), frame(opcode, payload)) == [Received(CLOSE, b"\x03\xe8")]


async def test_a_close_amid_fragments_is_answered_with_its_code() -> None:
    first, second = parts(TEXT, b"fragment1", b"fragment2")
    assert await closed(first, close(1000), second) == [Received(CLOSE, b"\x03\xe8")]


async def test_a_large_message_before_a_close_is_read() -> None:
    payload = b"BAsd7&jh23" * 26_000
    async with listening() as server:
        client = await server.client()
        client.send(frame(TEXT, payload))
        assert await client.next() == Received(TEXT, payload)
        client.send(close(1000), frame(PING))
        assert await client.all() == [Received(CLOSE, b"\x03\xe8")]
        client.writer.close()


@pytest.mark.parametrize("reason", [b"", b"Hello World!", b"*" * 123])
async def test_a_close_frame_is_echoed(reason: bytes) -> None:
    assert await closed(close(1000, reason)) == [Received(CLOSE, b"\x03\xe8" + reason)]


async def test_a_close_frame_without_a_code_is_answered_with_none() -> None:
    assert await closed(close()) == [Received(CLOSE, b"")]


async def test_a_close_frame_of_one_byte_or_too_many_fails_the_connection() -> None:
    assert await failure(frame(CLOSE, b"a")) == FAILED
    assert await failure(close(1000, b"*" * 124)) == FAILED


async def test_a_reason_that_is_not_utf8_fails_the_connection() -> None:
    assert await failure(close(1000, b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80")) == INVALID


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999])
async def test_a_valid_close_code_is_echoed(code: int) -> None:
    assert await closed(close(code)) == [Received(CLOSE, code.to_bytes(2, "big"))]


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535])
async def test_an_invalid_close_code_fails_the_connection(code: int) -> None:
    assert await failure(close(code)) == FAILED


# ── 9 and 10: sizes, and messages in many fragments ─────────────────────────────────────────────────────────────────


async def test_a_message_in_fragments_of_1300_bytes_is_echoed() -> None:
    payload = b"*" * 65536
    pieces = [payload[at : at + 1300] for at in range(0, len(payload), 1300)]
    assert await echoed(*parts(TEXT, *pieces)) == [Received(TEXT, payload)]


async def test_a_message_as_large_as_allowed_is_echoed_and_a_larger_one_is_not() -> None:
    payload = b"*" * MAX_BYTES
    assert await echoed(frame(BINARY, payload)) == [Received(BINARY, payload)]
    assert await failure(frame(BINARY, payload + b"*")) == TOO_BIG
    half = payload[: MAX_BYTES // 2]
    assert await failure(*parts(BINARY, half, half, b"*")) == TOO_BIG, "all fragments count"


async def test_the_server_ends_a_connection_that_does_not_answer_its_close_frame() -> None:
    async with listening() as server:
        client = await server.client()
        closing = asyncio.gather(*(one.close(1001, "") for one in server.websockets))
        (only,) = await client.all()
        assert only.code == 1001
        async with asyncio.timeout(WAIT_S):
            await closing
        client.writer.close()


async def test_a_peer_that_leaves_without_a_close_frame_is_forgotten() -> None:
    async with listening() as server:
        client = await server.client()
        client.writer.transport.abort()
        await wait_until(lambda: not len(server.websockets), "it is forgotten")
