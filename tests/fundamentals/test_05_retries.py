"""Lesson 5: a write carries a request id. Sending it again returns the first result, and writes nothing."""

from tidewire.testing import Stage


async def test_a_repeated_write_is_done_once(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.put("notes", {"id": "n1", "owner": "alice", "count": 0})
    first = await alice.update("notes", "n1", add={"count": 1}, request="my-request")
    again = await alice.update("notes", "n1", add={"count": 1}, request="my-request")
    assert again == first
    assert (await alice.get("notes", "n1"))["item"]["count"] == 1
