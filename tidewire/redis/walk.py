"""Walks through all items of a table in one partition, in the order of their keys, which writes do not disturb.

Many partition-key values are read at once, because a table may have millions of them with one item each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from redis.exceptions import ResponseError

from tidewire.model.records import ItemRecord, unpack
from tidewire.model.values import ItemKey, sort_value, value_of
from tidewire.redis.backend import Backend
from tidewire.redis.functions import versioned

VALUES_BATCH = 128
"""Partition-key values read at once: few enough that their items fit into memory if all have the maximum size."""
PAGE_BYTES = 4 << 20


class WalkPosition(NamedTuple):
    """The position of an item in the walk."""

    value: bytes
    """The partition-key value, as `name_of` writes it."""
    field: bytes
    """The sort key, as `sort_bytes` writes it; empty in a table without one."""


Found = tuple[WalkPosition, ItemKey, ItemRecord]
CommandTuple = tuple[bytes | str | int, ...]


async def walk(backend: Backend, partition: int, table: str, after: WalkPosition | None, count: int) -> list[Found]:
    """Return the next `count` live items after a position, fewer only at the end."""
    found: list[Found] = []
    last = None if after is None else after.value
    is_sorted = None if after is None else bool(after.field)  # unknown before the first item
    if after is not None and is_sorted:
        found += await _rest(backend, table, after, count)
    while len(found) < count:
        names = await _values(backend, partition, table, last)
        if not names:
            break
        items: list[Found] = []
        if not is_sorted:
            items = await _alone(backend, table, names)
        if is_sorted is not False and not items:
            items = await _in_order(backend, table, names, count - len(found))
        found += items[: count - len(found)]
        if items:
            is_sorted = bool(items[0][0].field)
        last = names[-1]
    return found


async def _values(backend: Backend, partition: int, table: str, after: bytes | None) -> list[bytes]:
    """Return the next partition-key values."""
    low = b"-" if after is None else b"(" + after
    values = backend.keys.values(partition, table)
    found: Any = await backend.commands.zrangebylex(values, low, b"+", 0, VALUES_BATCH)
    return list(found)


async def _alone(backend: Backend, table: str, names: list[bytes]) -> list[Found]:
    """Return the live items of these values in a table without a sort key, or [] in one with it."""
    values = [value_of(name) for name in names]
    records = await _ask(backend, [("HGET", backend.keys.items(table, value), b"") for value in values])
    return [
        (WalkPosition(name, b""), ItemKey(table, value, None), record)
        for name, value, raw in zip(names, values, records, strict=True)
        if raw is not None and (record := ItemRecord(*unpack(raw))).item is not None
    ]


async def _in_order(backend: Backend, table: str, names: list[bytes], count: int) -> list[Found]:
    """Return the live items of these values in a table with a sort key: at least `count`, or all."""
    keys, wanted, size = backend.keys, list[bytes](), 0
    counts = await _ask(backend, [("ZCARD", keys.order(table, value_of(name))) for name in names])
    for name, items in zip(names, counts, strict=True):
        if size >= count:
            break
        if items:
            wanted.append(name)
            size += items
    size_bytes = PAGE_BYTES // max(len(wanted), 1)
    calls: list[CommandTuple] = []
    for name in wanted:
        value = value_of(name)
        # Ask for `count` items, not for as many as were counted: an item may have been added since, before the others.
        range_ = (b"-", b"+", 0, count, size_bytes)
        calls.append(("FCALL", versioned("page"), 2, keys.order(table, value), keys.items(table, value), *range_))
    found: list[Found] = []
    for name, (cut, *flat) in zip(wanted, await _ask(backend, calls), strict=True):
        found += _found(table, name, zip(flat[::2], flat[1::2], strict=True))
        if cut and len(found) < count:
            found += await _rest(backend, table, WalkPosition(name, flat[-2]), count - len(found))
        if len(found) >= count:
            break
    return found


async def _rest(backend: Backend, table: str, after: WalkPosition, count: int) -> list[Found]:
    """Return the live items of one value after a position."""
    value = value_of(after.value)
    order, items = backend.keys.order(table, value), backend.keys.items(table, value)
    found: list[Found] = []
    low, more = b"(" + after.field, True
    while more and len(found) < count:
        page, more = await backend.functions.page(
            order, items, low, b"+", reverse=False, count=count - len(found), size_bytes=PAGE_BYTES
        )
        found += _found(table, after.value, page)
        if page:
            low = b"(" + page[-1][0]
    return found


def _found(table: str, name: bytes, page: Iterable[tuple[bytes, bytes]]) -> list[Found]:
    value = value_of(name)
    return [
        (WalkPosition(name, field), ItemKey(table, value, sort_value(field)), record)
        for field, raw in page
        if (record := ItemRecord(*unpack(raw))).item is not None
    ]


async def _ask(backend: Backend, calls: list[CommandTuple]) -> list[Any]:
    """Call in one round trip; on a cluster, one to each node."""
    if not calls:
        return []
    try:
        return await backend.calls(calls)
    except ResponseError as error:
        if "function not found" not in str(error).lower():
            raise
    await backend.functions.load()
    return await backend.calls(calls)
