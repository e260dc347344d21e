"""Each wrong shape of each action over one websocket and over HTTP: nothing of it disturbs what comes after."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

from tests.shapes import GOOD, NO_JSON, SEEDS, WRONG, Wrong, make_app
from tidewire.errors import BY_CODE
from tidewire.testing import Stage

from .conftest import Open, Wire, as_user, post


async def seed(wire: Wire) -> None:
    for table, item in SEEDS:
        await wire.do("put", table=table, item=item)


async def untouched(wire: Wire) -> None:
    """The next good command is done on what was there before all of the bad ones."""
    action, fields = GOOD
    done = await wire.do(action, **fields)
    assert (done["version"], done["item"]) == (2, SEEDS[0][1] | {"count": 2})


def fault_of(wrong: Wrong, error: dict[str, Any]) -> str | None:
    """What is missing from an error."""
    kind = BY_CODE[wrong.code]
    if (error.get("type"), error.get("code"), error.get("retry")) != ("error", wrong.code, kind.retry):
        return f"{wrong}: {wrong.code} was expected, not {error}"
    missing = [name for name in wrong.names if name not in error["message"]]
    return f"{wrong}: {missing} is not in {error['message']!r}" if missing else None


async def test_all_of_them_over_one_websocket(open_stage: Open) -> None:
    async with open_stage(make_app()) as stage, AsyncExitStack() as inner:
        alice = await as_user(stage, inner, "alice")
        await seed(alice)

        async def send() -> None:
            for number, wrong in enumerate(WRONG):
                await alice.send({"id": f"w{number}", **wrong.frame})
            for text in NO_JSON:
                await alice.ws.send(text)

        sending = asyncio.create_task(send())
        faults = [fault_of(wrong, await alice.next(id=f"w{number}")) for number, wrong in enumerate(WRONG)]
        await sending
        assert [fault for fault in faults if fault] == []
        for _ in NO_JSON:
            error = await alice.next(type="error")
            assert (error["id"], error["code"]) == (None, "bad_request")
        await untouched(alice)


async def test_all_of_them_over_http(open_stage: Open) -> None:
    async with open_stage(make_app()) as stage, AsyncExitStack() as inner:
        alice = await as_user(stage, inner, "alice")
        await seed(alice)
        key = await stage.key("alice")
        named = [wrong for wrong in WRONG if isinstance(wrong.action, str) and wrong.action]
        for at in range(0, len(named), 20):
            some = named[at : at + 20]
            answers = await asyncio.gather(*(post(stage, wrong.action, wrong.fields, auth_key=key) for wrong in some))
            for wrong, (status, error) in zip(some, answers, strict=True):
                assert fault_of(wrong, error) is None
                assert status == BY_CODE[wrong.code].status
        await no_json(stage, key)
        await untouched(alice)


async def no_json(stage: Stage, key: str) -> None:
    for text in NO_JSON:
        status, error = await post(stage, "put", text.encode(), auth_key=key)
        assert (status, error["code"]) == (400, "bad_request")
    body = json.dumps({"action": "get", "table": "notes", "key": "n"}).encode()
    status, error = await post(stage, "put", body, auth_key=key)
    assert status == 400
    assert "'get'" in error["message"]
    assert "'put'" in error["message"]
