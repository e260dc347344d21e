"""Lesson 4: a cursor is a place in a feed. A reader that returns with its cursor misses nothing."""

from tidewire.client import Client
from tidewire.testing import Stage


async def test_a_reader_that_was_away_receives_what_it_missed(stage: Stage) -> None:
    alice = await stage.client("alice")
    key = await stage.key("alice")
    async with Client(stage.url, key) as phone:
        await alice.put("notes", {"id": "n1", "owner": "alice"})
        await phone.next_event()
        cursor = phone.cursor  # the client keeps it; here the phone is switched off

    await alice.put("notes", {"id": "n2", "owner": "alice"})
    await alice.put("notes", {"id": "n3", "owner": "alice"})

    async with Client(stage.url, key, cursor=cursor) as phone:
        assert phone.welcomes[0]["resumed"] is True
        assert [(await phone.next_event())["key"]["id"] for _ in range(2)] == ["n2", "n3"]


async def test_a_cursor_that_proves_nothing_gives_a_reset(stage: Stage) -> None:
    key = await stage.key("alice")
    async with Client(stage.url, key, cursor="1.999.0123456789") as phone:
        assert phone.welcomes[0]["resumed"] is False
        assert (await phone.next_event())["type"] == "reset", "query again: something may be missing"
