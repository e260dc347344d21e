"""Connections to Redis: the errors of wrong addresses, and subscriptions that survive changes of nodes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable
from typing import Any

import fakeredis
import pytest
from redis.asyncio.cluster import RedisCluster
from redis.crc import key_slot

from tests.helpers import wait_until
from tidewire.errors import ConfigurationError
from tidewire.process.lag import Lag, total_lag
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import ConsumerGroup, Keys
from tidewire.testing import FakeBackend

_stages = itertools.count(1)


@pytest.fixture(params=["fakeredis", *(pytest.param(name, marks=pytest.mark.real) for name in ("real", "cluster"))])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """A stage of 8 partitions on each kind of server."""
    keys = Keys(f"b{next(_stages)}", 8)
    if request.param == "fakeredis":
        found: Backend = FakeBackend(fakeredis.FakeServer(), keys)
    else:
        found = await connect(request.getfixturevalue("server" if request.param == "real" else "cluster"), keys)
    async with found:
        yield found


class Listener:
    """The messages of a subscriber, by channel; None for each confirmation."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.received: dict[bytes, list[bytes | None]] = {}
        self.subscriber = backend.subscriber(lambda channel, data: self.received.setdefault(channel, []).append(data))

    async def publish(self, channel: bytes, *messages: bytes) -> None:
        command: Any = self.backend.commands.execute_command
        for message in messages:
            await command("SPUBLISH", channel, message)

    async def all_received(self, *messages: bytes, of: Iterable[bytes]) -> None:
        """Wait until exactly these messages of each channel have come."""
        await wait_until(
            lambda: all(self.messages_of(channel) == [*messages] for channel in of), f"{messages} have come"
        )

    async def subscribed(self, times: int, of: Iterable[bytes]) -> None:
        await wait_until(lambda: all(self.confirmed(channel) >= times for channel in of), "all are subscribed to")

    def messages_of(self, channel: bytes) -> list[bytes]:
        return [data for data in self.received.get(channel, []) if data is not None]

    def confirmed(self, channel: bytes) -> int:
        return self.received.get(channel, []).count(None)


@pytest.fixture
async def listener(backend: Backend) -> AsyncIterator[Listener]:
    found = Listener(backend)
    running = asyncio.create_task(found.subscriber.run())
    yield found
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def channels(backend: Backend) -> list[bytes]:
    """Of users of all partitions, and so at all nodes of a cluster."""
    return [backend.keys.user_feed(f"user{number}") for number in range(40)]


async def test_a_scan_finds_the_keys_of_all_nodes(backend: Backend) -> None:
    names = {backend.keys.commands(partition) for partition in range(backend.keys.partitions)}
    await backend.calls([("XADD", name, "*", "field", "value") for name in names])
    assert {name async for name in backend.scan(backend.keys.stage.encode() + b":*:commands")} == names


async def test_messages_of_a_channel_arrive_in_order_until_it_is_left(listener: Listener) -> None:
    wanted = channels(listener.backend)
    left, *kept = wanted
    for channel in wanted:
        await listener.subscriber.subscribe(channel)
    await listener.subscribed(1, of=wanted)
    for channel in wanted:
        await listener.publish(channel, b"1", b"2", b"3")
    await listener.all_received(b"1", b"2", b"3", of=wanted)
    await listener.subscriber.unsubscribe(left)
    for channel in wanted:
        await listener.publish(channel, b"4")
    await listener.all_received(b"1", b"2", b"3", b"4", of=kept)
    assert listener.messages_of(left) == [b"1", b"2", b"3"]
    await listener.subscriber.subscribe(left)
    await listener.subscribed(2, of=[left])
    await listener.publish(left, b"5")
    await listener.all_received(b"1", b"2", b"3", b"5", of=[left])


@pytest.mark.parametrize("backend", ["real", "cluster"], indirect=True)
async def test_after_a_lost_connection_each_channel_is_confirmed_again(listener: Listener) -> None:
    wanted = channels(listener.backend)
    for channel in wanted:
        await listener.subscriber.subscribe(channel)
    await listener.subscribed(1, of=wanted)
    for node in {listener.backend.node_of(channel) for channel in wanted}:
        await node.client_kill_filter(_type="pubsub")
    await listener.subscribed(2, of=wanted)
    for channel in wanted:
        await listener.publish(channel, b"after")
    await listener.all_received(b"after", of=wanted)


@pytest.mark.parametrize("backend", ["cluster"], indirect=True)
async def test_a_channel_follows_its_slot_to_another_node(listener: Listener, cluster: str) -> None:
    channel = b"moving:{%s}" % listener.backend.keys.stage.encode()
    slot = key_slot(channel)
    await listener.subscriber.subscribe(channel)
    await listener.subscribed(1, of=[channel])
    before = listener.backend.node_of(channel)
    host, _, port = cluster.removeprefix("redis+cluster://").partition(",")[0].partition(":")
    async with RedisCluster(host, int(port)) as client:
        primaries = client.get_primaries()
        home = client.nodes_manager.get_node_from_slot(slot)
        other = next(node for node in primaries if node != home)
        ids = {node.name: await node.execute_command("CLUSTER MYID") for node in primaries}
        try:
            for node in (other, home, *primaries):
                await node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[other.name])
            await listener.subscribed(2, of=[channel])
            assert listener.backend.node_of(channel) is not before
            await listener.publish(channel, b"after")
            await listener.all_received(b"after", of=[channel])
        finally:
            for node in (home, other, *primaries):
                await node.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[home.name])


@pytest.fixture
def wrong(server: str, cluster: str) -> list[tuple[str, str]]:
    """Wrong addresses, with and without a server, and the error of each."""
    hosts = cluster.removeprefix("redis+cluster://")
    return [
        (server.replace("redis://", "redis+cluster://"), "is not in cluster mode"),
        (f"redis://{hosts.split(',')[0]}", "name it as redis\\+cluster://"),
        (f"redis+cluster://nobody:secret@{hosts}", "check user and password"),
        ("redis+cluster://127.0.0.1:1,127.0.0.1:2", "does not answer .* is it running"),
        ("redis+cluster://no.such.host.invalid", "does not answer .* is it running"),
    ]


@pytest.mark.real
async def test_a_wrong_address_is_explained_in_one_sentence(wrong: list[tuple[str, str]]) -> None:
    for url, said in wrong:
        with pytest.raises(ConfigurationError, match=said) as refusal:
            await connect(url, Keys("wrong", 8))
        assert "secret" not in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.real
async def test_one_node_is_enough_to_find_the_others(cluster: str) -> None:
    async with await connect(cluster.split(",", maxsplit=1)[0], Keys("found", 8)) as backend:
        assert len({backend.node_of(channel) for channel in channels(backend)}) == 3


async def test_the_lag_of_a_group_is_what_it_has_not_read_in_all_partitions(backend: Backend) -> None:
    keys = backend.keys
    assert await total_lag(backend, ConsumerGroup.STORE) == Lag(0, 0), "no stream yet"
    for partition, count in ((0, 2), (1, 3)):
        await backend.ensure_group(keys.commands(partition), ConsumerGroup.STORE)
        await backend.calls([("XADD", keys.commands(partition), "*", "r", b"")] * count)
    await backend.read_group(keys.commands(1), ConsumerGroup.STORE, "worker", 1)
    assert await total_lag(backend, ConsumerGroup.STORE) == Lag(4, 1)
    assert await total_lag(backend, ConsumerGroup.BROADCASTER) == Lag(0, 0)
