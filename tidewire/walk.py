"""All items of a table in one partition, in one order that does not change: by key. For what works through a table."""

from __future__ import annotations

from typing import Any, NamedTuple

from tidewire.app import ItemKey
from tidewire.backend import Backend
from tidewire.keys import sort_value, value_of
from tidewire.records import ItemRecord, unpack

VALUES_AT_A_TIME = 500
PAGE_BYTES = 4 << 20


class Place(NamedTuple):
    """Where one item stands in that order."""

    value: bytes  # the partition-key value, as `name_of`
    field: bytes  # the sort key's bytes; empty in a table without one


Found = tuple[Place, ItemKey, ItemRecord]


async def walk(backend: Backend, partition: int, table: str, after: Place | None, count: int) -> list[Found]:
    """The next live items after a place, `count` of them, fewer only at the end."""
    found: list[Found] = []
    while len(found) < count:
        values = await _values(backend, partition, table, after)
        if not values:
            return found
        if after is not None and values[0] != after.value:
            after = None
        for name in values:
            start = after.field if after is not None and after.value == name else None
            found += await _of_value(backend, table, name, start, count - len(found))
            if len(found) >= count:
                return found
            after = Place(name, b"\xff")
    return found


async def _values(backend: Backend, partition: int, table: str, after: Place | None) -> list[bytes]:
    """The partition-key values from a place's own on."""
    low = b"-" if after is None else (b"(" if after.field == b"\xff" else b"[") + after.value
    found: Any = await backend.commands.zrangebylex(
        backend.keys.values(partition, table), low, b"+", 0, VALUES_AT_A_TIME
    )
    return list(found)


async def _of_value(backend: Backend, table: str, name: bytes, start: bytes | None, count: int) -> list[Found]:
    value = value_of(name)
    items, order = backend.keys.items(table, value), backend.keys.order(table, value)
    if start is None and (raw := await backend.commands.hget(items, b"")) is not None:
        record = ItemRecord(*unpack(raw))  # of a table without a sort key: there is but one
        return [(Place(name, b""), ItemKey(table, value, None), record)] if record.item is not None else []
    found: list[Found] = []
    low, more = b"-" if start is None else b"(" + start, True
    while more and len(found) < count:
        page, more = await backend.functions.page(
            order, items, low, b"+", reverse=False, count=count - len(found), size_bytes=PAGE_BYTES
        )
        for field, raw in page:
            record = ItemRecord(*unpack(raw))
            if record.item is not None:
                found.append((Place(name, field), ItemKey(table, value, sort_value(field)), record))
            low = b"(" + field
    return found
