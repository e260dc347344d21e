"""Every Redis key and channel. They are made only here.

A key is `<stage>:{pN}:<kind>…`. The hash tag keeps all keys of a partition in one cluster slot, so that one function
call can use them together. Keys of no partition have tags of their own.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tidewire.model.values import Scalar, name_of, text_of


def _index_name(table: str, attributes: tuple[str, str]) -> bytes:
    return f"{table}.{attributes[0]}.{attributes[1]}".encode()


class Home(NamedTuple):
    """The first keys of the functions on links and feeds."""

    partition: bytes
    changes: bytes
    links: bytes
    feeds: bytes
    """Hash: the states of the open feeds, by the key of their stream."""
    bodies: bytes
    """Hash: large bodies by id, which entries of feeds refer to."""
    references: bytes
    """Hash: the expiry of each body, and how many entries refer to it."""


class ConsumerGroup(StrEnum):
    """The consumer groups."""

    STORE = "store"
    """Reads the commands of each partition."""
    INDEXER = "indexer"
    """Reads the changes of each partition, in the stores, while a table has an index."""
    BROADCASTER = "broadcaster"
    """Reads the changes of each partition."""
    AUTHORIZER = "authorizer"
    """Reads the stage's authorizations."""


class ServiceKind(StrEnum):
    """The kinds of services, as the registry lists them."""

    STORE = "store"
    BROADCASTER = "broadcaster"
    AUTHORIZER = "authorizer"
    GATEWAY = "gateway"


class PartitionField(StrEnum):
    """The fields of a partition's hash (`Keys.partition`). The first group belongs to the Lua functions."""

    GENERATION = "generation"
    """Number of the partition's history. A new one begins when the server may have lost writes."""
    SERVER = "server"
    """Replication id of the server that the generation is of."""
    LOSSES = "fell"
    """Where the changes ended at each loss: "<generation after it> <ms> <seq> …", the newest last."""
    ALONE = "alone"
    """Generation of the last loss on a cluster, where one master can lose writes alone."""
    FEEDS = "feeds"
    """Epoch up to which feeds are reset when they are next used."""
    NEWEST = "newest"
    """Highest epoch of a feed that was given out."""

    FLOOR = "floor"
    """Store: versions of new items begin above it."""
    EXPIRES = "expires"
    """Store: the attribute by which each table's items are noted as expiring, packed."""
    INDEXED = "indexed"
    """Indexer: the last change that it followed, and what it knows of its destinations, packed."""
    PASSED = "passed"
    """Broadcaster: id of the last change that it passed on."""
    UNKNOWN = "unknown"
    """Broadcaster: tables whose changes it passed without knowing them, packed."""
    REPAIR = "repair"
    """Broadcaster: "1" while a repair is in progress."""


class LeaseField(StrEnum):
    """The fields of a lease (`Keys.lease`). All belong to the Lua functions."""

    OWNER = "owner"
    """Id of the process that has the lease, or had it last."""
    EXPIRES = "expires"
    """When the lease ends unless it is renewed, in ms; "0" after a release."""
    EPOCH = "epoch"
    """Number of the ownership, which only grows. A former owner is refused by it."""
    CALL = "call"
    """Number of the last commit of this ownership. A repeated commit does nothing."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one stage."""

    stage: str
    partitions: int

    def partition_of(self, value: Scalar) -> int:
        """Return the partition of a value: its CRC16, as Redis Cluster computes it, modulo the number of partitions."""
        return binascii.crc_hqx(text_of(value), 0) % self.partitions

    # ── of a partition ──────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, partition: int, kind: bytes) -> bytes:
        return b"%s:{p%d}:%s" % (self.stage.encode(), partition, kind)

    def home(self, partition: int) -> Home:
        kinds = (b"feeds", b"bodies", b"references")
        return Home(
            self.partition(partition),
            self.changes(partition),
            self.links(partition),
            *(self._of(partition, kind) for kind in kinds),
        )

    def home_of(self, key: bytes) -> Home:
        """Return the home of the partition that a key belongs to."""
        return self.home(self.partition_at(key))

    def partition_at(self, key: bytes) -> int:
        """Return the partition that a key belongs to."""
        return int(key[key.index(b"{p") + 2 : key.index(b"}")])

    def partition(self, partition: int) -> bytes:
        """Hash: the state of the partition itself. Its fields are those of `PartitionField`."""
        return self._of(partition, b"partition")

    def lease(self, partition: int, group: str) -> bytes:
        """Hash: owner, expiry and epoch of the lease of a partition for a group."""
        return self._of(partition, b"lease:" + group.encode())

    def commands(self, partition: int) -> bytes:
        """Stream: the commands for the store."""
        return self._of(partition, b"commands")

    def sent(self, stream: bytes, sender: str) -> bytes:
        """String with a TTL: number of a sender's last call to a stream, and how many records it added."""
        return stream + b":sent:" + sender.encode()

    def changes(self, partition: int) -> bytes:
        """Stream: the changes, in order."""
        return self._of(partition, b"changes")

    def links(self, partition: int) -> bytes:
        """Hash: the state of the link from each source."""
        return self._of(partition, b"links")

    def items(self, table: str, value: Scalar) -> bytes:
        """Hash: sort bytes to item record, for one partition-key value."""
        return self._of(self.partition_of(value), b"items:%s:%s" % (table.encode(), name_of(value)))

    def order(self, table: str, value: Scalar) -> bytes:
        """Sorted set, by bytes: the sort keys of the live items of one partition-key value."""
        return self._of(self.partition_of(value), b"order:%s:%s" % (table.encode(), name_of(value)))

    def values(self, partition: int, table: str) -> bytes:
        """Sorted set, by bytes: the partition-key values with items or tombstones, as `name_of` writes them."""
        return self._of(partition, b"values:" + table.encode())

    def tombstones(self, partition: int) -> bytes:
        """Sorted set: keys of deleted items whose version is remembered, by time of deletion in ms."""
        return self._of(partition, b"tombstones")

    def expiries(self, partition: int) -> bytes:
        """Sorted set: keys of items that expire, by expiry in seconds since 1970."""
        return self._of(partition, b"expiries")

    def index(self, table: str, attributes: tuple[str, str], value: Scalar) -> tuple[bytes, bytes]:
        """Hash: entry's bytes to item record. Sorted set: the entries in order. Both for one value of an index."""
        name = _index_name(table, attributes) + b":" + name_of(value)
        partition = self.partition_of(value)
        return self._of(partition, b"index:" + name), self._of(partition, b"indexorder:" + name)

    def index_pattern(self, table: str, attributes: tuple[str, str]) -> bytes:
        """Pattern for SCAN of the hashes of an index in all partitions.

        It also matches others, which `is_index` excludes.
        """
        name = _index_name(table, attributes)
        return b"%s:{p*}:index:%s:*" % (self.stage.encode(), re.sub(rb"([][*?\\^])", rb"\\\1", name))

    def is_index(self, key: bytes, table: str, attributes: tuple[str, str]) -> bool:
        """Whether a key is the hash of a value of that index."""
        name = _index_name(table, attributes)
        return bool(re.match(rb"%s:\{p\d+\}:index:%s:" % (re.escape(self.stage.encode()), re.escape(name)), key))

    def indexes(self, partition: int) -> bytes:
        """Hash: how far each index is filled from the items of this partition."""
        return self._of(partition, b"indexes")

    def last_number(self, partition: int, gateway: str) -> bytes:
        """String with a TTL: number of the last command that was done for a gateway."""
        return self._of(partition, b"last_number:" + gateway.encode())

    def request(self, partition: int, user: str, request: str) -> bytes:
        """String with a TTL: the first reply to a request with a request id."""
        return self._of(partition, b"request:%s\0%s" % (user.encode(), request.encode()))

    def connected(self, partition: int, gateway: str) -> bytes:
        """Set: the connections of a gateway whose items are in this partition, for the sweep."""
        return self._of(partition, b"connected:" + gateway.encode())

    def members(self, membership: str, group: Scalar) -> bytes:
        """Hash: the members of a group, as of the last change that the broadcaster passed on."""
        return self._of(self.partition_of(group), b"members:%s:%s" % (membership.encode(), name_of(group)))

    def group_versions(self, partition: int) -> bytes:
        """Hash: the version of each group, by `group_field`: generation and id of its last change."""
        return self._of(partition, b"group-versions")

    def group_field(self, membership: str, group: Scalar) -> bytes:
        """Return the field of a group in `group_versions`."""
        return b"%s:%s" % (membership.encode(), name_of(group))

    def rechecks(self, partition: int) -> bytes:
        """Channel: users who may no longer be allowed to follow their topics, after a change of a membership."""
        return self._of(partition, b"rechecks")

    # ── feeds: the stream's key is its channel's name too, and its field in `Home.feeds` ────────────────────────────

    def user_feed(self, user: str) -> bytes:
        return self._feed(user, b"user")

    def topic_feed(self, topic: str) -> bytes:
        return self._feed(topic, b"topic")

    def _feed(self, name: str, kind: bytes) -> bytes:
        return self._of(self.partition_of(name), b"feed:%s:%s" % (kind, name.encode()))

    # ── of the stage ────────────────────────────────────────────────────────────────────────────────────────────────

    def _global(self, tag: bytes, kind: bytes) -> bytes:
        return b"%s:{%s}:%s" % (self.stage.encode(), tag, kind)

    def stage_settings(self) -> bytes:
        """Hash: the settings fixed when the stage was created, and whether it has credentials."""
        return self._global(b"stage", b"settings")

    def probe(self) -> bytes:
        """Channel without subscribers: publishing to it proves that the Redis user may use the stage's channels."""
        return self._global(b"stage", b"probe")

    def tables(self) -> bytes:
        """Hash: the tables, as the last store declared them."""
        return self._global(b"stage", b"tables")

    def applications(self) -> bytes:
        """Hash: digest of an application to the names of its tables and topics, while a live process runs it."""
        return self._global(b"stage", b"applications")

    def dependents(self) -> bytes:
        """Hash: table or topic to the memberships that its audience depends on."""
        return self._global(b"stage", b"dependents")

    def sort_kinds(self) -> bytes:
        """Hash: table to the kind of its sort keys, strings or numbers."""
        return self._global(b"stage", b"sort-kinds")

    def services(self) -> bytes:
        """Hash: the registrations of all processes."""
        return self._global(b"stage", b"services")

    def swept(self) -> bytes:
        """Hash with a TTL: gateways that were swept, with the time."""
        return self._global(b"stage", b"swept")

    def replies(self, gateway: str) -> bytes:
        """Stream with a TTL: the answers for one gateway."""
        return self._global(b"g-" + gateway.encode(), b"replies")

    def event_cursors(self, user: str, slot: int) -> bytes:
        """String with a TTL: the cursors that ids of a user's event streams refer to: their name and topics, packed."""
        return self._of(self.partition_of(user), b"event-cursors:%d:%s" % (slot, user.encode()))

    def user_connections(self, user: str) -> bytes:
        """Hash with a TTL: gateway to the number of a user's connections there."""
        return self._of(self.partition_of(user), b"user-connections:" + user.encode())

    def user_requests(self, user: str) -> bytes:
        """Hash with a TTL: gateway to the number of a busy user's requests there in the last second."""
        return self._of(self.partition_of(user), b"user-requests:" + user.encode())

    def orders(self, gateway: str) -> bytes:
        """Stream with a TTL: what other gateways order one to do with its connections."""
        return self._global(b"g-" + gateway.encode(), b"orders")

    def credentials(self) -> bytes:
        """Hash: id of an API key to its record."""
        return self._global(b"auth", b"credentials")

    def authorizations(self) -> bytes:
        """Stream: the questions of gateways to the authorizers."""
        return self._global(b"auth", b"authorizations")

    def revocations(self) -> bytes:
        """Stream: revoked credentials. Every gateway reads all of it."""
        return self._global(b"auth", b"revocations")
