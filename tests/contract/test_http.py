"""The HTTP port as pages and proxies meet it: CORS, methods, files, and requests that are unsound."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import websockets

from tests.helpers import wait_until
from tidewire import App, everyone
from tidewire.process import http
from tidewire.testing import Stage

from .conftest import PATIENCE_S, Open, as_user, eventually, make_app, wire

ORIGIN = "https://app.example.com"
PINGS_BYTES = 64 << 20
"""More than the buffers of two sockets and of the gateway."""


class Answer(NamedTuple):
    """An answer as it was on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(stage: Stage, head: str, body: bytes = b"") -> Answer:
    """Send a request, given as its lines without the host, and read its answer."""
    async with raw(stage) as (reader, writer):
        lines = head.strip().split("\n")
        writer.write("\r\n".join([lines[0], "Host: 127.0.0.1", *lines[1:], "", ""]).encode() + body)
        return await read(reader)


@contextlib.asynccontextmanager
async def raw(stage: Stage) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    address = urlsplit(stage.http_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read(reader: asyncio.StreamReader) -> Answer:
    async with asyncio.timeout(PATIENCE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Answer(int(first.split()[1]), headers, await reader.read(int(headers.get("content-length", 0))))


@pytest.fixture
async def shared(open_stage: Open) -> AsyncIterator[Stage]:
    """A stage that pages of one other origin may use."""
    async with open_stage(make_app(), origins=f"{ORIGIN}:443") as stage:
        yield stage


async def test_a_page_of_an_allowed_origin_may_call_every_route(shared: Stage) -> None:
    key = await shared.key("alice")
    preflight = await ask(
        shared,
        f"OPTIONS /v1/put HTTP/1.1\nOrigin: {ORIGIN}\nAccess-Control-Request-Method: POST\n"
        "Access-Control-Request-Headers: authorization, content-type",
    )
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for head, status in (
        (f"POST /v1/whoami HTTP/1.1\nAuthorization: Bearer {key}\nContent-Length: 0", 200),
        ("POST /v1/whoami HTTP/1.1\nContent-Length: 0", 401),
        ("GET /nothing HTTP/1.1", 404),
    ):
        answer = await ask(shared, f"{head}\nOrigin: {ORIGIN}")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, ORIGIN), "errors too"
        assert answer.headers["vary"] == "Origin"


async def test_a_page_of_another_origin_is_not_let_in(shared: Stage) -> None:
    preflight = await ask(
        shared, "OPTIONS /v1/put HTTP/1.1\nOrigin: https://evil.example\nAccess-Control-Request-Method: POST"
    )
    assert preflight.status == 403
    assert b"--origins" in preflight.body
    answer = await ask(shared, "POST /v1/whoami HTTP/1.1\nOrigin: https://evil.example\nContent-Length: 0")
    assert "access-control-allow-origin" not in answer.headers


async def test_head_of_the_feed_ends_at_once(stage: Stage) -> None:
    key = await stage.key("alice")
    answer = await ask(stage, f"HEAD /v1/feed?auth_key={key} HTTP/1.1")
    assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    async with wire(stage, key=key) as alice:
        page = await alice.do("query", table="connections", key="alice")
        assert len(page["items"]) == 1, "it was no connection"
    assert (await ask(stage, "HEAD /v1/feed HTTP/1.1")).status == 401


@pytest.mark.parametrize("path", ["/v1/put", "/@connections/g-1"])
async def test_a_peer_that_leaves_within_its_body_is_no_fault(
    stage: Stage, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    key = await stage.key("backend", role="service")
    async with raw(stage) as (_, writer):
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nauth_key: {key}\r\nContent-Length: 100\r\n\r\n{{".encode())
        await writer.drain()
        await asyncio.sleep(0.1)
    assert (await ask(stage, f"POST /v1/ping HTTP/1.1\nauth_key: {key}\nContent-Length: 0")).status == 200
    told = capfd.readouterr()
    assert "request_failed" not in told.out + told.err
    assert "Traceback" not in told.out + told.err
    assert key not in told.out + told.err


@pytest.mark.parametrize(
    "unsound",
    [
        "Host: other.example\nContent-Length: 2",
        "Origin: http://127.0.0.1\nOrigin: http://127.0.0.1\nContent-Length: 2",
        "Content-Length: 2\nTransfer-Encoding: chunked",
        "auth_key: tw_0_0\nContent-Length: 2",
    ],
)
async def test_a_request_that_two_readers_could_take_differently_is_refused(stage: Stage, unsound: str) -> None:
    key = await stage.key("alice")
    answer = await ask(stage, f"POST /v1/ping HTTP/1.1\nauth_key: {key}\n{unsound}", b"{}")
    assert answer.status == 400
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(("trusted", "seen"), [("", "127.0.0.1"), ("127.0.0.0/8", "203.0.113.9")])
async def test_both_ports_believe_only_trusted_proxies(open_stage: Open, trusted: str, seen: str) -> None:
    async with open_stage(make_app(), trusted_proxies=trusted) as stage, AsyncExitStack() as stack:
        key, service = await stage.key("alice"), await stage.client("service", role="service")
        forwarded = {"X-Forwarded-For": "198.51.100.1, 203.0.113.9"}
        await stack.enter_async_context(wire(stage, key=key, headers=forwarded))
        _, writer = await stack.enter_async_context(raw(stage))
        lines = [f"GET /v1/feed?auth_key={key} HTTP/1.1", "Host: x", *(f"{n}: {v}" for n, v in forwarded.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode())

        async def both_are_seen() -> bool:
            page = await service.query("connections", "alice")
            return [entry["item"]["source_ip"] for entry in page["items"]] == [seen, seen]

        await eventually(both_are_seen)


async def test_everything_is_served_under_a_prefix(open_stage: Open) -> None:
    async with open_stage(make_app(), path_prefix="/live/eu") as stage:
        key = await stage.key("alice")
        for path in ("/live/eu/", "/live/eu/v1"):
            async with wire(stage, key=key, path=path) as alice:
                assert alice.welcome["user"] == "alice"
        head = f"POST /live/eu/v1/whoami HTTP/1.1\nauth_key: {key}\nContent-Length: 0"
        assert (await ask(stage, head)).status == 200
        assert (await ask(stage, head.replace("/live/eu", ""))).status == 404
        with pytest.raises(websockets.InvalidStatus, match="404"):
            async with wire(stage, key=key, path="/v1"):
                pass


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "POST /v1/ping HTTP/1.1\r\nHost: x\r\n",
        "POST /v1/ping HTTP/1.1\r\nHost: x\r\nauth_key: {key}\r\nContent-Length: 100\r\n\r\n{{",
        "POST /v1/ping HTTP/1.1\r\nHost: x\r\nauth_key: {key}\r\nContent-Length: 2\r\n\r\n{{}}POST",
    ],
    ids=["silent", "half a head", "half a body", "half a second head"],
)
async def test_a_peer_that_does_not_go_on_is_closed(stage: Stage, monkeypatch: pytest.MonkeyPatch, sent: str) -> None:
    for name in ("HEAD_S", "BODY_S"):
        monkeypatch.setattr(http, name, 0.3)
    key = await stage.key("alice")
    async with raw(stage) as (reader, writer):
        writer.write(sent.format(key=key).encode())
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionResetError):
                while await reader.read(1000):
                    pass


async def test_a_reader_of_events_that_has_stopped_is_no_connection(
    stage: Stage, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "UNREAD_S", 0.3)
    job = await as_user(stage, stack, "job", role="service")

    async def listed() -> int:
        return len((await job.do("query", table="connections", key="alice"))["items"])

    async with raw(stage) as (reader, writer):
        writer.write(f"GET /v1/feed?auth_key={await stage.key('alice')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.readuntil(b"welcome")
        await wait_until(listed, "the reader is listed")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        before = http.REFUSED.labels("unread")._value.get()
        async with asyncio.timeout(PATIENCE_S):
            while await listed():
                await job.do("send", user="alice", body="x" * 200_000)
        assert http.REFUSED.labels("unread")._value.get() == before + 1


async def test_a_slow_reader_of_events_is_not_late(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-outs are about requests. A response may take as long as it will."""
    for name in ("HEAD_S", "BODY_S"):
        monkeypatch.setattr(http, name, 0.2)
    async with raw(stage) as (reader, writer):
        writer.write(f"GET /v1/feed?auth_key={await stage.key('alice')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.readuntil(b"welcome")
        await asyncio.sleep(0.5)
        alice = await stage.client("alice")
        await alice.put("notes", {"id": "n", "owner": "alice"})
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b'"table":"notes"')


async def test_beyond_the_bound_connections_are_closed_and_the_others_live(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with raw(stage) as (reader, writer):
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read(reader)).status == 404
        monkeypatch.setattr(http, "max_connections", lambda share: 1)
        async with raw(stage) as (refused, _), asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionResetError):
                assert await refused.read(1) == b""
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read(reader)).status == 404


async def test_nothing_tells_the_name_of_the_server(stage: Stage) -> None:
    assert "server" not in (await ask(stage, "GET /nothing HTTP/1.1")).headers


@pytest.fixture
async def site(open_stage: Open, tmp_path: Path) -> AsyncIterator[Stage]:
    """An application with files."""
    for name, text in {
        "index.html": "home",
        "docs/index.html": "docs",
        ".env": "SECRET",
        ".git/config": "SECRET",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    app = App("site", static=str(tmp_path))
    app.table("news", key="id", readers=everyone)
    async with open_stage(app) as stage:
        yield stage


async def test_files_are_served_but_those_that_begin_with_a_dot(site: Stage) -> None:
    assert (await ask(site, "GET / HTTP/1.1")).body == b"home"
    assert (await ask(site, "GET /docs/ HTTP/1.1")).body == b"docs"
    for path in ("/.env", "/.git/config", "/%2eenv", "/docs/../.env"):
        answer = await ask(site, f"GET {path} HTTP/1.1")
        assert answer.status == 404, path
        assert b"SECRET" not in answer.body


async def test_a_redirect_names_no_host(site: Stage) -> None:
    """Behind a proxy, the address that the server sees is not that of the client."""
    answer = await ask(site, "GET /docs HTTP/1.1")
    assert (answer.status, answer.headers["location"]) == (307, "docs/")


async def test_another_version_of_the_protocol_is_told_ours(stage: Stage) -> None:
    address = urlsplit(stage.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 8\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    answer = await read(reader)
    writer.transport.abort()
    assert (answer.status, answer.headers["sec-websocket-version"]) == (426, "13")


@pytest.mark.parametrize(("size", "accepted"), [(20_000, True), (33_000, False)])
async def test_both_ports_take_the_same_cookies(stage: Stage, size: int, accepted: bool) -> None:
    key, cookie = await stage.key("alice"), "c" * size
    head = f"POST /v1/ping HTTP/1.1\nauth_key: {key}\nCookie: {cookie}\nContent-Length: 0"
    assert (await ask(stage, head)).status == (200 if accepted else 431)
    async with AsyncExitStack() as stack:
        if not accepted:
            stack.enter_context(pytest.raises(websockets.InvalidStatus, match="431"))
        alice = await stack.enter_async_context(wire(stage, key=key, headers={"Cookie": cookie}))
        assert alice.welcome["user"] == "alice"


async def test_a_peer_that_pings_and_never_reads_is_not_read_from(stage: Stage) -> None:
    address = urlsplit(stage.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1024)
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nauth_key: %s\r\n\r\n" % (await stage.key("alice")).encode()
    )
    assert (await read(reader)).status == 101
    ping = b"\x89\xfd" + bytes(4) + b"x" * 125
    sent_bytes = 0
    with contextlib.suppress(TimeoutError):
        while sent_bytes < PINGS_BYTES:
            writer.write(ping * 1000)
            async with asyncio.timeout(2):
                await writer.drain()
            sent_bytes += 1000 * len(ping)
    writer.transport.abort()
    assert sent_bytes < PINGS_BYTES, "the kernel's buffers are full, because nobody reads"
    async with wire(stage, key=await stage.key("bob")) as bob:
        assert await bob.do("ping") == {}


async def test_two_credentials_in_one_header_are_refused_and_said_so(stage: Stage) -> None:
    headers = websockets.Headers([("auth_key", await stage.key("alice")), ("auth_key", await stage.key("bob"))])
    with pytest.raises(websockets.InvalidStatus, match="400") as refused:
        async with websockets.connect(stage.url, additional_headers=headers):
            pass
    assert b"more than once" in (refused.value.response.body or b"")


async def test_a_frame_before_the_credential_is_small(stage: Stage, stack: AsyncExitStack) -> None:
    early = await stack.enter_async_context(wire(stage, welcome=False))
    await early.send({"action": "auth", "auth_key": "x" * 5000})
    assert await early.closed() == 1009
    late = await stack.enter_async_context(wire(stage, welcome=False))
    await late.send({"action": "auth", "auth_key": await stage.key("alice")})
    late.welcome = await late.receive()
    await late.do("put", table="notes", item={"id": "n", "owner": "alice", "text": "x" * 100_000})
