"""redis-py's commands over a wire: what is sent, and the types of the answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from redis.asyncio import ConnectionPool

from tidewire.redis.client import WireClient


class AnsweringWire:
    """A wire that gives one answer to each command, and keeps the commands."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.sent: list[tuple[Any, ...]] = []

    async def calls(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        self.sent += commands
        return [self._answer]


def client_of(answer: Any) -> tuple[WireClient, list[tuple[Any, ...]]]:
    wire: Any = AnsweringWire(answer)
    return WireClient(wire, ConnectionPool()), wire.sent


async def test_a_command_of_two_words_is_sent_as_two() -> None:
    client, sent = client_of([])
    await client.xinfo_groups(b"stream")
    assert sent == [("XINFO", "GROUPS", b"stream")]


async def test_an_answer_has_the_type_that_the_client_documents() -> None:
    client, sent = client_of([b"1", b"2"])
    assert await client.time() == (1, 2)
    assert sent == [("TIME",)]


async def test_an_answer_without_a_type_of_its_own_is_that_of_the_server() -> None:
    client, sent = client_of(b"8")
    assert await client.hget("key", "field") == b"8"
    assert sent == [("HGET", "key", "field")]


async def test_pipelines_are_refused_since_they_would_take_another_connection() -> None:
    client, _ = client_of(b"")
    with pytest.raises(NotImplementedError, match="in one round trip"):
        client.pipeline()
