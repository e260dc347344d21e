"""Lesson 8: a transaction writes several items of one partition key, all or none. Readers never see half of it."""

import pytest

from tidewire.errors import Conflict, NotFound
from tidewire.testing import Stage


async def test_all_operations_are_done_and_come_together(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.transact(
        {"action": "put", "table": "members", "item": {"room": "r", "user": "alice"}},
        {"action": "put", "table": "messages", "item": {"room": "r", "id": "m1"}},  # she is a member by now
    )
    first, second = await alice.next_event(), await alice.next_event()
    assert first["transaction"] == second["transaction"]
    assert first["more"] is True
    assert "more" not in second, "the last frame of the transaction"


async def test_nothing_is_done_if_a_check_fails(stage: Stage) -> None:
    alice = await stage.client("alice")
    await alice.put("notes", {"id": "n1", "owner": "alice", "text": "as it was"})
    with pytest.raises(Conflict):
        await alice.transact(
            {"action": "put", "table": "members", "item": {"room": "n1", "user": "alice"}},
            {"action": "check", "table": "notes", "key": "n1", "if": {"version": 7}},
        )
    with pytest.raises(NotFound):
        await alice.get("members", {"room": "n1", "user": "alice"})
