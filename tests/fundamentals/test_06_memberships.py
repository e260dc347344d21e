"""Lesson 6: a membership is a table. An item in it makes a user a member of a group."""

import pytest

from tidewire.errors import PermissionDenied
from tidewire.testing import Stage


async def test_members_read_and_write_and_others_do_not(stage: Stage) -> None:
    alice, eve = await stage.client("alice"), await stage.client("eve")
    await alice.put("members", {"room": "r", "user": "alice"})
    await alice.put("messages", {"room": "r", "id": "m1"})
    with pytest.raises(PermissionDenied):
        await eve.put("messages", {"room": "r", "id": "m2"})


async def test_a_new_member_sees_present_items_and_a_former_one_nothing(stage: Stage) -> None:
    alice, bob = await stage.client("alice"), await stage.client("bob")
    await alice.put("members", {"room": "r", "user": "alice"})
    await alice.put("messages", {"room": "r", "id": "m1", "text": "before bob came"})

    await bob.put("members", {"room": "r", "user": "bob"})
    events = [await bob.next_event() for _ in range(3)]
    assert ("ENTER", "messages") in [(event["event"], event["table"]) for event in events]

    await bob.delete("members", {"room": "r", "user": "bob"})
    while (event := await bob.next_event())["event"] != "LEAVE" or event["table"] != "messages":
        pass
    assert event["key"] == {"room": "r"}, "one frame for all messages of the room"
    assert (await bob.query("messages", "r"))["items"] == []
