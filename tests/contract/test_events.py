"""The feed as server-sent events: as a browser's EventSource asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from tidewire.redis import keyring
from tidewire.services.gateway.event_stream import MAX_ID_BYTES
from tidewire.testing import Stage

from .conftest import PATIENCE_S, Frame, Open, as_user, eventually


class Events:
    """One stream, read line by line."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.status = 0
        self.headers: dict[str, str] = {}
        self.last_id = ""
        self.ended = False

    async def head(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            self.status = int((await self._reader.readline()).split()[1])
            while line := (await self._reader.readline()).decode().strip():
                name, _, value = line.partition(": ")
                self.headers[name.lower()] = value

    async def body(self) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            return json.loads(await self._reader.readexactly(int(self.headers["content-length"])))

    async def next(self) -> Frame:
        """The data of the next event; what the chunks of HTTP say is passed over."""
        id_: str | None = None
        async with asyncio.timeout(PATIENCE_S):
            while line := await self._reader.readline():
                if line.startswith(b"id: "):
                    id_ = line[4:].strip().decode("ascii")
                if line.startswith(b"data: "):
                    assert id_ is not None, "each event has an id"
                    self.last_id = id_
                    frame: Frame = json.loads(line[6:])
                    return frame
        self.ended = True
        return {}

    async def change(self) -> Frame:
        while (frame := await self.next())["type"] != "change" or frame["table"] == "connections":
            pass
        return frame


@contextlib.asynccontextmanager
async def events(stage: Stage, headers: dict[str, str] | None = None, **query: str) -> AsyncIterator[Events]:
    host = urlsplit(stage.http_url)
    reader, writer = await asyncio.open_connection(host.hostname, host.port, limit=1 << 20)
    given = {"Host": f"{host.hostname}:{host.port}", "User-Agent": "test"} | (headers or {})
    lines = [f"GET /v1/feed?{urlencode(query)} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    found = Events(reader)
    try:
        await found.head()
        yield found
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_the_feed_comes_as_events_and_goes_on_after_the_last_id(stage: Stage, stack: AsyncExitStack) -> None:
    writer = await as_user(stage, stack, "alice")
    key = await stage.key("alice")
    async with events(stage, auth_key=key, topics='{"cell:1":""}') as reader:
        assert (reader.status, reader.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        welcome = await reader.next()
        assert (welcome["type"], welcome["user"], welcome["resumed"]) == ("welcome", "alice", False)
        assert "cell:1" in welcome["topics"]
        await writer.do("put", table="notes", item={"id": "n1", "owner": "alice", "text": "line\nbreak é"})
        frame = await reader.change()
        assert (frame["event"], frame["new"]["text"]) == ("INSERT", "line\nbreak é")
        await writer.do("put", table="tiles", item={"id": "t1", "cell": 1})
        frame = await reader.change()
        assert (frame["topic"], frame["key"]) == ("cell:1", {"id": "t1"})
        last = reader.last_id
    await writer.do("put", table="notes", item={"id": "n2", "owner": "alice"})
    await writer.do("put", table="tiles", item={"id": "t2", "cell": 1})
    # As an EventSource does it: the same address once more, with the last id in a header.
    async with events(stage, {"Last-Event-ID": last}, auth_key=key, topics='{"cell:1":""}') as reader:
        welcome = await reader.next()
        assert welcome["resumed"]
        ids = {(await reader.change())["key"]["id"] for _ in range(2)}
        assert ids == {"n2", "t2"}, "once each, and what was had before does not come again"
        await writer.do("put", table="notes", item={"id": "n3", "owner": "alice"})
        assert (await reader.change())["key"] == {"id": "n3"}


MANY = {f"cell:{number:03}-{'x' * 20}": "" for number in range(120)}


async def test_ids_stay_short_with_many_topics_and_continue_all_of_them(stage: Stage, stack: AsyncExitStack) -> None:
    writer = await as_user(stage, stack, "writer")
    key, topics = await stage.key("alice"), json.dumps(MANY)
    moved = [sorted(MANY)[number] for number in (0, 7, -1)]

    async def write(when: str) -> None:
        for topic in moved:
            await writer.do("put", table="tiles", item={"id": f"{when} {topic}", "cell": topic.removeprefix("cell:")})

    async with events(stage, auth_key=key, topics=topics) as reader:
        assert MANY.keys() <= (await reader.next())["topics"].keys()
        assert len(reader.last_id) <= MAX_ID_BYTES
        await write("one")
        assert len({(await reader.change())["key"]["id"] for _ in moved}) == len(moved)
        assert len(reader.last_id) <= MAX_ID_BYTES, "moved topics are named beside the name of the kept ones"
    last = reader.last_id
    await write("two")
    async with events(stage, {"Last-Event-ID": last}, auth_key=key, topics=topics) as reader:
        assert (await reader.next())["resumed"]
        heard = {(await reader.change())["key"]["id"] for _ in moved}
        assert heard == {f"two {topic}" for topic in moved}


async def test_ids_whose_cursors_redis_has_lost_begin_with_resets(stage: Stage) -> None:
    key, topics = await stage.key("alice"), json.dumps(MANY)
    async with events(stage, auth_key=key, topics=topics) as reader:
        await reader.next()
    slot, _ = json.loads(reader.last_id)["kept"]
    assert await stage.backend.commands.delete(stage.backend.keys.event_cursors("alice", slot)) == 1
    async with events(stage, {"Last-Event-ID": reader.last_id}, auth_key=key, topics=topics) as reader:
        await reader.next()
        reset: set[str] = set()
        while reset != MANY.keys():  # nothing is lost silently
            frame = await reader.next()
            if frame["type"] == "reset":
                reset.add(frame["topic"])


async def test_a_cursor_that_is_unknown_is_a_reset(stage: Stage) -> None:
    key = await stage.key("alice")
    last = '{"cursor":"1.2.abc","topics":{"scores":"nonsense"}}'
    async with events(stage, {"auth_key": key, "Last-Event-ID": last}) as reader:
        assert (await reader.next())["resumed"] is False
        topics: set[str | None] = set()
        while len(topics) < 2:
            if (frame := await reader.next())["type"] == "reset":
                topics.add(frame.get("topic"))
        assert topics == {None, "scores"}


@pytest.mark.parametrize(
    ("headers", "query", "status", "code"),
    [
        ({}, {}, 401, "unauthenticated"),
        ({}, {"auth_key": "tw_0123456789ab_0"}, 401, "unauthenticated"),
        ({"Origin": "http://evil.example"}, {"auth_key": "KEY"}, 403, "forbidden"),
        ({}, {"auth_key": "KEY", "topics": "[]"}, 400, "bad_request"),
        ({"Last-Event-ID": "7"}, {"auth_key": "KEY"}, 400, "bad_request"),
    ],
)
async def test_a_refusal_has_a_status_and_a_reason(
    stage: Stage, headers: dict[str, str], query: dict[str, str], status: int, code: str
) -> None:
    key = await stage.key("alice")
    query = {name: key if value == "KEY" else value for name, value in query.items()}
    async with events(stage, headers, **query) as reader:
        assert reader.status == status
        error = await reader.body()
        assert (error["type"], error["code"]) == ("error", code)


async def test_a_page_of_the_same_host_may_read_it(stage: Stage) -> None:
    origin = "http://127.0.0.1:1234"
    async with events(stage, {"Origin": origin}, auth_key=await stage.key("alice")) as reader:
        assert (reader.status, reader.headers["access-control-allow-origin"]) == (200, origin)


async def test_a_reader_is_a_connection_which_ends_when_it_leaves_or_its_key_is_revoked(
    stage: Stage, stack: AsyncExitStack
) -> None:
    admin = await as_user(stage, stack, "admin", role="service")

    async def online() -> list[str]:
        found = await admin.do("query", table="connections", key="bob")
        return [one["item"]["user_agent"] for one in found["items"]]

    key = await stage.key("bob")
    async with events(stage, auth_key=key) as reader:
        connection = (await reader.next())["connection"]
        await eventually(lambda: _is(online, ["test"]))
        await admin.do("send", connection=connection, body="for you")
        frame = await reader.next()
        while frame["type"] != "message":
            frame = await reader.next()
        assert (frame["body"], "cursor" in frame) == ("for you", False)
    await eventually(lambda: _is(online, []))
    async with events(stage, auth_key=key) as reader:
        await reader.next()
        await keyring.revoke(stage.backend, key.split("_")[1])
        while not reader.ended:
            await reader.next()
    async with events(stage, auth_key=key) as reader:
        assert reader.status == 401


async def _is(asked: Any, expected: Any) -> bool:
    return bool(await asked() == expected)


async def test_a_slow_reader_goes_on_from_the_feed(open_stage: Open, stack: AsyncExitStack) -> None:
    async with open_stage(limit_queued_bytes=10_000, resume_bytes=1 << 26) as stage:
        writer = await as_user(stage, stack, "alice")
        async with events(stage, auth_key=await stage.key("alice")) as reader:
            await reader.next()
            for number in range(60):  # more than the socket's buffers and the queue hold together
                item = {"page": "p", "n": number, "text": "x" * 200_000}
                await writer.do("put", table="lines", item=item)
                writer.frames.clear()
            assert [(await reader.change())["key"]["n"] for _ in range(60)] == list(range(60))
        await stack.aclose()
