"""Large bodies of feed entries: stored once in a partition, and removed with the last entry that refers to them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest

from tidewire.services.gateway import bodies
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user, eventually, wire

LARGE = 100_000
READERS = 6


async def members(stage: Stage, stack: AsyncExitStack, room: str, count: int = READERS) -> list[Wire]:
    """Connect users that are members of a room."""
    admin = await as_user(stage, stack, "admin", role="service")
    readers = [await as_user(stage, stack, f"u{number}") for number in range(count)]
    for number in range(count):
        await admin.do("put", table="members", item={"room": room, "user": f"u{number}"})
    for number, reader in enumerate(readers):
        await reader.next(type="change", table="members", key={"room": room, "user": f"u{number}"})
    return readers


async def kept(stage: Stage) -> tuple[int, int]:
    """How many bodies there are in all partitions, and how many references to them are counted."""
    count = references = 0
    for partition in range(stage.backend.keys.partitions):
        home = stage.backend.keys.home(partition)
        count += await stage.backend.commands.hlen(home.bodies)
        counts: Any = await stage.backend.commands.hvals(home.references)
        references += sum(int(value.split()[1]) for value in counts)
    return count, references


def text_of(n: int) -> str:
    return f"{n} " * (LARGE // 2)


async def test_every_reader_gets_a_large_body_whole_and_it_is_stored_once_a_partition(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage() as stage:
        readers = await members(stage, stack, "r")
        binary = await as_user(stage, stack, "u0", binary=True)
        for n in range(3):
            await readers[0].do("put", table="messages", item={"room": "r", "id": n, "text": text_of(n)})
            await readers[1].do("put", table="messages", item={"room": "r", "id": 10 + n, "text": "small"})
        for reader in (*readers, binary):
            for n in range(3):
                assert (await reader.next(type="change", table="messages"))["new"]["text"] == text_of(n), "in order"
                assert (await reader.next(type="change", table="messages"))["new"]["text"] == "small"
        assert await kept(stage) == (3 * stage.backend.keys.partitions, 3 * READERS)
        await stack.aclose()


async def test_a_large_body_is_among_the_missed_entries(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage() as stage:
        writer, *_ = await members(stage, stack, "r")
        key = await stage.key("u1")
        async with wire(stage, key) as reader:
            cursor = reader.welcome["cursor"]
        await writer.do("put", table="messages", item={"room": "r", "id": 1, "text": text_of(1)})
        await writer.next(type="change", table="messages")
        async with wire(stage, key, cursor=cursor) as reader:
            assert reader.welcome["replayed"] == 1
            assert (await reader.next(type="change", table="messages"))["new"]["text"] == text_of(1)
        await stack.aclose()


async def test_a_body_that_is_gone_is_a_reset_and_never_a_partial_replay(
    open_stage: Open, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "MAX_KEPT_BYTES", 0)  # the gateway keeps the newest body alone
    async with open_stage() as stage:
        writer, *_ = await members(stage, stack, "r")
        key = await stage.key("u1")
        async with wire(stage, key) as reader:
            cursor = reader.welcome["cursor"]
        for n in (1, 2):
            await writer.do("put", table="messages", item={"room": "r", "id": n, "text": text_of(n)})
            await writer.next(type="change", table="messages")
        home = stage.backend.keys.home_of(stage.backend.keys.user_feed("u1"))
        ids: Any = await stage.backend.commands.hkeys(home.bodies)
        for table in (home.bodies, home.references):
            await stage.backend.commands.hdel(table, *ids)
        async with wire(stage, key, cursor=cursor) as reader:
            assert reader.welcome["resumed"] is False
            assert (await reader.next(type="reset"))["reason"] == "feed_trimmed"
            await writer.do("put", table="messages", item={"room": "r", "id": 3, "text": text_of(3)})
            assert (await reader.next(type="change", table="messages"))["key"]["id"] == 3
        await stack.aclose()


async def test_a_body_is_removed_with_the_last_entry_that_refers_to_it(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(resume_bytes=10 * LARGE) as stage:
        readers = await members(stage, stack, "r")
        for n in range(40):
            await readers[0].do("put", table="messages", item={"room": "r", "id": n, "text": text_of(n)})
        for reader in readers:
            for n in range(40):
                assert (await reader.next(type="change", table="messages"))["key"]["id"] == n
        count, references = await kept(stage)
        partitions = stage.backend.keys.partitions
        assert count <= 13 * partitions, "a feed keeps ten bodies of this size, and trims at every eighth of that"
        assert references <= 13 * READERS
        await stack.aclose()


async def test_a_feed_counts_the_bytes_of_bodies_that_it_refers_to(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(resume_bytes=10 * LARGE) as stage:
        writer, *_ = await members(stage, stack, "r")
        key = await stage.key("u1")
        async with wire(stage, key) as reader:
            cursor = reader.welcome["cursor"]
        for n in range(20):
            await writer.do("put", table="messages", item={"room": "r", "id": n, "text": text_of(n)})
            await writer.next(type="change", table="messages")
        async with wire(stage, key, cursor=cursor) as reader:
            assert (await reader.next(type="reset"))["reason"] == "feed_trimmed"
        await stack.aclose()


async def test_bodies_whose_time_is_over_are_swept(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(resume_window_s=1) as stage:
        home = stage.backend.keys.home(0)
        await stage.backend.functions.body_put(home, 1, [(b"id", b"body")])

        async def is_gone() -> bool:
            await stage.backend.functions.feeds_sweep(home)
            return not await stage.backend.commands.hlen(home.bodies)

        await eventually(is_gone)
        await stack.aclose()


async def test_a_transaction_of_many_changes_reaches_each_of_many_readers_whole(
    open_stage: Open, stack: AsyncExitStack
) -> None:
    async with open_stage() as stage:
        readers = await members(stage, stack, "r")
        await readers[0].do(
            "transact",
            operations=[
                {"action": "put", "table": "messages", "item": {"room": "r", "id": n, "text": "x" * 5000}}
                for n in range(100)
            ],
        )
        for reader in readers:
            frames = [await reader.next(type="change", table="messages") for _ in range(100)]
            assert [frame["key"]["id"] for frame in frames] == list(range(100))
            assert [frame.get("more", False) for frame in frames] == [True] * 99 + [False]
            assert len({frame["transaction"] for frame in frames}) == 1
        await stack.aclose()
