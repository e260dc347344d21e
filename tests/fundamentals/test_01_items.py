"""Lesson 1: an item is a JSON object in a table. Each write gives it the next version."""

import pytest

from tidewire.errors import Conflict, NotFound, PermissionDenied
from tidewire.testing import Stage


async def test_an_item_is_written_read_changed_and_deleted(stage: Stage) -> None:
    alice = await stage.client("alice")

    written = await alice.put("notes", {"id": "n1", "owner": "alice", "text": "buy milk", "done": 0})
    assert written["version"] == 1

    await alice.update("notes", "n1", set={"text": "buy oat milk"}, add={"done": 1})
    read = await alice.get("notes", "n1")
    assert read["item"] == {"id": "n1", "owner": "alice", "text": "buy oat milk", "done": 1}
    assert (read["version"], read["by"]) == (2, "alice")

    await alice.delete("notes", "n1")
    with pytest.raises(NotFound):
        await alice.get("notes", "n1")


async def test_a_condition_protects_from_overwriting(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.put("notes", {"id": "n1", "owner": "alice"}, if_={"absent": True})
    with pytest.raises(Conflict):
        await alice.put("notes", {"id": "n1", "owner": "alice"}, if_={"absent": True})
    await alice.update("notes", "n1", set={"text": "mine"}, if_={"version": 1})


async def test_only_writers_write_and_only_readers_read(stage: Stage) -> None:
    alice, bob = await stage.client("alice"), await stage.client("bob")
    with pytest.raises(PermissionDenied):
        await bob.put("notes", {"id": "n1", "owner": "alice"})  # bob cannot write a note of alice
    await alice.put("notes", {"id": "n1", "owner": "alice"})
    with pytest.raises(NotFound):  # bob does not even learn that it exists
        await bob.get("notes", "n1")
