"""Lesson 7: a topic is a feed that clients follow, for audiences too large to write to each user."""

from tidewire.testing import Stage


async def test_followers_receive_the_changes_of_a_topic(stage: Stage) -> None:
    car, watcher = await stage.client("car"), await stage.client("watcher")
    await watcher.follow("cell:c1")
    await car.put("positions", {"id": "car", "cell": "c1"})
    change = await watcher.next_event()
    assert (change["topic"], change["new"]) == ("cell:c1", {"id": "car", "cell": "c1"})

    await car.put("positions", {"id": "car", "cell": "c2"})
    assert (await watcher.next_event())["event"] == "LEAVE", "the car has left the cell"
