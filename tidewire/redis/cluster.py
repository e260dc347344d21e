"""A stage on a Redis Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from typing import Any, cast

import hiredis
import structlog
from redis._parsers import AsyncCommandsParser
from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.cluster import PRIMARY, REPLICA
from redis.crc import key_slot
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    RedisClusterException,
    RedisError,
)

from tidewire.redis.addresses import ClusterAddress
from tidewire.redis.backend import COMMANDS, LISTENING
from tidewire.redis.cluster_wire import Address, ClusterWire, Slots, epoch_of, key_of, ranges_of
from tidewire.redis.connection import reconnect_when_closed, reconnect_when_closed_in_cluster
from tidewire.redis.keys import Keys
from tidewire.redis.masters import MAX_LOOK_S, REPLACED, MasterWatch, break_connections
from tidewire.redis.wire import Wire, without_errors

log = structlog.get_logger(__name__)

TOPOLOGY = [hiredis.pack_command(("CLUSTER", what)) for what in ("SLOTS", "INFO")]  # type: ignore[arg-type]


class ClusterBackend(MasterWatch):
    """A stage on a Redis Cluster."""

    def __init__(self, address: ClusterAddress, keys: Keys) -> None:
        self._login: dict[str, Any] = {"username": address.username, "password": address.password}
        self._client = _Client(address, COMMANDS)
        self._nodes: dict[Address, Redis] = {}
        self._lookouts: dict[Address, Wire] = {}
        self._order = list(address.nodes)  # the nodes to ask for the topology, the last one that answered first
        self._epoch = 0  # of the freshest topology so far
        self._slots = Slots()
        self._fanned = ClusterWire(self._slots, self._wire_to, self.doubt)
        # The cluster client has the same commands. Only its type is another one.
        client = cast(Redis, self._client)
        super().__init__(client, client, keys, fanned=self._fanned)

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        for lookout in self._lookouts.values():
            await lookout.aclose()
        for node in self._nodes.values():
            await node.aclose()

    def node_of(self, channel: bytes) -> Redis:
        return self._node(self._slots.master_of(key_slot(channel)))

    async def find_node_of(self, channel: bytes) -> Redis:
        await self._look()
        return self.node_of(channel)

    def _node(self, address: Address) -> Redis:
        if address not in self._nodes:
            node = Redis(host=address[0], port=address[1], **self._login, **LISTENING)
            self._nodes[address] = reconnect_when_closed(node)
        return self._nodes[address]

    def _wire_to(self, address: Address) -> Wire:
        return Wire(self._node(address).connection_pool.make_connection)

    async def _look(self) -> None:
        """Ask one node after another for the topology, until one answers that is not behind.

        A master that hung and was replaced answers with the topology of before, until the others have reached it. Its
        epoch shows it: each failover raises the epoch of all who took part in it. Answers of a lower epoch than was
        seen before count only when most nodes give one: then the cluster was made anew.
        """
        behind: list[tuple[int, Address, Any]] = []
        for node in list(self._order):
            if node not in self._lookouts:
                self._lookouts[node] = self._wire_to(node)
            try:
                async with asyncio.timeout(MAX_LOOK_S):
                    slots, info = without_errors(await self._lookouts[node].once(TOPOLOGY))
            except (RedisError, OSError):
                self._lookouts[node].lose("the node does not say which node has which slot")
                continue
            if (epoch := epoch_of(info)) < self._epoch:
                behind.append((epoch, node, slots))
                continue
            await self._believe(epoch, node, slots)
            return
        if 2 * len(behind) <= len(self._order):
            raise ConnectionError("no node of the cluster says which node has which slot")
        await self._believe(*max(behind, key=lambda answer: answer[0]))

    async def _believe(self, epoch: int, node: Address, slots: Any) -> None:
        self._epoch = epoch
        self._order.remove(node)
        self._order.insert(0, node)
        await self._learn(list(ranges_of(slots, node)))

    async def _learn(self, ranges: list[tuple[int, int, Address]]) -> None:
        before = self._slots.masters()
        replaced = self._slots.learn(ranges)
        self._order += self._slots.masters() - set(self._order)
        if not before or self._slots.masters() == before:
            return
        for address in replaced:
            REPLACED.inc()
            log.warning("master_replaced", host=address[0], port=address[1])
        self._client.follow(ranges, replaced)
        for address in replaced:
            self._fanned.lose(address, "the cluster has replaced this master")
            if node := self._nodes.get(address):
                break_connections(node)
        self._moved()


class _Client(RedisCluster):
    """redis-py's cluster client.

    All its errors are RedisErrors, and it finds the keys of our calls without asking a server.
    """

    def __init__(self, address: ClusterAddress, options: dict[str, Any]) -> None:
        super().__init__(
            startup_nodes=[ClusterNode(host, port) for host, port in address.nodes],
            username=address.username,
            password=address.password,
            # redis-py notes a slot that moved. Reading the whole topology again would break the connections of all
            # calls in flight.
            reinitialize_steps=0,
            **options,
        )
        self.commands_parser = _KeyFinder()
        reconnect_when_closed_in_cluster(self)

    async def initialize(self, *args: Any, **kwargs: Any) -> RedisCluster:
        try:
            return await super().initialize(*args, **kwargs)
        except RedisClusterException as error:
            cause = error.__cause__
            if isinstance(cause, AuthenticationError):
                raise cause from None
            if isinstance(cause, RedisClusterException):
                raise NotACluster(str(cause)) from None
            raise ConnectionError(str(cause or error)) from None

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().execute_command(*args, **kwargs)
        except RedisClusterException as error:
            raise ConnectionError(str(error)) from None

    def follow(self, ranges: Iterable[tuple[int, int, Address]], replaced: Collection[Address]) -> None:
        """Take over a new topology at once. redis-py would ask for it only after a command has failed."""
        manager: Any = self.nodes_manager
        for low, high, (host, port) in ranges:
            name = f"{host}:{port}"
            node = manager.nodes_cache.setdefault(name, ClusterNode(host, port, **manager.connection_kwargs))
            node.server_type = PRIMARY
            for slot in range(low, high + 1):
                if manager.slots_cache.get(slot, [None])[0] != node:
                    manager.slots_cache[slot] = [node]
        for host, port in replaced:
            if node := manager.nodes_cache.get(f"{host}:{port}"):
                node.server_type = REPLICA
                for connection in node._connections:
                    if connection._writer is not None:
                        connection._writer.transport.abort()
                if manager.default_node == node:
                    self.replace_default_node()


class _KeyFinder(AsyncCommandsParser):
    """Finds the keys of a command without a server.

    redis-py asks one for its table of commands when it connects, and for the keys of each FCALL. A master that hangs
    would keep a process from starting.
    """

    async def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is asked."""

    async def get_keys(self, *args: Any) -> Any:
        match str(args[0]).upper():
            case "FCALL" | "FCALL_RO":
                return args[3 : 3 + int(args[2])]
            case "XREAD" | "XREADGROUP":
                streams = args[args.index(b"STREAMS") + 1 :]
                return streams[: len(streams) // 2]
        return (key_of(args),)


class NotACluster(ConnectionError):
    """The server answers, but is not in cluster mode."""
