"""The handshake, credentials, and how a connection ends."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest
import websockets

from tidewire.redis import keyring
from tidewire.testing import Stage

from .conftest import Open, as_user, eventually, wire

WRONG = "tw_0123456789ab_" + "0" * 48


@pytest.mark.parametrize("way", ["header", "bearer", "query", "first frame"])
async def test_a_credential_comes_in_one_of_four_ways(stage: Stage, way: str) -> None:
    key = await stage.key("alice")
    headers = {"header": {"auth_key": key}, "bearer": {"Authorization": f"Bearer {key}"}}.get(way, {})
    query: dict[str, Any] = {"auth_key": key} if way == "query" else {}
    async with wire(stage, headers=headers, path="/v1", welcome=way != "first frame", **query) as alice:
        if way == "first frame":
            await alice.send({"action": "auth", "auth_key": key})
            alice.welcome = await alice.receive()
        assert (alice.welcome["type"], alice.welcome["user"]) == ("welcome", "alice")


async def status(stage: Stage, **options: Any) -> int:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with wire(stage, **options):
            pass
    return refused.value.response.status_code


async def test_a_wrong_key_is_401(stage: Stage) -> None:
    for key in (WRONG, "nonsense", "tw_a_b", "é"):
        assert await status(stage, auth_key=key) == 401
        if key.isascii():
            assert await status(stage, key=key) == 401


async def test_a_key_in_a_header_that_is_not_ascii_is_401(stage: Stage) -> None:
    assert await status(stage, headers={"auth_key": "é"}) == 401


async def test_the_first_credential_present_counts_even_when_it_is_wrong(stage: Stage) -> None:
    assert await status(stage, key=WRONG, auth_key=await stage.key("alice")) == 401


async def test_a_long_reason_of_a_refusal_is_cut_between_characters(stage: Stage) -> None:
    async with wire(stage, welcome=False) as alice:
        await alice.send({"action": "😀" * 60})
        assert await alice.closed() == 4401


async def test_another_path_is_404(stage: Stage) -> None:
    assert await status(stage, key=await stage.key("alice"), path="/v2") == 404


async def test_a_foreign_origin_is_403(stage: Stage) -> None:
    headers = {"Origin": "http://evil.example"}
    assert await status(stage, key=await stage.key("alice"), headers=headers) == 403


async def test_a_browser_with_a_wrong_key_sees_a_close_code(stage: Stage) -> None:
    headers = {"Origin": "http://127.0.0.1:8081"}
    async with wire(stage, auth_key=WRONG, headers=headers, welcome=False) as browser:
        assert await browser.closed() == 4401
    async with wire(stage, auth_key=await stage.key("alice"), headers=headers) as browser:
        assert browser.welcome["user"] == "alice"


async def test_no_credential_in_time_is_4408(open_stage: Open) -> None:
    async with open_stage(first_frame_auth_s=0.3) as stage, wire(stage, welcome=False) as silent:
        assert await silent.closed() == 4408


async def test_a_first_frame_that_is_no_valid_credential_is_4401(stage: Stage) -> None:
    frames: list[object] = [{"action": "auth", "auth_key": WRONG}, {"action": "ping"}, {"action": "auth"}, [], "x"]
    for frame in frames:
        async with wire(stage, welcome=False) as stranger:
            await stranger.send(frame)
            assert await stranger.closed() == 4401


async def test_an_unknown_action_as_first_frame_is_4401(stage: Stage) -> None:
    async with wire(stage, welcome=False) as stranger:
        await stranger.send({"action": "nonsense"})
        assert await stranger.closed() == 4401


async def test_a_revoked_key_closes_its_connections_and_is_refused(stage: Stage, stack: AsyncExitStack) -> None:
    key = await keyring.create(stage.backend, "alice")
    alice = await stack.enter_async_context(wire(stage, str(key)))
    other = await as_user(stage, stack, "alice")
    assert await keyring.revoke(stage.backend, key.id)
    assert await alice.closed() == 4401
    assert await status(stage, key=str(key)) == 401
    assert await other.do("ping") == {}


async def test_an_expired_key_closes_its_connection(stage: Stage) -> None:
    key = await keyring.create(stage.backend, "alice", ttl_s=0.5)
    async with wire(stage, str(key)) as alice:
        assert 0 <= (await alice.next(type="expiring"))["in_ms"] <= 1500, "by the gateway's estimate of the time"
        assert await alice.closed() == 4401


async def test_auth_renews_a_connection_for_its_own_user_alone(stage: Stage, stack: AsyncExitStack) -> None:
    key = await keyring.create(stage.backend, "alice", ttl_s=1.0)
    alice = await stack.enter_async_context(wire(stage, str(key)))
    assert (await alice.refused("auth", auth_key=await stage.key("bob")))["code"] == "unauthenticated"
    renewed = await alice.do("auth", auth_key=await stage.key("alice", claims={"a": 1}))
    assert renewed == {"user": "alice", "claims": {"a": 1}, "expires_at": None}
    assert (await alice.do("whoami"))["claims"] == {"a": 1}


async def test_messagepack_is_the_same_in_binary(stage: Stage, stack: AsyncExitStack) -> None:
    alice = await as_user(stage, stack, "alice", binary=True)
    assert alice.ws.subprotocol == "tidewire.msgpack"
    item = {"id": "n", "owner": "alice", "x": [1.5, None, {"é": True}]}
    assert (await alice.do("put", table="notes", item=item))["version"] == 1
    change = await alice.next(type="change", table="notes")
    assert (change["new"], change["old"]) == (item, None)
    await alice.ws.send(b"\xc1")
    assert (await alice.next(type="error"))["code"] == "bad_request"
    assert await alice.do("ping") == {}


async def test_connections_are_items_while_they_last(stage: Stage, stack: AsyncExitStack) -> None:
    watcher = await as_user(stage, stack, "watcher")
    job = await as_user(stage, stack, "job", role="service")
    async with wire(stage, await stage.key("alice"), headers={"User-Agent": "secret-agent"}) as alice:
        id_ = alice.welcome["connection"]

        async def there() -> bool:
            return bool((await watcher.do("query", table="connections", key="alice"))["items"])

        await eventually(there)
        (entry,) = (await watcher.do("query", table="connections", key="alice"))["items"]
        assert (entry["item"]["user"], entry["item"]["connection"]) == ("alice", id_)
        assert not entry["item"].keys() & {"source_ip", "user_agent", "claims"}
        (entry,) = (await job.do("query", table="connections", key="alice"))["items"]
        assert entry["item"]["source_ip"] == "127.0.0.1"
        assert "user_agent" in entry["item"]
        key = {"user": "alice", "connection": id_}
        for action, fields in (("put", {"item": key}), ("delete", {"key": key}), ("update", {"key": key})):
            assert (await alice.refused(action, table="connections", **fields))["code"] == "forbidden"
    frame = await watcher.next(type="change", table="connections", event="REMOVE", key=key)
    assert "secret-agent" not in str(frame)
    assert (await watcher.do("query", table="connections", key="alice"))["items"] == []
