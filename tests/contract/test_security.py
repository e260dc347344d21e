"""A stranger gets no byte of the chat's rooms, and no user takes another's items."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from examples.chat.app import app as chat

from .conftest import Open, as_user

SECRET = "zanzibar"


async def test_a_stranger_gets_nothing_of_a_room_by_any_action(open_stage: Open) -> None:
    async with open_stage(chat) as stage, AsyncExitStack() as stack:
        alice, bob, carol = [await as_user(stage, stack, name) for name in ("alice", "bob", "carol")]
        owner, guest = {"room": "r1", "user": "alice", "role": "owner"}, {"room": "r1", "user": "bob"}
        await alice.do("put", table="members", item=owner)
        await alice.do("put", table="members", item=guest)
        message = {"room": "r1", "id": f"m-{SECRET}", "author": "alice", "text": SECRET}
        await alice.do("put", table="messages", item=message)
        await bob.next(type="change", table="messages")
        key = {"room": "r1", "id": message["id"]}
        absent = {"room": "r1", "id": "there is none"}

        answers: list[Any] = []
        attempts: list[tuple[str, dict[str, Any]]] = [("get", {}), ("delete", {}), ("update", {"set": {"text": "x"}})]
        conditions: list[dict[str, Any]] = [{}, {"if_": {"equals": {"text": SECRET}}}, {"if_": {"version": 1}}]
        for action, fields in attempts:
            for condition in conditions:
                if action == "get" and condition:
                    continue
                errors = [
                    await carol.refused(action, table="messages", key=k, **fields, **condition) for k in (key, absent)
                ]
                assert {e["code"] for e in errors} == {"not_found"}
                assert errors[0]["message"] == errors[1]["message"]
                answers += errors
        for author in ("carol", "alice"):
            for condition in [*conditions, {"if_": {"absent": True}}]:
                item = message | {"author": author, "text": "mine"}
                answers.append(await carol.refused("put", table="messages", item=item, **condition))
                assert answers[-1]["code"] == "forbidden"
        options: dict[str, Any]
        for table, member in (("messages", None), ("members", {"room": "r1", "user": "bob"})):
            for options in ({}, {"limit": 1}, {"reverse": True, "limit": 1}, {"prefix": "m"}):
                page = await carol.do("query", table=table, key="r1", **options)
                assert page["items"] == []
                answers.append(page)
            if member:
                answers.append(await carol.refused("get", table=table, key=member))
        assert SECRET not in str(answers)
        assert "bob" not in str(answers)

        # What carol hears in all that time: her welcome, who is online, and nothing of the room.
        assert await carol.do("ping") == {}
        assert SECRET not in str(carol.frames)
        assert not [frame for frame in carol.frames if frame.get("table") in ("messages", "members")]
        assert (await bob.do("get", table="messages", key=key))["item"] == message


async def test_a_room_cannot_be_taken(open_stage: Open) -> None:
    async with open_stage(chat) as stage, AsyncExitStack() as stack:
        alice, bob, carol = [await as_user(stage, stack, name) for name in ("alice", "bob", "carol")]
        owner = {"room": "r1", "user": "alice", "role": "owner"}
        await alice.do("put", table="members", item=owner)
        await alice.do("put", table="members", item={"room": "r1", "user": "bob"})
        for who in (bob, carol):
            name = who.welcome["user"]
            for item in (
                {"room": "r1", "user": name, "role": "owner"},
                {"room": "r1", "user": "alice"},
                {"room": "r1", "user": "alice", "role": "owner", "title": "taken"},
                {"room": "r1", "user": "dave"},
            ):
                assert (await who.refused("put", table="members", item=item))["code"] == "forbidden"
        alice_key = {"room": "r1", "user": "alice"}
        assert (await bob.refused("delete", table="members", key=alice_key))["code"] == "forbidden"
        assert (await alice.refused("delete", table="members", key=alice_key))["code"] == "forbidden", "owners stay"
        assert (await alice.refused("update", table="members", key=alice_key, remove=["role"]))["code"] == "forbidden"
        await bob.do("delete", table="members", key={"room": "r1", "user": "bob"})


async def test_only_its_author_edits_and_deletes_a_message(open_stage: Open) -> None:
    async with open_stage(chat) as stage, AsyncExitStack() as stack:
        alice, bob = [await as_user(stage, stack, name) for name in ("alice", "bob")]
        await alice.do("put", table="members", item={"room": "r1", "user": "alice", "role": "owner"})
        await alice.do("put", table="members", item={"room": "r1", "user": "bob"})
        await alice.do("put", table="messages", item={"room": "r1", "id": "m", "author": "alice"})
        key = {"room": "r1", "id": "m"}
        overwrites: list[tuple[str, dict[str, Any]]] = [
            ("put", {"item": key | {"author": "bob"}}),
            ("update", {"key": key, "set": {"author": "bob"}}),
            ("update", {"key": key, "set": {"text": "x"}}),
            ("delete", {"key": key}),
        ]
        for action, fields in overwrites:
            assert (await bob.refused(action, table="messages", **fields))["code"] == "forbidden"
        await alice.do("update", table="messages", key=key, set={"text": "x"})
        await alice.do("delete", table="messages", key=key)
