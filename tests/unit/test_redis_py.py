"""The private parts of redis-py that Tidewire uses. pyproject.toml caps redis-py; a new version is tried here first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from redis._parsers.base import BaseParser
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection, Connection

PARTS: list[tuple[type, str, str]] = [
    (AbstractConnection, "_reader", "tidewire/redis/wire.py takes the stream of an open connection over"),
    (AbstractConnection, "_writer", "tidewire/redis/wire.py and masters.py take over, or abort, its transport"),
    (ConnectionPool, "_available_connections", "tidewire/redis/masters.py breaks all connections of a pool"),
    (ConnectionPool, "_in_use_connections", "tidewire/redis/masters.py breaks all connections of a pool"),
]


@pytest.mark.parametrize(("owner", "attribute", "use"), PARTS, ids=[f"{o.__name__}.{a}" for o, a, _ in PARTS])
def test_an_attribute_that_we_use_is_still_set(owner: type, attribute: str, use: str) -> None:
    assert f"self.{attribute}" in inspect.getsource(owner), f"redis-py has changed: {use}"


def test_a_connection_keeps_its_host_and_port() -> None:
    connection = Connection(host="127.0.0.1", port=1)
    assert (connection.host, connection.port) == ("127.0.0.1", 1)


def test_a_parser_makes_exceptions_of_error_replies() -> None:
    parser: Any = BaseParser

    assert type(parser.parse_error("MOVED 1 127.0.0.1:2")).__name__ == "MovedError"


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (PubSub, "connect"),
        (PubSub, "on_connect"),
        (PubSub, "execute_command"),
        (PubSub, "_reconnect"),
    ],
)
def test_a_method_that_we_call_or_override_is_still_there(owner: type, method: str) -> None:
    assert callable(getattr(owner, method, None)), f"redis-py has changed: {owner.__name__}.{method}"


def test_a_client_finds_the_type_of_an_answer_by_the_name_of_its_command() -> None:
    callbacks: Any = Redis().response_callbacks
    assert callbacks["TIME"]([b"1", b"2"]) == (1, 2), "tidewire/redis/client.py converts the answers of a wire"
    assert "XINFO GROUPS" in callbacks


def test_a_subscriber_knows_its_pool() -> None:
    client = Redis()
    assert PubSub(client.connection_pool).connection is None
