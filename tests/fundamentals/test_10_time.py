"""Lesson 10: an item with an expiry is not readable after it, and readers learn of its end."""

import time

import pytest

from tidewire.errors import NotFound
from tidewire.testing import Stage


async def test_an_item_expires(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.put("notes", {"id": "n1", "owner": "alice", "until": time.time() + 0.2})
    assert (await alice.next_event())["event"] == "INSERT"
    gone = await alice.next_event()
    assert (gone["event"], gone["by"]) == ("REMOVE", "tidewire:expiry")
    with pytest.raises(NotFound):
        await alice.get("notes", "n1")
