"""Requests and replies, over the websocket and over HTTP; bad input leaves everything else running."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import socket
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest

from tidewire.redis import keyring
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user, post


@pytest.fixture
async def alice(stage: Stage, stack: AsyncExitStack) -> Wire:
    return await as_user(stage, stack, "alice")


async def test_an_id_comes_back_as_it_was(alice: Wire) -> None:
    ids: list[Any] = [7, "seven", "", 0, -1]
    for id_ in ids:
        await alice.send({"id": id_, "action": "ping"})
        reply = await alice.next(type="reply")
        assert reply == {"type": "reply", "id": id_, "result": {}}
        assert type(reply["id"]) is type(id_)


async def test_without_an_id_there_is_no_reply_and_an_error_has_null(alice: Wire) -> None:
    await alice.send({"action": "ping"})
    await alice.send({"action": "get", "table": "notes", "key": "none"})
    error = await alice.next(type="error")
    assert (error["id"], error["code"]) == (None, "not_found")
    assert await alice.do("ping") == {}
    assert not [frame for frame in alice.frames if frame["type"] == "reply"]


async def test_whoami_says_user_connection_and_claims(stage: Stage, alice: Wire) -> None:
    assert await alice.do("whoami") == {"user": "alice", "connection": alice.welcome["connection"], "claims": {}}


GARBAGE = ["", "hello", "[]", "null", '{"action":', '{"id":1}', '{"a":1e999}', '{"action":"put","id":1.5}']


async def test_a_malformed_request_is_an_error_and_the_connection_lives(alice: Wire) -> None:
    for text in GARBAGE:
        await alice.ws.send(text)
        error = await alice.next(type="error")
        assert error["code"] == "bad_request"
        assert error["retry"] is False
        assert await alice.do("ping") == {}


async def test_a_binary_frame_is_not_json(alice: Wire) -> None:
    await alice.ws.send(b"{}")
    assert (await alice.next(type="error"))["code"] == "bad_request"
    assert await alice.do("ping") == {}


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("nonsense", {}, "unsupported_action"),
    ("load", {"items": [["notes", {"id": "n"}]]}, "unsupported_action"),
    ("sweep", {"gateway": "g"}, "unsupported_action"),
    ("put", {"table": "nothing", "item": {"id": 1}}, "bad_request"),
    ("put", {"table": "lines", "item": {"page": 1}}, "bad_request"),
    ("put", {"table": "closed", "item": {"id": 1}}, "forbidden"),
    ("put", {"table": "scores", "item": {"id": 1, "x": "x" * 300_000}}, "too_large"),
    ("get", {"table": "scores", "key": "none"}, "not_found"),
    ("get", {"table": "lines", "key": {"page": "p"}}, "bad_request"),
    ("delete", {"table": "scores", "key": "none"}, "not_found"),
    ("update", {"table": "scores", "key": "none", "set": {"x": 1}}, "not_found"),
    ("query", {"table": "lines", "key": "p", "limit": 1001}, "bad_request"),
    ("put", {"table": "scores", "item": {"id": 1}, "if_": {"present": True}}, "conflict"),
]


async def test_each_fault_has_its_code_and_the_connection_lives(alice: Wire) -> None:
    for action, fields, code in FAULTS:
        error = await alice.refused(action, **fields)
        assert error["code"] == code
        assert error["message"]
        assert await alice.do("ping") == {}


async def test_a_frame_of_two_megabytes_closes_only_its_own_connection_with_1009(
    stage: Stage, alice: Wire, stack: AsyncExitStack
) -> None:
    bob = await as_user(stage, stack, "bob")
    await alice.send({"id": 1, "action": "ping", "x": "x" * (2 << 20)})
    assert await alice.closed() == 1009
    assert await bob.do("ping") == {}


async def test_reads_and_writes_are_as_in_the_contract(alice: Wire) -> None:
    written = await alice.do("put", table="lines", item={"page": "p", "n": 2, "text": "x"})
    assert written.keys() == {"key", "version", "position"}
    read = await alice.do("get", table="lines", key={"page": "p", "n": 2})
    assert read.keys() == {"item", "version", "at", "by", "position"}
    assert (read["item"], read["version"], read["by"]) == ({"page": "p", "n": 2, "text": "x"}, 1, "alice")
    for n in (10, -1):
        await alice.do("put", table="lines", item={"page": "p", "n": n})
    page = await alice.do("query", table="lines", key="p", limit=2)
    assert page.keys() == {"items", "next", "position", "key"}
    assert [entry["item"]["n"] for entry in page["items"]] == [-1, 2]
    page = await alice.do("query", table="lines", key="p", limit=2, after=page["next"])
    assert ([entry["item"]["n"] for entry in page["items"]], page["next"]) == ([10], None)
    error = await alice.refused("put", table="lines", item={"page": "p", "n": 2}, if_={"version": 7})
    assert (error["code"], error["details"]) == ("conflict", {"version": 1})


async def test_a_repeated_request_is_done_once(alice: Wire) -> None:
    await alice.do("put", table="scores", item={"id": "s"})
    results = [await alice.do("update", table="scores", key="s", add={"n": 1}, request="unique") for _ in range(3)]
    assert results[0] == results[1] == results[2]
    error = await alice.refused("update", table="scores", key="s", add={"n": 2}, request="unique")
    assert (error["code"], error["retry"], error["details"]) == ("conflict", False, {"request": "unique"})
    assert (await alice.do("get", table="scores", key="s"))["item"]["n"] == 1


async def test_requests_of_one_connection_are_done_in_order(alice: Wire) -> None:
    for n in range(50):
        await alice.send({"action": "put", "table": "scores", "item": {"id": "s", "n": n}})
    assert (await alice.do("get", table="scores", key="s"))["item"]["n"] == 49


async def test_a_page_of_less_than_a_mebibyte_that_is_all_has_no_next(alice: Wire) -> None:
    for n in range(3):
        await alice.do("put", table="lines", item={"page": "big", "n": n, "x": "x" * 200_000})
    page = await alice.do("query", table="lines", key="big")
    assert (len(page["items"]), page["next"]) == (3, None)


async def test_pages_of_more_than_a_mebibyte_follow_one_another(alice: Wire) -> None:
    for n in range(8):
        await alice.do("put", table="lines", item={"page": "big", "n": n, "x": "x" * 200_000})
    seen: list[int] = []
    after: dict[str, Any] = {}
    while True:
        page = await alice.do("query", table="lines", key="big", **after)
        seen += [entry["item"]["n"] for entry in page["items"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert seen == list(range(8))


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────────


STATUSES: list[tuple[str, Any, int]] = [
    ("put", {"table": "scores", "item": {"id": 1}}, 200),
    ("whoami", {}, 200),
    ("ping", {}, 200),
    ("put", {"table": "nothing", "item": {"id": 1}}, 400),
    ("nonsense", {}, 400),
    ("put", b"hello", 400),
    ("put", b"\xff", 400),
    ("put", {"table": "closed", "item": {"id": 1}}, 403),
    ("get", {"table": "scores", "key": "none"}, 404),
    ("put", {"table": "scores", "item": {"id": 2}, "if": {"present": True}}, 409),
    ("put", {"table": "scores", "item": {"id": 1, "x": "x" * 300_000}}, 413),
    ("put", b'{"a":"' + b"x" * (2 << 20) + b'"}', 413),
]


async def test_an_action_over_http_has_its_status(stage: Stage) -> None:
    key = await stage.key("alice")
    for action, body, status in STATUSES:
        found, answer = await post(stage, action, body, auth_key=key)
        assert found == status, answer
        assert (answer.get("type") == "error") == (status != 200)
        if status == 200:
            assert (await post(stage, action, body, Authorization=f"Bearer {key}"))[0] == 200


async def test_http_without_a_valid_credential_is_401(stage: Stage) -> None:
    for headers in ({}, {"auth_key": "nonsense"}, {"Authorization": "Bearer tw_a_b"}):
        status, answer = await post(stage, "ping", {}, **headers)
        assert (status, answer["code"]) == (401, "unauthenticated")


async def test_an_expired_key_is_401_at_once(stage: Stage) -> None:
    key = str(await keyring.create(stage.backend, "alice", ttl_s=0.5))
    assert (await post(stage, "ping", {}, auth_key=key))[0] == 200
    begun = asyncio.get_running_loop().time()
    while (passed := asyncio.get_running_loop().time() - begun) < 1.5:
        if (await post(stage, "ping", {}, auth_key=key))[0] == 401:
            break
        await asyncio.sleep(0.05)
    assert passed < 1.5


# ── slow readers ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_does_not_read_is_bounded_and_stops_no_other(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage(limit_queued_bytes=100_000) as stage, AsyncExitStack() as inner:
        key = await stage.key("slow")
        url = urlsplit(stage.url)
        sleeper = socket.socket()
        inner.callback(sleeper.close)
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sleeper, (url.hostname, url.port))
        nonce = base64.b64encode(os.urandom(16)).decode()
        await loop.sock_sendall(
            sleeper,
            f"GET /?auth_key={key} HTTP/1.1\r\nHost: {url.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {nonce}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode(),
        )
        assert b" 101 " in await loop.sock_recv(sleeper, 100)
        alice = await as_user(stage, inner, "alice")
        for n in range(60):
            await alice.do("put", table="scores", item={"id": 1, "n": n, "x": "x" * 100_000})
            frame = await alice.next(type="change", table="scores")
            assert frame["new"]["n"] == n
        assert max(transport.get_write_buffer_size() for transport in _transports()) < 2_000_000


def _transports() -> list[asyncio.Transport]:
    """All sockets' transports of this process."""
    kinds = ("_SelectorSocketTransport",)
    return [found for found in gc.get_objects() if type(found).__name__ in kinds]
