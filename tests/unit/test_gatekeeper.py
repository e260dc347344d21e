"""The gatekeeper: what it caches, for how long, and what a revocation ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest

from tests.helpers import wait_until
from tidewire.errors import Unauthenticated
from tidewire.model.records import Principal
from tidewire.redis.keys import Keys
from tidewire.services.gateway import gatekeeper as gatekeeper_module
from tidewire.services.gateway.gatekeeper import Gatekeeper
from tidewire.testing import FakeBackend

NOW_MS = 1_000_000


class Authorizers:
    """Answers in the place of the bus and the authorizers, and counts the questions."""

    def __init__(self, *, expires_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.expires_at = expires_at
        self.before_answer: Callable[[], None] = lambda: None

    async def request(self, _stream: bytes, make: Callable[[int], Any]) -> tuple[Any, ...]:
        question = make(1)
        name = question.auth_key.split("_")[1]
        self.asked.append(name)
        self.before_answer()
        return tuple(Principal("alice", "client", {}, f"id-{name}", self.expires_at))


def key_of(name: str) -> str:
    return f"tw_{name}_secret"


def keeper(bus: Any, *, cache_s: float = 60.0, now_ms: int = NOW_MS, backend: Any = None) -> Gatekeeper:
    backend = backend or FakeBackend(fakeredis.FakeServer(), Keys("dev", 1))
    return Gatekeeper(backend, bus, lambda: "g1", lambda: now_ms, cache_s)


async def test_an_answer_is_used_again_for_its_own_key_alone() -> None:
    bus = Authorizers()
    gatekeeper = keeper(bus)
    first = await gatekeeper.authorize(key_of("a"))
    assert await gatekeeper.authorize(key_of("a")) == first
    await gatekeeper.authorize(key_of("b"))
    assert bus.asked == ["a", "b"]


async def test_an_answer_is_used_again_for_a_time() -> None:
    bus = Authorizers()
    gatekeeper = keeper(bus, cache_s=0.0)
    for _ in range(2):
        await gatekeeper.authorize(key_of("a"))
    assert bus.asked == ["a", "a"]


async def test_a_cached_answer_ends_with_its_key() -> None:
    now_ms = [NOW_MS]
    bus: Any = Authorizers(expires_at=NOW_MS + 1)
    gatekeeper = Gatekeeper(
        FakeBackend(fakeredis.FakeServer(), Keys("dev", 1)), bus, lambda: "g1", lambda: now_ms[0], 60.0
    )
    await gatekeeper.authorize(key_of("a"))
    now_ms[0] += 1
    with pytest.raises(Unauthenticated, match="expired"):
        await gatekeeper.authorize(key_of("a"))
    assert bus.asked == ["a"]


async def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatekeeper_module, "MAX_CACHED", 2)
    bus = Authorizers()
    gatekeeper = keeper(bus)
    for key in "abcc":
        await gatekeeper.authorize(key_of(key))
    assert len(gatekeeper._cache) <= 2
    assert bus.asked == ["a", "b", "c"]


async def test_a_revocation_ends_the_cached_answer_and_tells_the_gateway() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 1)) as backend:
        bus, revoked = Authorizers(), list[str]()
        gatekeeper = keeper(bus, backend=backend)
        gatekeeper.on_revoked = revoked.append
        await backend.commands.xadd(backend.keys.revocations(), {"credential": "id-before"})
        await gatekeeper.start()
        following = asyncio.create_task(gatekeeper.run())
        try:
            await gatekeeper.authorize(key_of("a"))
            await gatekeeper.authorize(key_of("b"))
            await backend.commands.xadd(backend.keys.revocations(), {"credential": "id-a"})
            await wait_until(lambda: revoked, "the gatekeeper has read the revocation")
            with pytest.raises(Unauthenticated, match="revoked"):
                await gatekeeper.authorize(key_of("a"))
            await gatekeeper.authorize(key_of("b"))
            assert revoked == ["id-a"], "revocations from before the start are not announced"
            assert bus.asked == ["a", "b", "a"]
        finally:
            following.cancel()


async def test_an_answer_from_before_a_revocation_does_not_count() -> None:
    bus = Authorizers()
    gatekeeper = keeper(bus)
    bus.before_answer = lambda: gatekeeper._revoke("id-a")
    with pytest.raises(Unauthenticated, match="revoked"):
        await gatekeeper.authorize(key_of("a"))
    assert not gatekeeper._cache


async def test_a_revocation_is_remembered_for_longer_than_an_answer_takes() -> None:
    gatekeeper = keeper(Authorizers())
    gatekeeper._revoke("id-a")
    assert gatekeeper._revoked["id-a"] - time.monotonic() > 30


@pytest.mark.parametrize("auth_key", ["", "nonsense", "tw_a", "tw_a_é", "tw_a_" + "x" * 1_000_000])
async def test_what_has_no_form_of_a_key_is_refused_without_a_question(auth_key: str) -> None:
    bus = Authorizers()
    with pytest.raises(Unauthenticated):
        await keeper(bus).authorize(auth_key)
    assert not bus.asked
