"""Which topics a connection follows by itself, and which others a user may follow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tidewire import App, claim, everyone, nobody, user
from tidewire.audiences import claim_topic
from tidewire.errors import NotFound, PermissionDenied
from tidewire.model.records import Principal
from tidewire.services.gateway.topics import Topics


def make_app() -> App:
    app = App("test")
    rooms = app.membership("members", group="room", member="user", readers=nobody, writers=nobody)
    app.table("news", key="id", readers=everyone, writers=nobody)
    app.table("mail", key="id", readers=user("to"), writers=nobody)
    app.table("offers", key="id", readers=claim("tenant"), writers=nobody)
    app.topic("weather:{city}", followers=everyone)
    app.topic("room:{room}", followers=rooms.of("room"))
    return app


def principal(**claims: Any) -> Principal:
    return Principal("alice", "client", claims, "k1", None)


async def refuse(_: Principal, topic: str) -> None:
    raise PermissionDenied(f"not {topic}")


async def never(*_: object) -> None:
    raise AssertionError("the store is not needed for this topic")


def test_every_connection_follows_the_tables_of_everyone_and_its_claims() -> None:
    granted = Topics(make_app(), never).granted(principal(tenant="acme", team="red"))
    assert granted == {"news", claim_topic("tenant", "acme")}


def test_a_function_as_readers_may_return_any_audience() -> None:
    app = App("test")
    app.table("posts", key="id", readers=lambda item: everyone, writers=nobody)
    granted = Topics(app, never).granted(principal(tenant="acme", team=["red"]))
    assert granted == {"posts", claim_topic("tenant", "acme")}, "a list is no value of a topic"


@pytest.mark.parametrize(
    ("readers", "expected"),
    [
        (everyone | user("to"), {"notes"}),
        (everyone & user("to"), set()),
        (everyone & claim("tenant"), {claim_topic("tenant", "acme")}),
        (claim("tenant") & user("to"), set()),
        (claim("tenant") | user("to"), {claim_topic("tenant", "acme")}),
        (claim("tenant") & claim("team"), {claim_topic("tenant", "acme"), claim_topic("team", "red")}),
        (nobody, set()),
    ],
)
def test_combined_readers_grant_the_topics_that_can_reach_a_connection(readers: Any, expected: set[str]) -> None:
    app = App("test")
    app.table("notes", key="id", readers=readers, writers=nobody)
    assert Topics(app, never).granted(principal(tenant="acme", team="red")) == expected


def test_a_topic_of_everyone_needs_no_question_to_the_store() -> None:
    topics = Topics(make_app(), never)
    assert topics.open_to_all("weather:oslo")
    for topic in ("weather:oslo", "news", claim_topic("tenant", "acme")):
        asyncio.run(topics.check(principal(tenant="acme"), topic))


def test_the_store_decides_about_topics_of_groups() -> None:
    topics = Topics(make_app(), refuse)
    assert not topics.open_to_all("room:r1")
    with pytest.raises(PermissionDenied, match="not room:r1"):
        asyncio.run(topics.check(principal(), "room:r1"))


def test_an_unknown_topic_is_not_found() -> None:
    topics = Topics(make_app(), never)
    assert not topics.open_to_all("sports")
    with pytest.raises(NotFound, match="no topic 'sports'"):
        asyncio.run(topics.check(principal(), "sports"))


def test_a_claim_that_the_user_does_not_have_is_not_found() -> None:
    with pytest.raises(NotFound):
        asyncio.run(Topics(make_app(), never).check(principal(tenant="acme"), claim_topic("tenant", "other")))
