"""Lesson 2: every user who may read an item receives each change of it, without asking."""

from tidewire.testing import Stage


async def test_readers_receive_each_change_with_the_old_and_the_new_item(stage: Stage) -> None:
    backend = await stage.client("backend", role="service")
    bob = await stage.client("bob")

    await backend.put("news", {"id": "a", "title": "Hello"})
    await backend.put("news", {"id": "a", "title": "Hello, world"})
    await backend.delete("news", "a")

    changes = [await bob.next_event() for _ in range(3)]
    assert [change["event"] for change in changes] == ["INSERT", "MODIFY", "REMOVE"]
    assert [change["version"] for change in changes] == [1, 2, 3]
    assert changes[1]["old"] == {"id": "a", "title": "Hello"}
    assert changes[1]["new"] == {"id": "a", "title": "Hello, world"}


async def test_an_item_that_changes_hands_enters_one_view_and_leaves_another(stage: Stage) -> None:
    backend = await stage.client("backend", role="service")
    alice, bob = await stage.client("alice"), await stage.client("bob")

    await backend.put("notes", {"id": "n1", "owner": "alice"})
    assert (await alice.next_event())["event"] == "INSERT"

    await backend.update("notes", "n1", set={"owner": "bob"})
    leaves = await alice.next_event()
    assert leaves["event"] == "LEAVE"
    assert "new" not in leaves, "alice may no longer see the item"
    enters = await bob.next_event()
    assert (enters["event"], enters["new"]) == ("ENTER", {"id": "n1", "owner": "bob"})
