"""Lua functions refuse a call whose records are cut short, before they write."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import ResponseError

from tidewire.testing import Stage

SOURCE = "nobody"
"""A source that no link has."""

POSITION = (1, 1, 0, 1)
"""Generation, ms, seq and number of an effect."""

COMMAND = (2, "HSET", 1, "touched", "yes")

WHOLE: list[tuple[str, tuple[Any, ...]]] = [
    ("link_stamp", (SOURCE, 1, 3, 1, 1, 0)),
    ("link_apply", (SOURCE, 1, *POSITION, len(COMMAND), *COMMAND)),
    ("link_append", (SOURCE, 1, 10, 1000, *POSITION, 1, "1-1-0", "body", 4, 1, 0)),
    ("body_put", (1000, "id", "body")),
]


@pytest.mark.parametrize(("function", "args"), WHOLE, ids=[name for name, _ in WHOLE])
async def test_records_that_are_cut_short_are_refused(stage: Stage, function: str, args: tuple[Any, ...]) -> None:
    home = stage.backend.keys.home(0)
    with pytest.raises(ResponseError, match="the arguments end within a record"):
        await stage.backend.functions._call(function, home, *args[:-1])
    assert not await stage.backend.commands.hexists(home.links, SOURCE)
    assert not await stage.backend.commands.hexists(home.partition, "touched")
    assert not await stage.backend.commands.hexists(home.bodies, "id")

    await stage.backend.functions._call(function, home, *args)
    if function == "body_put":
        assert await stage.backend.commands.hget(home.bodies, "id") == b"body"
    else:
        assert await stage.backend.commands.hexists(home.links, SOURCE), "the whole call is done"
