"""What administrators do with connections: describe, post to, disconnect."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from tidewire.model.records import GatewayOrder, pack
from tidewire.testing import Stage

from .conftest import PATIENCE_S, Wire, as_user, wire
from .test_events import events
from .test_http import Answer, ask


async def call(stage: Stage, method: str, id_: str, key: str, body: bytes = b"", prefix: str = "") -> Answer:
    """Call as boto3's client does: signed, with the auth_key as access key id."""
    signed = f"AWS4-HMAC-SHA256 Credential={key}/20261127/eu-west-1/execute-api/aws4_request, SignedHeaders=host"
    head = f"{method} {prefix}/@connections/{id_} HTTP/1.1\nAuthorization: {signed}\nContent-Length: {len(body)}"
    return await ask(stage, head, body)


async def posted(wire: Wire) -> str | bytes:
    """The next frame that is none of the gateway's own."""
    async with asyncio.timeout(PATIENCE_S):
        while isinstance(data := await wire.ws.recv(), str) and data.startswith('{"type"'):
            pass
        return data


async def test_a_connection_is_described_posted_to_and_closed(stage: Stage) -> None:
    service = await stage.key("backend", role="service")
    begun = datetime.now(UTC)
    async with wire(stage, key=await stage.key("alice"), headers={"User-Agent": "browser/1"}) as alice:
        id_ = alice.welcome["connection"]
        found = json.loads((await call(stage, "GET", id_, service, prefix="/prod")).body)
        assert found["identity"] == {"sourceIp": "127.0.0.1", "userAgent": "browser/1"}
        connected, active = (datetime.fromisoformat(found[name]) for name in ("connectedAt", "lastActiveAt"))
        assert abs((connected - begun).total_seconds()) < 60
        await alice.do("ping")
        later = json.loads((await call(stage, "GET", id_, service)).body)
        assert datetime.fromisoformat(later["lastActiveAt"]) > active

        assert (await call(stage, "POST", id_, service, b'{"hello":[1,null]}')).status == 200
        assert await posted(alice) == '{"hello":[1,null]}'
        assert (await call(stage, "POST", id_, service, "müll".encode())).status == 200
        assert await posted(alice) == "müll"
        assert (await call(stage, "POST", id_, service, b"\xff")).status == 200
        assert await posted(alice) == b"\xff", "what is no text is a binary frame"

        assert (await call(stage, "DELETE", id_, service)).status == 204
        assert await alice.closed() == 4403
    for method in ("GET", "POST", "DELETE"):
        gone = await call(stage, method, id_, service)
        assert (gone.status, gone.headers["x-amzn-errortype"]) == (410, "GoneException")


@pytest.mark.parametrize("id_", ["nobody", "no-such-gateway", "%20"])
async def test_a_connection_that_never_was_is_gone(stage: Stage, id_: str) -> None:
    assert (await call(stage, "GET", id_, await stage.key("backend", role="service"))).status == 410


async def test_only_service_keys_may(stage: Stage) -> None:
    async with wire(stage, key=await stage.key("alice")) as alice:
        for key in (await stage.key("alice"), "tw_0_0"):
            answer = await call(stage, "DELETE", alice.welcome["connection"], key)
            assert (answer.status, answer.headers["x-amzn-errortype"]) == (403, "ForbiddenException")
        assert (await alice.refused("disconnect", users=["alice"]))["code"] == "forbidden"
        assert await alice.do("ping") == {}


async def test_more_than_128_kib_are_too_large(stage: Stage) -> None:
    service = await stage.key("backend", role="service")
    async with wire(stage, key=await stage.key("alice")) as alice:
        id_ = alice.welcome["connection"]
        assert (await call(stage, "POST", id_, service, b"x" * 131_072)).status == 200
        answer = await call(stage, "POST", id_, service, b"x" * 131_073)
        assert (answer.status, answer.headers["x-amzn-errortype"]) == (413, "PayloadTooLargeException")


async def test_users_are_disconnected_with_all_their_connections(stage: Stage, stack: AsyncExitStack) -> None:
    admin = await as_user(stage, stack, "admin", role="service")
    key = await stage.key("alice")
    alices = [await stack.enter_async_context(wire(stage, key=key)) for _ in range(2)]
    bob, carol = [await as_user(stage, stack, name) for name in ("bob", "carol")]
    whom: dict[str, Any] = {"users": ["alice", "nobody"], "connections": [bob.welcome["connection"]]}
    assert await admin.do("disconnect", **whom) == {"disconnected": 3}
    for gone in (*alices, bob):
        assert await gone.closed() == 4403
    assert await carol.do("ping") == {}


@pytest.mark.parametrize("whom", [{}, {"users": ["x"] * 1001}, {"users": "alice"}])
async def test_whom_to_disconnect_must_be_said(stage: Stage, stack: AsyncExitStack, whom: dict[str, Any]) -> None:
    admin = await as_user(stage, stack, "admin", role="service")
    assert (await admin.refused("disconnect", **whom))["code"] == "bad_request"


async def test_a_post_to_an_event_stream_is_one_event(stage: Stage) -> None:
    async with events(stage, auth_key=await stage.key("alice")) as reader:
        id_ = (await reader.next())["connection"]
        await call(stage, "POST", id_, await stage.key("backend", role="service"), b"two\nlines")
        async with asyncio.timeout(PATIENCE_S):
            while (line := await reader._reader.readline()) != b"data: two\n":
                assert line, "the stream has ended"
            assert await reader._reader.readline() == b"data: lines\n"


async def test_the_lag_of_each_group_is_told_to_service_keys(stage: Stage) -> None:
    head = "GET /v1/lag HTTP/1.1\nauth_key: {}"
    answer = await ask(stage, head.format(await stage.key("backend", role="service")))
    found = json.loads(answer.body)
    assert found.keys() == {"store", "broadcaster", "authorizer"}
    assert all(one.keys() == {"lag", "pending"} for one in found.values())
    assert (await ask(stage, head.format(await stage.key("alice")))).status == 403
    assert (await ask(stage, "GET /v1/lag HTTP/1.1")).status == 401


async def test_an_order_of_a_later_release_is_refused_and_others_are_carried_out(stage: Stage) -> None:
    service = await stage.key("backend", role="service")
    async with wire(stage, key=await stage.key("alice")) as alice:
        id_ = alice.welcome["connection"]
        gateway = id_.rpartition("-")[0]
        unknown = GatewayOrder("teleport", {}, int(time.time() * 1000) + 60_000, gateway, 1)
        await stage.backend.commands.xadd(stage.backend.keys.orders(gateway), {"r": pack(unknown)})
        known = GatewayOrder("deliver", {"connection": id_, "frame": {"type": "message"}}, unknown.deadline, gateway, 2)
        await stage.backend.commands.xadd(stage.backend.keys.orders(gateway), {"r": pack(known)})
        assert await alice.next(type="message")
        assert (await call(stage, "GET", id_, service)).status == 200
