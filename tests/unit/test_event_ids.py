"""Ids of event streams: what is kept for them, how long, and how much of it for one user."""

from __future__ import annotations

import json

import fakeredis

from tidewire.redis.backend import Backend
from tidewire.redis.keys import Keys
from tidewire.services.gateway.event_stream import LOST_CURSOR, MAX_ID_BYTES, SLOTS, EventIds, read_event_id
from tidewire.testing import FakeBackend

TOPICS = {f"cell:{number:03}": f"1795786279243.{number}.231dd20932" for number in range(100)}


async def stored(backend: Backend, user: str = "alice") -> EventIds:
    ids = EventIds(backend, user, 300.0)
    ids.move((None, "1.1.a"), *TOPICS.items())
    await ids.shorten()
    return ids


async def test_an_id_stands_for_all_cursors_of_its_own_user_alone() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 2)) as backend:
        ids = await stored(backend)
        ids.move(("cell:007", "1.8.b"))
        text = ids.id().decode()
        assert len(text) < MAX_ID_BYTES
        assert await read_event_id(backend, "alice", text, {}) == ("1.1.a", TOPICS | {"cell:007": "1.8.b"})
        asked = {"cell:001": "", "cell:007": ""}
        lost = {"cell:001": LOST_CURSOR, "cell:007": "1.8.b"}
        assert await read_event_id(backend, "bob", text, asked) == ("1.1.a", lost)


async def test_an_id_from_before_the_last_storing_still_counts() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 2)) as backend:
        ids = await stored(backend)
        before = ids.id().decode()
        ids.move(*((topic, "1.9.c") for topic in TOPICS))
        await ids.shorten()
        assert json.loads(ids.id())["kept"] != json.loads(before)["kept"]
        assert (await read_event_id(backend, "alice", before, {}))[1] == TOPICS


async def test_a_silent_stream_extends_the_time_of_its_cursors() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 2)) as backend:
        ids = await stored(backend)
        slot, _ = json.loads(ids.id())["kept"]
        key = backend.keys.event_cursors("alice", slot)
        await backend.commands.pexpire(key, 1000)
        await ids.refresh()
        assert await backend.commands.pttl(key) > 500_000


async def test_any_number_of_streams_of_a_user_keeps_a_bounded_number_of_sets() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 2)) as backend:
        for _ in range(3 * SLOTS):
            await stored(backend)
        kept = [key async for key in backend.scan(b"dev:*event-cursors:*")]
        assert SLOTS / 4 < len(kept) <= SLOTS


async def test_an_id_whose_slot_another_stream_has_taken_is_lost() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 2)) as backend:
        fields = json.loads((await stored(backend)).id())
        fields["kept"][1] = "0" * 16
        _, topics = await read_event_id(backend, "alice", json.dumps(fields), {"cell:001": ""})
        assert topics == {"cell:001": LOST_CURSOR}
