"""The writes of users: one coroutine for each kind, and a client that notes late answers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

from tidewire.client import Client
from tidewire.errors import Timeout

from .logs import Late, User
from .pace import BULK, CELLS, CLUBS, HALL, LARGE_BYTES, LOBBY, PAIR, ROOMS, TENANTS, Pace, flat_of

Write = Callable[[Client, random.Random, User, str], Any]
Made = Callable[[random.Random, User], Any]


class Writer(Client):
    """A client that notes each request that was answered with `timeout`, and then repeats it as any client does."""

    def __init__(self, url: str, user: str, key: str, late: list[Late], timeout_s: float) -> None:
        super().__init__(url, key, timeout_s=timeout_s)
        self._name = user
        self._late = late

    async def _once(self, id_: int, frame: dict[str, Any]) -> Any:
        since = time.time() * 1000
        try:
            return await super()._once(id_, frame)
        except Timeout:
            self._late.append(Late(self._name, str(frame["action"]), since, time.time() * 1000))
            raise


def number(choice: random.Random, count: int) -> str:
    """Return one of that many ids."""
    return f"{choice.randrange(count):02}"


def large_text(choice: random.Random, limits: tuple[int, int] = LARGE_BYTES) -> str:
    """A text whose length lies between the limits, evenly by its logarithm."""
    least, most = map(math.log, limits)
    length = int(math.exp(choice.uniform(least, most)))
    return (f"{choice.random():.16f}" * (length // 18 + 1))[:length]


def _room(choice: random.Random) -> str:
    return choice.choice((LOBBY, LOBBY, *ROOMS))


def _in_a_room(choice: random.Random, _: User) -> str:
    return _room(choice)


def _large(choice: random.Random, _: User) -> str:
    return large_text(choice)


def _id(count: int) -> Made:
    return lambda choice, _: number(choice, count)


def _somebody(choice: random.Random, _: User) -> str:
    return f"u{choice.randrange(12):02}"


def put(table: str, **fields: Made) -> Write:
    """A write of an item whose fields are made at the time."""

    async def write(client: Client, choice: random.Random, user: User, w: str) -> None:
        item = {name: made(choice, user) for name, made in fields.items()}
        await client.put(table, item | {"w": w, "by": user.name}, request=w)

    return write


async def _edit(client: Client, choice: random.Random, user: User, w: str) -> None:
    key = {"room": _room(choice), "id": number(choice, 20)}
    await client.update("messages", key, set={"w": w}, add={"edits": 1}, request=w)


async def _delete(client: Client, choice: random.Random, user: User, w: str) -> None:
    key = {"room": _room(choice), "id": number(choice, 20)}
    await client.delete("messages", key, request=w)


def together(table: str, ids: tuple[str, ...]) -> Write:
    """One transaction that writes these items of the lobby."""

    async def write(client: Client, choice: random.Random, user: User, w: str) -> None:
        items = ({"room": LOBBY, "id": id_, "w": w, "by": user.name} for id_ in ids)
        await client.transact(*({"action": "put", "table": table, "item": item} for item in items), request=w)

    return write


def writes_of(pace: Pace) -> dict[str, Write]:
    """Every kind of write that a pace may name."""
    return {
        "message": put("messages", room=_in_a_room, id=_id(20)),
        "edit": _edit,
        "delete": _delete,
        "pair": together("messages", PAIR),
        "post": put("posts", room=_in_a_room, id=_id(10), tenant=lambda choice, _: choice.choice(TENANTS)),
        "thing": put("things", id=_id(20), owner=_somebody, guest=_somebody),
        "unit": put("units", id=_id(15), cell=lambda choice, _: choice.choice(CELLS)),
        "note": put("notes", id=_id(pace.notes), room=lambda choice, _: choice.choice(ROOMS)),
        "notice": put("notices", tenant=lambda _, user: user.tenant, id=_id(10)),
        "file": put("files", room=lambda *_: LOBBY, id=_id(6), text=_large),
        "scan": put("scans", id=_id(10), owner=_somebody, guest=_somebody, text=_large),
        "bulk": together("rows", tuple(f"{id_:02}" for id_ in range(BULK))),
        "talk": put("talks", hall=lambda *_: HALL, id=_id(20)),
        "face": put("faces", user=lambda _, user: user.name),
        "board": put("boards", id=_id(10), flat=lambda _, user: flat_of(user.name)),
        "minute": put("minutes", club=lambda choice, _: choice.choice(CLUBS), id=_id(10)),
        "draft": put("drafts", id=_id(20), room=lambda choice, _: choice.choice(ROOMS)),
    }


OF_THE_NEXT = frozenset(("minute", "draft"))
"""Kinds of writes to tables that only the second version of the application declares."""
