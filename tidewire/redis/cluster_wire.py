"""Commands on a Redis Cluster: the master of each slot, and one `Wire` to each node."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import hiredis
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    MovedError,
    TimeoutError,
    TryAgainError,
)

from tidewire.redis.wire import Wire, pause, without_errors

SLOTS = 16384
MAX_TRIES = 10
"""Maximum attempts of one call; the pauses between them are three to seven seconds in all, because a failover takes
longer than a restart."""
ASKING = hiredis.pack_command((b"ASKING",))

Address = tuple[str, int]
"""Host and port of a node."""


class Slots:
    """The address of each slot's master, as the cluster last reported it. No I/O."""

    def __init__(self) -> None:
        self._masters: list[Address | None] = [None] * SLOTS

    def master_of(self, slot: int) -> Address:
        """Return the master of a slot. Raises ConnectionError while none is known."""
        found = self._masters[slot]
        if found is None:
            raise ConnectionError(f"no node of the cluster is known to have slot {slot}")
        return found

    def masters(self) -> set[Address]:
        return {address for address in self._masters if address}

    def moved(self, slot: int, to: Address) -> None:
        """Adopt the address in a MOVED answer."""
        self._masters[slot] = to

    def learn(self, ranges: Iterable[tuple[int, int, Address]]) -> set[Address]:
        """Adopt (first slot, last slot, master) of all slots.

        Returns the addresses that have lost all their slots.
        """
        before = self.masters()
        masters: list[Address | None] = [None] * SLOTS
        for low, high, address in ranges:
            masters[low : high + 1] = [address] * (high + 1 - low)
        # A slot that no node claims at the moment stays where it was: there is no better node to ask.
        self._masters = [new or old for new, old in zip(masters, self._masters, strict=True)]
        return before - self.masters()


def ranges_of(answer: Sequence[Any], node: Address) -> Iterator[tuple[int, int, Address]]:
    """Yield the ranges of a CLUSTER SLOTS answer. A node without a host is at the host that was asked."""
    for low, high, (host, port, *_), *_ in answer:
        name = (host or b"").decode()
        yield int(low), int(high), (name if name and name != "?" else node[0], int(port))


def epoch_of(info: bytes) -> int:
    """Return the epoch of a CLUSTER INFO answer: the highest one that the node knows. It grows with each failover."""
    found = re.search(rb"^cluster_current_epoch:(\d+)", info, re.MULTILINE)
    return int(found[1]) if found else 0


def key_of(command: Sequence[Any]) -> Any:
    """Return the first key of a command. A command without keys may go to any node.

    Raises ValueError for a command that concerns the keys of all nodes.
    """
    match str(command[0]).upper():
        case "INFO" | "PING" | "TIME":
            return b""
        case "SCAN" | "KEYS" as name:
            raise ValueError(f"{name} sees the keys of one node: Backend.scan asks all of them")
        case "FCALL" | "FCALL_RO":
            return command[3]
        case "XREAD" | "XREADGROUP":
            return command[command.index("STREAMS") + 1]
        case "XGROUP" | "XINFO" | "MEMORY" | "OBJECT":
            return command[2]
    return command[1]


class ClusterWire:
    """Sends each command to the node that has its key. Commands of one slot leave in the order of the calls.

    `doubt` is called when a node cannot be reached, because the topology may have changed.
    """

    def __init__(self, slots: Slots, wire_to: Callable[[Address], Wire], doubt: Callable[[], None]) -> None:
        self._slots = slots
        self._wire_to = wire_to
        self._doubt = doubt
        self._wires: dict[Address, Wire] = {}

    def another(self) -> ClusterWire:
        """Return another wire, whose commands do not wait for those of this one."""
        return ClusterWire(self._slots, lambda address: self.at(address).another(), self._doubt)

    async def calls(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Return the answers of all commands. Raises the first error when all are done."""
        return without_errors(await self.answers(commands))

    async def answers(self, commands: Iterable[tuple[Any, ...]], key: bytes | None = None) -> list[Any]:
        """Return the answers of all commands, with the servers' errors among them.

        With a key, all commands go over one connection to the node that has it, and are repeated together.
        """
        groups: dict[int, list[int]] = {}
        packed: list[bytes] = []
        for number, command in enumerate(commands):
            groups.setdefault(_slot(key_of(command) if key is None else key), []).append(number)
            packed.append(hiredis.pack_command(command))
        if len(groups) == 1:
            return await self._at(next(iter(groups)), packed, together=key is not None)
        found = await asyncio.gather(
            *(self._at(slot, [packed[number] for number in numbers]) for slot, numbers in groups.items())
        )
        answers: list[Any] = [None] * len(packed)
        for numbers, some in zip(groups.values(), found, strict=True):
            for number, answer in zip(numbers, some, strict=True):
                answers[number] = answer
        return answers

    async def fcall(self, function: str, numkeys: int, *keys_and_args: Any) -> Any:
        return (await self.calls((("FCALL", function, numkeys, *keys_and_args),)))[0]

    async def function_load(self, code: str, replace: bool = False) -> Any:
        """Load a library at every master. One that hangs is waited for only until another takes its place."""
        packed = [hiredis.pack_command(("FUNCTION", "LOAD", *(("REPLACE",) if replace else ()), code))]
        loaded: dict[Address, Any] = {}
        for number in itertools.count(1):
            lost: BaseException | None = None
            masters = list(self._slots.masters() - loaded.keys())
            found = await asyncio.gather(*(self.at(one).once(packed) for one in masters), return_exceptions=True)
            for master, answers in zip(masters, found, strict=True):
                if isinstance(answers, ConnectionError | TimeoutError | OSError):
                    lost = answers
                elif isinstance(answers, BaseException):
                    raise answers
                else:
                    loaded[master] = answers[0]
            if lost is None and self._slots.masters() <= loaded.keys():
                return without_errors([*loaded.values()])[0]
            if lost:
                self._doubt()
                if number == MAX_TRIES:
                    raise lost
                await pause(number)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def lose(self, address: Address, why: str) -> None:
        """Break the connections to a node. Their calls are repeated at the nodes that have the slots then."""
        if wire := self._wires.get(address):
            wire.lose(why)

    async def aclose(self) -> None:
        for wire in self._wires.values():
            await wire.aclose()

    def at(self, address: Address) -> Wire:
        """Return the wire to one node, for commands that are not about a key."""
        if address not in self._wires:
            self._wires[address] = self._wire_to(address)
        return self._wires[address]

    async def _at(self, slot: int, packed: list[bytes], *, together: bool = False) -> list[Any]:
        """Return the answers of commands with keys of one slot, wherever it is."""
        answers: list[Any] = [None] * len(packed)
        todo = list(range(len(packed)))
        for number in itertools.count(1):
            try:
                found = await self.at(self._slots.master_of(slot)).once([packed[one] for one in todo])
                for one, answer in zip(todo, found, strict=True):
                    answers[one] = await self._ask(answer, packed[one]) if _is_ask(answer) else answer
            except AuthenticationError:
                raise
            except (ConnectionError, TimeoutError, OSError):
                self._doubt()
                if number == MAX_TRIES:
                    raise
            else:
                todo = [one for one in todo if isinstance(answers[one], _ELSEWHERE_OR_LATER)]
                if not todo or number == MAX_TRIES:
                    return answers
                error = answers[todo[0]]
                todo = list(range(len(packed))) if together else todo
                if isinstance(error, MovedError):
                    self._slots.moved(slot, (error.host, int(error.port)))
                self._doubt()  # other slots may have moved with this one
                if isinstance(error, MovedError) and number == 1:
                    continue  # the right node is known now
            await pause(number)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _ask(self, error: AskError, packed: bytes) -> Any:
        """Return the answer of the node that a slot is moving to, which has the key already."""
        return (await self.at((error.host, int(error.port))).once([ASKING, packed]))[1]


_ELSEWHERE_OR_LATER = (MovedError, AskError, TryAgainError, ClusterDownError, MasterDownError)
"""Errors of a node that has not done the command."""


def _is_ask(answer: Any) -> bool:
    return isinstance(answer, AskError) and not isinstance(answer, MovedError)  # redis-py derives one from the other


def _slot(key: Any) -> int:
    return int(key_slot(key if isinstance(key, bytes) else str(key).encode()))
