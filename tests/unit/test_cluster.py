"""Commands of a cluster: which node gets them, and what becomes of them when a slot is elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, ConnectionError, MovedError, ResponseError, TryAgainError

from tidewire.redis import cluster_wire as cluster
from tidewire.redis.addresses import ClusterAddress
from tidewire.redis.cluster import ClusterBackend
from tidewire.redis.cluster_wire import Address, ClusterWire, Slots, epoch_of, key_of, ranges_of
from tidewire.redis.keys import Keys

A, B = ("a", 1), ("b", 2)


class FakeWire:
    """A fake node: answers each command from a list, or by a function."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers_left = answers
        self.got: list[bytes] = []

    async def once(self, packed: list[bytes]) -> list[Any]:
        self.got += packed
        found = [self.answers_left.pop(0) if self.answers_left else b"OK" for _ in packed]
        if isinstance(found[0], ConnectionError):
            raise found[0]
        return found


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ClusterWire, dict[Address, FakeWire], list[int]]]:
    async def no_pause(number: int) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(cluster, "pause", no_pause)

    def made(**answers: list[Any]) -> tuple[ClusterWire, dict[Address, FakeWire], list[int]]:
        wires = {A: FakeWire(answers.get("a", [])), B: FakeWire(answers.get("b", []))}
        slots, doubts = Slots(), list[int]()
        slots.learn([(0, 16383, A)])
        to: Any = wires.__getitem__
        return ClusterWire(slots, to, lambda: doubts.append(1)), wires, doubts

    return made


SLOT = key_slot(b"k")
GET = ("GET", b"k")


async def test_a_slot_that_moved_is_followed_and_remembered(nodes: Any) -> None:
    wire, wires, doubts = nodes(a=[MovedError(f"{SLOT} b:2")], b=[b"1", b"2"])
    assert await wire.calls([GET]) == [b"1"]
    assert await wire.calls([GET]) == [b"2"]
    assert len(wires[A].got) == 1
    assert doubts, "other slots may have moved too"


async def test_a_migrating_slot_is_asked_for_at_the_node_that_has_the_key(nodes: Any) -> None:
    wire, wires, _ = nodes(a=[b"1", AskError(f"{SLOT} b:2")], b=[b"OK", b"2"])
    assert await wire.calls([GET, ("GET", b"{k}2")]) == [b"1", b"2"]
    assert wires[B].got[0] == cluster.ASKING
    assert (await wire.calls([GET])) == [b"OK"], "the slot is still the first one's"
    assert len(wires[A].got) == 3


@pytest.mark.parametrize(
    "error", [TryAgainError("later"), ClusterDownError("down"), ConnectionError("gone")], ids=["try", "down", "gone"]
)
async def test_a_node_that_cannot_answer_now_is_tried_again_and_doubted(nodes: Any, error: Exception) -> None:
    wire, _, doubts = nodes(a=[error, error, b"1"])
    assert await wire.calls([GET]) == [b"1"]
    assert len(doubts) == 2


async def test_an_error_that_lasts_is_raised(nodes: Any) -> None:
    wire, wires, _ = nodes(a=[ClusterDownError("down")] * 100)
    with pytest.raises(ClusterDownError):
        await wire.calls([GET])
    assert len(wires[A].got) == cluster.MAX_TRIES


async def test_a_command_that_fails_is_not_repeated_with_the_others(nodes: Any) -> None:
    wrong = ResponseError("WRONGTYPE")
    wire, wires, _ = nodes(a=[wrong, TryAgainError("later"), b"2"])
    assert await wire.answers([GET, GET]) == [wrong, b"2"]
    assert len(wires[A].got) == 3


async def test_commands_with_one_key_are_repeated_together(nodes: Any) -> None:
    wire, wires, _ = nodes(a=[TryAgainError("later"), 0, b"1", 1])
    assert await wire.answers([GET, ("WAIT", 1, 100)], b"k") == [b"1", 1]
    assert len(wires[A].got) == 4, "WAIT counts for the connection that wrote"


async def test_commands_of_several_slots_get_their_answers_in_order(nodes: Any) -> None:
    slots = Slots()
    slots.learn([(0, 8191, A), (8192, 16383, B)])
    wires: dict[Address, Any] = {A: FakeWire([b"a1", b"a2"]), B: FakeWire([b"b1"])}
    low, high = (next(k for k in (b"%d" % n for n in range(99)) if (key_slot(k) > 8191) == up) for up in (False, True))
    wire = ClusterWire(slots, wires.__getitem__, lambda: None)
    assert await wire.calls([("GET", low), ("GET", high), ("GET", low)]) == [b"a1", b"b1", b"a2"]


def test_a_master_without_slots_was_replaced_and_one_that_gave_some_away_was_not() -> None:
    slots = Slots()
    assert slots.learn([(0, 8191, A), (8192, 16383, B)]) == set()
    assert slots.learn([(0, 100, B), (101, 8191, A), (8192, 16383, B)]) == set()
    assert slots.learn([(0, 16383, B)]) == {A}
    assert slots.learn([(0, 100, B)]) == set(), "what nobody claims for a moment stays where it was"
    assert slots.master_of(16383) == B
    with pytest.raises(ConnectionError, match="slot 5"):
        Slots().master_of(5)


def test_a_node_without_a_name_has_the_address_that_was_asked() -> None:
    answer = [
        [0, 5, [b"", 1, b"id", {}], [b"r", 9, b"id", {}]],
        [6, 9, [b"host", 2, b"id"]],
        [10, 11, [None, 3, b"id"]],
    ]
    assert list(ranges_of(answer, ("asked", 7))) == [
        (0, 5, ("asked", 1)),
        (6, 9, ("host", 2)),
        (10, 11, ("asked", 3)),
    ]


@pytest.mark.parametrize(
    "command",
    [
        ("GET", b"k"),
        ("FCALL", "f", 2, b"k", b"l", b"arg"),
        ("XREAD", "COUNT", 1, "BLOCK", 1000, "STREAMS", b"k", "0-0"),
        ("XREADGROUP", "GROUP", "g", "c", "STREAMS", b"k", ">"),
        ("XINFO", "STREAM", b"k"),
        ("MEMORY", "USAGE", b"k"),
    ],
)
def test_the_key_of_a_command_is_found(command: tuple[Any, ...]) -> None:
    assert key_of(command) == b"k"


class Node:
    """A fake node that names the master of all slots and its epoch. It is silent without an epoch."""

    def __init__(self, master: Address, epoch: int | None) -> None:
        self.master = master
        self.epoch = epoch

    async def once(self, packed: list[bytes]) -> list[Any]:
        if self.epoch is None:
            raise ConnectionError("it hangs")
        host, port = self.master
        return [
            [[0, 16383, [host.encode(), port, b"id"]]],
            b"cluster_state:ok\r\ncluster_current_epoch:%d\r\n" % self.epoch,
        ]

    def lose(self, why: str) -> None:
        """Nothing is open."""


async def test_a_node_that_has_missed_a_failover_is_not_believed() -> None:
    nodes = {A: Node(A, 5), B: Node(A, 5)}
    backend = ClusterBackend(ClusterAddress([A, B], None, None), Keys("test", 8))
    backend._lookouts = nodes  # type: ignore[assignment]
    await backend._look()
    assert backend._slots.master_of(0) == A
    nodes[A].epoch, nodes[B].master, nodes[B].epoch = None, B, 6
    await backend._look()
    assert backend._slots.master_of(0) == B, "the other one tells of the failover"
    nodes[A].epoch, nodes[B].epoch = 5, None
    with pytest.raises(ConnectionError):
        await backend._look()
    assert backend._slots.master_of(0) == B, "one of two nodes is behind, and the other one silent"
    nodes[B].epoch = 6
    backend._order = [A, B]
    await backend._look()
    assert backend._slots.master_of(0) == B, "the old master answers again, and knows nothing of it"
    nodes[A].epoch = nodes[B].epoch = 1
    nodes[A].master = nodes[B].master = A
    await backend._look()
    assert backend._slots.master_of(0) == A, "all nodes agree on a lower epoch: it is another cluster"


def test_the_epoch_of_a_node_is_found() -> None:
    assert epoch_of(b"cluster_enabled:1\r\ncluster_current_epoch:12\r\ncluster_my_epoch:3\r\n") == 12
    assert epoch_of(b"cluster_enabled:1\r\n") == 0


async def test_a_library_is_loaded_at_the_master_that_has_replaced_another_meanwhile() -> None:
    wires: dict[Address, Any] = {A: FakeWire([ConnectionError("it hangs")]), B: FakeWire([b"tidewire"])}
    slots = Slots()
    slots.learn([(0, 16383, A)])

    def replaced() -> None:
        slots.learn([(0, 16383, B)])

    wire = ClusterWire(slots, wires.__getitem__, replaced)
    assert await wire.function_load("code") == b"tidewire"
    assert (len(wires[A].got), len(wires[B].got)) == (1, 1)


async def test_a_library_that_a_master_refuses_is_an_error() -> None:
    wires: dict[Address, Any] = {A: FakeWire([b"tidewire"]), B: FakeWire([ResponseError("ERR syntax")])}
    slots = Slots()
    slots.learn([(0, 8191, A), (8192, 16383, B)])
    with pytest.raises(ResponseError, match="syntax"):
        await ClusterWire(slots, wires.__getitem__, lambda: None).function_load("code")


async def test_a_library_is_tried_again_where_it_was_refused_for_a_moment(nodes: Any) -> None:
    wire, wires, doubts = nodes(a=[ConnectionError("gone"), b"tidewire"])
    assert await wire.function_load("code") == b"tidewire"
    assert (len(wires[A].got), len(wires[B].got), len(doubts)) == (2, 0, 1)


def test_a_command_about_the_keys_of_one_node_is_refused() -> None:
    with pytest.raises(ValueError, match="one node"):
        key_of(("SCAN", 0))
