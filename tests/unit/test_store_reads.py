"""Expensive reads: whose turn it is, and what becomes of those that cannot be done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import pytest

from tests.helpers import wait_until
from tidewire.app import App
from tidewire.audiences import everyone
from tidewire.errors import Fenced
from tidewire.model.records import Command, Reply
from tidewire.process.settings import Settings
from tidewire.redis.functions import Fence, Owned
from tidewire.services.store import reads
from tidewire.services.store.facts import Fact, Value
from tidewire.services.store.reads import Read, Reads
from tidewire.services.store.view import Situation

from .world import GENERATION, KEYS, World

OWNED = Owned(b"lease", KEYS.home(0), b"stream", "store", Fence(1, GENERATION))


class Around:
    """What is around the reads: a partition whose facts come when the gate is open, and the replies."""

    def __init__(self) -> None:
        app = App("test")
        app.table("lines", key=("page", "n"), readers=everyone, writers=everyone)
        self.world = World(app)
        for n in range(150):
            self.world.do("bob", "put", table="lines", item={"page": "p", "n": n})
        self.keys = KEYS
        self.functions = self
        self.gate = asyncio.Event()
        self.under_way: list[str] = []
        self.most_under_way = 0
        self.replies: dict[int, Reply] = {}
        self.fenced = False
        self.reads = Reads(app, self, Settings(), self)  # type: ignore[arg-type]

    async def fetch(
        self, _: Any, partition: int, facts: Iterable[Fact], sizes: dict[Fact, int], *, max_bytes: int
    ) -> dict[Fact, Value]:
        self.under_way.append(str(asyncio.current_task()))
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        await self.gate.wait()
        self.under_way.pop()
        return {fact: self.world.fetch(fact) for fact in facts}

    async def batch(self, owned: Owned, count: int, size_bytes: int) -> None:
        assert (count, size_bytes) == (0, 0)
        if self.fenced:
            raise Fenced("another worker owns this partition")

    def send(self, replies: dict[str, list[Reply]]) -> None:
        self.replies |= {reply.number: reply for reply in replies["g1"]}

    def ask(self, who: str, *, late: bool = False) -> Command:
        command = self.world.command(who, "query", table="lines", key="p", limit=1000, late=late)
        situation = Situation(0, GENERATION, self.world.now, self.world.last, 0)
        self.reads.add(Read(command, situation, OWNED, time.monotonic()))
        return command

    def code(self, command: Command) -> str:
        error = self.replies[command.number].error
        assert error, "an error was expected"
        return str(error["code"])

    async def answered(self, count: int) -> None:
        await wait_until(lambda: len(self.replies) == count, f"{count} reads are answered")


@pytest.fixture
async def around(monkeypatch: pytest.MonkeyPatch) -> Around:
    found = Around()
    monkeypatch.setattr(reads, "fetch", found.fetch)
    return found


async def test_a_read_is_answered_with_all_of_it(around: Around) -> None:
    around.gate.set()
    command = around.ask("alice")
    await around.answered(1)
    reply = around.replies[command.number]
    assert reply.error is None
    assert [entry["item"]["n"] for entry in reply.result["items"]] == list(range(150))
    assert reply.result["position"] == around.world.changes[-1][0]


async def test_a_user_has_one_read_under_way_and_a_process_a_few(around: Around) -> None:
    for _ in range(5):
        around.ask("alice")
    await wait_until(lambda: len(around.under_way) == 1, "one read is under way")
    for n in range(2 * reads.MAX_READS):
        around.ask(f"u{n}")
    await wait_until(lambda: len(around.under_way) == reads.MAX_READS, "as many reads as may be are under way")
    around.gate.set()
    await around.answered(5 + 2 * reads.MAX_READS)
    assert around.most_under_way == reads.MAX_READS


async def test_users_take_turns(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "MAX_READS", 1)
    mallory = [around.ask("mallory") for _ in range(5)]
    alice = around.ask("alice")
    around.gate.set()
    await around.answered(6)
    order = list(around.replies)
    assert order.index(alice.number) <= 2, "who asks much waits for himself"
    assert [number for number in order if number != alice.number] == [command.number for command in mallory]


async def test_beyond_the_queue_a_read_is_overloaded_at_once(around: Around, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "MAX_QUEUED_OF_USER", 2)
    monkeypatch.setattr(reads, "MAX_QUEUED", 3)
    for _ in range(3):
        around.ask("alice")
    assert around.code(around.ask("alice")) == "overloaded"
    for _ in range(2):
        around.ask("bob")
    assert around.code(around.ask("carol")) == "overloaded" or len(around.replies) == 1
    around.gate.set()
    await wait_until(lambda: not around.under_way and around.reads._count == 0, "all reads are done")


async def test_a_read_ends_at_its_deadline(around: Around) -> None:
    late = around.ask("alice", late=True)
    waits = around.ask("bob")
    await around.answered(2)
    assert (around.code(late), around.code(waits)) == ("timeout", "timeout")


async def test_a_read_of_a_partition_that_was_lost_meanwhile_says_so(around: Around) -> None:
    around.fenced = True
    around.gate.set()
    command = around.ask("alice")
    await around.answered(1)
    assert around.code(command) == "overloaded"


async def test_a_drain_answers_all_reads(around: Around) -> None:
    commands = [around.ask(who) for who in ("alice", "alice", "bob")]
    await wait_until(lambda: len(around.under_way) == 2, "two reads are under way")
    await around.reads.drain()
    commands.append(around.ask("carol"))
    assert [around.code(command) for command in commands] == ["overloaded"] * 4


async def test_other_tasks_get_their_turn_while_a_read_computes(around: Around) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    around.gate.set()
    task = asyncio.create_task(others())
    around.ask("alice")
    await around.answered(1)
    task.cancel()
    assert turns > 1
