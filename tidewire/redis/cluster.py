"""A stage on a Redis Cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import hiredis
import structlog
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, ConnectionError, RedisError, ResponseError

from tidewire.redis.addresses import ClusterAddress
from tidewire.redis.backend import CONNECTING, SCAN_BATCH
from tidewire.redis.client import WireClient
from tidewire.redis.cluster_wire import Address, ClusterWire, Slots, epoch_of, ranges_of
from tidewire.redis.connection import reconnect_when_closed
from tidewire.redis.keys import Keys
from tidewire.redis.masters import MAX_LOOK_S, REPLACED, MasterWatch, break_connections
from tidewire.redis.wire import Wire, without_errors

log = structlog.get_logger(__name__)

TOPOLOGY = [hiredis.pack_command(("CLUSTER", what)) for what in ("SLOTS", "INFO")]  # type: ignore[arg-type]


class ClusterBackend(MasterWatch):
    """A stage on a Redis Cluster."""

    def __init__(self, address: ClusterAddress, keys: Keys) -> None:
        self._login: dict[str, Any] = {"username": address.username, "password": address.password}
        self._nodes: dict[Address, Redis] = {}
        self._lookouts: dict[Address, Wire] = {}
        self._order = list(address.nodes)  # the nodes to ask for the topology, the most recently successful one first
        self._epoch = 0  # of the freshest topology so far
        self._slots = Slots()
        self._cluster_wire = ClusterWire(self._slots, self._wire_to, self.doubt)
        super().__init__(self._node(address.nodes[0]), keys, self._cluster_wire)

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

    async def scan(self, pattern: bytes) -> AsyncIterator[bytes]:
        for address in self._slots.masters():
            node = WireClient(self._cluster_wire.at(address), self._node(address).connection_pool)
            async for key in node.scan_iter(pattern, count=SCAN_BATCH):
                yield key

    def _node(self, address: Address) -> Redis:
        if address not in self._nodes:
            node = Redis(host=address[0], port=address[1], **self._login, **CONNECTING)
            self._nodes[address] = reconnect_when_closed(node)
        return self._nodes[address]

    def _wire_to(self, address: Address) -> Wire:
        return Wire(self._node(address).connection_pool.make_connection)

    async def _look(self) -> None:
        """Ask one node after another for the topology, until one answers that is not behind.

        A master that hung and was replaced answers with the old topology until the other nodes have contacted it. Its
        epoch shows it: each failover raises the epoch of all who took part in it. Answers of a lower epoch than was
        seen before count only when most nodes give one: then the cluster was recreated.
        """
        behind: list[tuple[int, Address, Any]] = []
        refusal: RedisError | None = None
        for node in list(self._order):
            if node not in self._lookouts:
                self._lookouts[node] = self._wire_to(node)
            try:
                async with asyncio.timeout(MAX_LOOK_S):
                    slots, info = without_errors(await self._lookouts[node].once(TOPOLOGY))
            except (RedisError, OSError) as error:
                self._lookouts[node].lose("the node does not say which node has which slot")
                if isinstance(error, AuthenticationError | ResponseError):
                    refusal = error
                continue
            if (epoch := epoch_of(info)) < self._epoch:
                behind.append((epoch, node, slots))
                continue
            await self._believe(epoch, node, slots)
            return
        if 2 * len(behind) <= len(self._order):
            if refusal:
                raise NotACluster(str(refusal)) if "cluster support disabled" in str(refusal) else refusal
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
        for address in replaced:
            self._cluster_wire.lose(address, "the cluster has replaced this master")
            if node := self._nodes.get(address):
                break_connections(node)
        self._moved()


class NotACluster(ConnectionError):
    """The server answers, but is not in cluster mode."""
