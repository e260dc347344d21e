"""Lesson 3: items with one partition key have one order, and every reader sees it."""

import asyncio

from tidewire.testing import Stage


async def test_all_readers_see_the_same_order(stage: Stage) -> None:
    alice, bob = await stage.client("alice"), await stage.client("bob")
    for client in (alice, bob):
        await client.put("members", {"room": "r", "user": client.user})
    await asyncio.gather(
        *(
            client.put("messages", {"room": "r", "id": f"{client.user}-{number}"})
            for number in range(10)
            for client in (alice, bob)
        )
    )
    seen = []
    for client in (alice, bob):
        ids: list[str] = []
        while len(ids) < 20:
            event = await client.next_event()
            if event["table"] == "messages":
                ids.append(event["key"]["id"])
        seen.append(ids)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 20, "each change comes once"
