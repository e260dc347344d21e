"""The Python client: it comes back by itself, with nothing lost and nothing doubled."""

from __future__ import annotations

import asyncio

import pytest

from tidewire.client import Client
from tidewire.errors import Conflict, NotFound, Overloaded, PermissionDenied, Unauthenticated
from tidewire.testing import Stage

from .conftest import PATIENCE_S, eventually


async def test_a_client_writes_reads_and_receives_changes(stage: Stage) -> None:
    alice = await stage.client("alice", claims={"tenant": "t"})
    assert (await alice.whoami())["claims"] == {"tenant": "t"}
    await alice.put("notes", {"id": "n", "owner": "alice"})
    await alice.update("notes", "n", set={"x": 1})
    with pytest.raises(Conflict):
        await alice.put("notes", {"id": "n", "owner": "alice"}, if_={"absent": True})
    await alice.delete("notes", "n")
    with pytest.raises(NotFound):
        await alice.get("notes", "n")
    heard: list[str] = []
    while len(heard) < 3:
        event = await alice.next_event(PATIENCE_S)
        if event.get("table") == "notes":
            heard.append(event["event"])
    assert heard == ["INSERT", "MODIFY", "REMOVE"]


async def test_it_comes_back_and_misses_nothing(stage: Stage) -> None:
    alice, bob = await stage.client("alice"), await stage.client("bob")
    for n in range(30):
        if n % 10 == 5:
            assert alice._ws
            await alice._ws.close(1012)
        await alice.put("notes", {"id": n, "owner": ["alice", "bob"]})
    for reader in (alice, bob):
        seen: list[int] = []
        while len(seen) < 30:
            event = await reader.next_event(PATIENCE_S)
            assert event["type"] != "reset"
            if event.get("table") == "notes":
                seen.append(event["key"]["id"])
        assert sorted(seen) == list(range(30)), "each once; between partitions there is no order"
    assert [welcome["resumed"] for welcome in alice.welcomes] == [False, True, True, True]


async def test_another_client_goes_on_behind_the_last_event_that_was_taken(stage: Stage) -> None:
    """Events that wait in a client that ends are not lost: its cursors do not count them."""
    writer, key = await stage.client("alice"), await stage.key("alice")

    async def write(n: int) -> None:
        await writer.put("notes", {"id": f"n{n}", "owner": "alice"})
        await writer.put("scores", {"id": f"s{n}"})

    async def taken(client: Client, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            event = await client.next_event(PATIENCE_S)
            if event.get("table") in ("notes", "scores"):
                found.append(event["key"]["id"])
        return sorted(found)

    async with Client(stage.url, key) as phone:
        await write(1)
        assert await taken(phone, 2) == ["n1", "s1"]
        await write(2)
        await eventually(lambda: _has_waiting(phone, 2))
        cursor, topics = phone.cursor, phone.topics
    await write(3)
    async with Client(stage.url, key, cursor=cursor, topics=topics) as phone:
        assert await taken(phone, 4) == ["n2", "n3", "s2", "s3"]


async def test_more_topics_than_an_address_holds_are_resumed(stage: Stage) -> None:
    names = [f"cell:{number:04}-{'x' * 60}" for number in range(150)]
    writer = await stage.client("writer")
    async with Client(stage.url, await stage.key("alice")) as alice:
        for name in names:
            await alice.follow(name)
        assert len(alice._parted_topics()[1]) > 50, "the rest is followed after the welcome"
        for name in (names[0], names[-1]):
            await writer.put("tiles", {"id": f"before {name}", "cell": name.removeprefix("cell:")})
        assert alice._ws
        await alice._ws.close(1012)
        for name in (names[0], names[-1]):
            await writer.put("tiles", {"id": f"after {name}", "cell": name.removeprefix("cell:")})
        heard: list[str] = []
        while len(heard) < 4:
            event = await alice.next_event(PATIENCE_S)
            if event.get("table") == "tiles":
                heard.append(event["key"]["id"])
        assert sorted(heard) == sorted(
            f"{when} {name}" for when in ("before", "after") for name in (names[0], names[-1])
        )
        await writer.put("scores", {"id": "s"})
        while (event := await alice.next_event(PATIENCE_S)).get("table") != "scores":
            assert event.get("table") != "tiles", "each comes once"
        assert set(alice.topics) >= set(names)


async def test_a_topic_is_not_given_up_for_an_error_that_may_pass(stage: Stage) -> None:
    alice, writer = await stage.client("alice"), await stage.client("writer")
    await alice.follow("cell:1")
    alice._received(Overloaded("the store is busy", topic="cell:1").as_frame(None))
    assert "cell:1" in alice.topics
    await writer.put("tiles", {"id": "t", "cell": 1})
    while (await alice.next_event(PATIENCE_S)).get("table") != "tiles":
        pass
    alice._received(PermissionDenied("no more", topic="cell:1").as_frame(None))
    assert "cell:1" not in alice.topics


async def _has_waiting(client: Client, count: int) -> bool:
    return client._events.qsize() >= count


async def test_a_wrong_key_is_refused_for_good(stage: Stage) -> None:
    with pytest.raises(Unauthenticated):
        async with Client(stage.url, "tw_a_b"):
            pass


async def test_one_that_leaves_under_a_flood_of_frames_is_gone_at_once(stage: Stage) -> None:
    leaving, service = await stage.client("leaving"), await stage.client("service", role="service")
    body = "x" * 5000

    async def flood(number: int) -> None:
        for n in range(40):
            await service.put("notes", {"id": f"n{number}", "owner": "leaving", "n": n, "body": body})

    writing = [asyncio.create_task(flood(number)) for number in range(20)]
    await leaving.next_event(PATIENCE_S)
    await leaving.__aexit__()

    async def gone() -> bool:
        return not (await service.query("connections", "leaving"))["items"]

    await eventually(gone)
    await asyncio.gather(*writing)
