"""The private parts of redis-py that Tidewire uses. pyproject.toml caps redis-py; a new version is tried here first."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from redis._parsers import AsyncCommandsParser
from redis._parsers.base import BaseParser
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode, NodesManager, RedisCluster
from redis.asyncio.connection import AbstractConnection, Connection

PARTS: list[tuple[type, str, str]] = [
    (AbstractConnection, "_reader", "tidewire/redis/wire.py takes the stream of an open connection over"),
    (AbstractConnection, "_writer", "tidewire/redis/wire.py and masters.py take over, or abort, its transport"),
    (ConnectionPool, "_available_connections", "tidewire/redis/masters.py breaks all connections of a pool"),
    (ConnectionPool, "_in_use_connections", "tidewire/redis/masters.py breaks all connections of a pool"),
    (ClusterNode, "_connections", "tidewire/redis/cluster.py breaks the connections to a replaced master"),
    (NodesManager, "nodes_cache", "tidewire/redis/cluster.py hands a new topology over"),
    (NodesManager, "slots_cache", "tidewire/redis/cluster.py hands a new topology over"),
    (NodesManager, "default_node", "tidewire/redis/cluster.py replaces a default node that has failed"),
    (NodesManager, "connection_kwargs", "tidewire/redis/cluster.py adds nodes"),
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
        (RedisCluster, "replace_default_node"),
        (AsyncCommandsParser, "initialize"),
        (AsyncCommandsParser, "get_keys"),
        (PubSub, "connect"),
        (PubSub, "on_connect"),
        (PubSub, "execute_command"),
        (PubSub, "_reconnect"),
    ],
)
def test_a_method_that_we_call_or_override_is_still_there(owner: type, method: str) -> None:
    assert callable(getattr(owner, method, None)), f"redis-py has changed: {owner.__name__}.{method}"


def test_a_subscriber_knows_its_pool() -> None:
    client = Redis()
    assert PubSub(client.connection_pool).connection is None
