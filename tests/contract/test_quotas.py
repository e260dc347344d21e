"""What one user, one address and all together may have of a gateway, and of all gateways."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from tests.helpers import wait_until
from tidewire.redis.keys import ServiceKind
from tidewire.services.gateway.quotas import ConnectionQuota
from tidewire.services.gateway.service import Gateway
from tidewire.testing import Stage

from .conftest import PATIENCE_S, Open, another_gateway, as_user, make_app, post, wire


async def known(gateway: Gateway) -> None:
    """Wait until all gateways know each other: two heartbeats after both have begun."""
    registry = gateway.core.registry
    await wait_until(lambda: len(registry.live(ServiceKind.GATEWAY)) == 2, "the gateway knows the other one")
    await asyncio.sleep(2 * gateway.settings.lease_ms / 3000)


async def test_a_user_has_at_most_so_many_connections_over_all_gateways(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with (
        open_stage(make_app(), limit_connections=3) as stage,
        another_gateway(stage, limit_connections=3) as (gateway, there),
    ):
        await known(gateway)
        key = await stage.key("alice")
        places = [stage, there, there]
        wires = [await stack.enter_async_context(wire(place, key)) for place in places]
        for place in (stage, there):
            with pytest.raises(InvalidStatus) as refused:
                await stack.enter_async_context(wire(place, key))
            response = refused.value.response
            assert response.status_code == 429
            assert response.headers["Retry-After"] == "1"
            assert b"TIDEWIRE_LIMIT_CONNECTIONS" in (response.body or b"")
        page = await stack.enter_async_context(wire(there, key, welcome=False, headers={"Origin": "http://127.0.0.1"}))
        assert await page.closed() == 4429, "a page never sees a status"
        first = await stack.enter_async_context(wire(there, None, welcome=False))
        await first.send({"action": "auth", "auth_key": key})
        assert await first.closed() == 4429
        bob = await as_user(there, stack, "bob")
        assert await bob.do("ping") == {}, "others are not concerned"
        for _ in range(5):
            await as_user(stage, stack, "alice", role="service")
        await wires[1].ws.close()

        async def free() -> bool:
            try:
                await stack.enter_async_context(wire(stage, key))
            except InvalidStatus:
                return False
            return True

        await wait_until(free, "the place of the closed connection is free, at the other gateway too")


async def test_the_connections_of_a_dead_gateway_do_not_count(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(make_app(), limit_connections=2) as stage:
        key = await stage.key("alice")
        await stage.backend.commands.hset(stage.backend.keys.user_connections("alice"), "dead", 2)
        for _ in range(2):
            await stack.enter_async_context(wire(stage, key))
        with pytest.raises(InvalidStatus):
            await stack.enter_async_context(wire(stage, key))


async def test_a_handshake_does_not_wait_longer_than_its_time_to_be_counted(
    stage: Stage, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with another_gateway(stage, welcome_timeout_s=0.3) as (gateway, there):
        key = await stage.key("alice")
        hangs = True

        async def tell(quota: ConnectionQuota, user: str) -> dict[str, int]:
            if hangs:
                await asyncio.sleep(PATIENCE_S)
            return {}

        monkeypatch.setattr(ConnectionQuota, "_tell", tell)
        with pytest.raises(InvalidStatus) as refused:
            await stack.enter_async_context(wire(there, key))
        assert refused.value.response.status_code == 503
        headers = {"Authorization": f"Bearer {key}"}
        assert (await feed_status(there, headers)) == 503
        hangs = False
        await wait_until(lambda: not gateway.core.connection_quota._here["alice"], "it does not count")
        await stack.enter_async_context(wire(there, key))


async def feed_status(stage: Stage, headers: dict[str, str]) -> int:
    """The status of an event stream that is refused."""
    request = urllib.request.Request(f"{stage.http_url}/v1/feed", headers=headers)
    try:
        response = await asyncio.to_thread(urllib.request.urlopen, request, timeout=PATIENCE_S)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    with response:
        return int(response.status)


async def test_event_streams_are_connections_of_their_user(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(make_app(), limit_connections=1) as stage:
        key = await stage.key("alice")
        await stack.enter_async_context(wire(stage, key))
        assert await feed_status(stage, {"Authorization": f"Bearer {key}"}) == 429


async def test_a_gateway_that_ends_leaves_no_number_behind(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    key, tell = await stage.key("alice"), ConnectionQuota._tell

    async def slow(quota: ConnectionQuota, user: str) -> dict[str, int]:
        await asyncio.sleep(0.2)
        return await tell(quota, user)

    monkeypatch.setattr(ConnectionQuota, "_tell", slow)
    counted = stage.backend.keys.user_connections("alice")
    async with another_gateway(stage) as (_, there), AsyncExitStack() as stack:
        await stack.enter_async_context(wire(there, key))
        assert await stage.backend.commands.hlen(counted) == 1
        clients = stack.pop_all()  # they do not leave: their gateway ends
    assert await stage.backend.commands.hlen(counted) == 0
    await clients.aclose()


async def test_requests_beyond_the_rate_are_refused_with_the_time_to_wait(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage(make_app(), limit_requests_per_s=20) as stage:
        alice, bob = await as_user(stage, stack, "alice"), await as_user(stage, stack, "bob")
        answers = [await alice.ask("ping") for _ in range(60)]
        refused = [answer for answer in answers if answer["type"] == "error"]
        assert len(refused) >= 20
        for error in refused:
            assert (error["code"], error["retry"]) == ("rate_limited", True)
            assert 0 < error["details"]["retry_after_ms"] <= 51
            assert "TIDEWIRE_LIMIT_REQUESTS_PER_S" in error["message"]
        assert await bob.do("ping") == {}
        key = await stage.key("alice")
        found = [await post(stage, "ping", auth_key=key) for _ in range(30)]
        assert 429 in [status for status, _ in found], "over HTTP it is the same user"
        await asyncio.sleep(refused[0]["details"]["retry_after_ms"] / 1000)
        job = await as_user(stage, stack, "alice", role="service")
        for _ in range(40):
            assert await job.do("ping") == {}, "service keys are not counted"


async def test_the_gateways_share_the_rate_of_a_user(open_stage: Open, stack: AsyncExitStack) -> None:
    async with (
        open_stage(make_app(), limit_requests_per_s=50) as stage,
        another_gateway(stage, limit_requests_per_s=50) as (gateway, there),
    ):
        await known(gateway)
        wires = [await as_user(place, stack, "alice") for place in (stage, there)]
        loop = asyncio.get_running_loop()

        async def flood(one: Any, seconds: float) -> int:
            until, done = loop.time() + seconds, 0
            while loop.time() < until:
                done += (await one.ask("ping"))["type"] == "reply"
                await asyncio.sleep(0.002)
            return done

        await asyncio.gather(*(flood(one, 2.5) for one in wires))
        done = sum(await asyncio.gather(*(flood(one, 3.0) for one in wires)))
        print(f"{done / 3:.0f} requests/s through two gateways, 50 are allowed")
        assert done < 3 * 50 * 1.6, "not as many through each"


async def test_a_gateway_takes_so_many_handshakes_a_second(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(make_app(), limit_handshakes_per_s=5) as stage:
        key = await stage.key("job", role="service")
        refused = []
        for _ in range(12):
            try:
                await stack.enter_async_context(wire(stage, key))
            except InvalidStatus as error:
                refused.append((error.response.status_code, error.response.headers["Retry-After"]))
        assert 0 < len(refused) <= 7, "five are taken at once"
        assert set(refused) == {(503, "1")}
        await asyncio.sleep(0.3)
        await stack.enter_async_context(wire(stage, key))


async def test_connections_without_a_credential_and_of_one_address_are_bounded(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage(make_app(), limit_unauthenticated=2, limit_address_connections=4) as stage:
        key = await stage.key("alice")
        waiting = [await stack.enter_async_context(wire(stage, None, welcome=False)) for _ in range(2)]
        with pytest.raises(InvalidStatus) as refused:
            await stack.enter_async_context(wire(stage, None, welcome=False))
        assert refused.value.response.status_code == 503
        await waiting[0].send({"action": "auth", "auth_key": key})
        assert (await waiting[0].receive())["type"] == "welcome"
        for _ in range(2):
            await stack.enter_async_context(wire(stage, key))
        with pytest.raises(InvalidStatus) as refused:
            await stack.enter_async_context(wire(stage, key))
        assert refused.value.response.status_code == 429
        assert b"TIDEWIRE_LIMIT_ADDRESS_CONNECTIONS" in (refused.value.response.body or b"")
