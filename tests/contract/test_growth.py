"""Nothing in Redis grows without bound: after many writes and deletes, each remaining key is checked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.helpers import LONG
from tidewire import App, everyone, testing
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys
from tidewire.testing import Stage

from .conftest import eventually

WRITES = 100_000 if LONG else 4_000
WRITES_BATCH = 50
KEPT = "kept"
KEYS = Keys("growth", 2)


def make_app() -> App:
    app = App("growth")
    app.membership("members", group="room", member="user", readers=everyone, writers=everyone)
    app.table("lines", key=("page", "n"), readers=everyone, indexes={"by_owner": ("owner", "n")})
    app.table("notes", key="id", expires="until")
    return app


def items(group: str) -> list[tuple[str, dict[str, Any]]]:
    """What is written to one partition-key value, table by table."""
    members = [("members", {"room": group, "user": f"u{n}"}) for n in range(WRITES_BATCH // 2)]
    lines = [("lines", {"page": group, "n": n, "owner": f"o{n}"}) for n in range(WRITES_BATCH // 2 - 1)]
    return [*members, *lines, ("notes", {"id": group, "until": 4_000_000_000})]


def expected() -> set[bytes]:
    """Return the keys that may remain."""
    partitions = range(KEYS.partitions)
    stage = {KEYS.stage_settings(), KEYS.tables(), KEYS.sort_kinds(), KEYS.services(), KEYS.credentials()}
    stage |= {KEYS.authorizations(), KEYS.revocations(), KEYS.applications(), KEYS.dependents()}
    stage.add(KEYS.group_versions(KEYS.partition_of(KEPT)))
    for partition in partitions:
        stage |= {KEYS.partition(partition), KEYS.links(partition), KEYS.indexes(partition)}
        stage |= {KEYS.commands(partition), KEYS.changes(partition)}
        stage |= {KEYS.lease(partition, group) for group in ("store", "broadcaster", "indexer")}
    kept = set()
    for table, item in items(KEPT):
        value = next(iter(item.values()))
        kept |= {KEYS.items(table, value), KEYS.values(KEYS.partition_of(value), table)}
        if table != "notes":
            kept.add(KEYS.order(table, value))
            kept |= set(KEYS.index(table, _indexed(table), item[_indexed(table)[0]]))
    kept |= {KEYS.members("members", KEPT), KEYS.expiries(KEYS.partition_of(KEPT))}
    return stage | kept


def _indexed(table: str) -> tuple[str, str]:
    return ("user", "room") if table == "members" else ("owner", "n")


@pytest.mark.real
async def test_many_writes_and_deletes_leave_nothing_behind(server: str) -> None:
    backend = await connect(server, KEYS)
    settings = {"changes_retention_s": 1.0, "request_window_s": 1.0, "request_timeout_s": 3.0}
    async with testing.run(
        make_app(), backend=backend, stage=KEYS.stage, partitions=KEYS.partitions, resume_window_s=2, **settings
    ) as stage:
        written = 0
        writer = await stage.client("writer", role="service")

        async def write_and_delete(group: str) -> int:
            rows = items(group)
            puts = [{"action": "put", "table": table, "item": item} for table, item in rows]
            await writer.transact(*puts)
            if group == KEPT:
                return len(rows)
            deletes = [
                {"action": "delete", "table": table, "key": {name: item[name] for name in _key(table)}}
                for table, item in rows
            ]
            await writer.transact(*deletes)
            return 2 * len(rows)

        written += await write_and_delete(KEPT)
        number = 0
        while written < WRITES:
            groups = [f"g{number + n}" for n in range(8)]
            number += len(groups)
            written += sum(await asyncio.gather(*map(write_and_delete, groups)))
        print(f"{written} writes")
        await writer.__aexit__()
        await eventually_only(stage)


def _key(table: str) -> tuple[str, ...]:
    return {"members": ("room", "user"), "lines": ("page", "n"), "notes": ("id",)}[table]


async def eventually_only(stage: Stage) -> None:
    redis = stage.backend.commands
    prefix, reasons = KEYS.stage.encode() + b":", expected()

    async def strangers() -> dict[bytes, Any]:
        found: dict[bytes, Any] = {}
        async for key in redis.scan_iter(match=prefix + b"*", count=1000):
            ttl_ms = await redis.pttl(key)
            # What gateways have sent and been answered has a TTL.
            if key not in reasons and not ((key.endswith(b":replies") or b":sent:" in key) and ttl_ms > 0):
                found[key] = ttl_ms
        for partition in range(KEYS.partitions):
            for stream in (KEYS.commands(partition), KEYS.changes(partition)):
                if length := await redis.xlen(stream):
                    found[stream] = length
            if fields := set(await redis.hkeys(KEYS.partition(partition))) - {
                b"floor",
                b"server",
                b"passed",
                b"newest",
                b"indexed",
                b"expires",
            }:
                found[KEYS.partition(partition)] = fields
        if await redis.xlen(KEYS.authorizations()) > 1:
            found[KEYS.authorizations()] = "grows"
        return found

    last: dict[bytes, Any] = {}

    async def none() -> bool:
        nonlocal last
        last = await strangers()
        return not last

    try:
        await eventually(none)
    except TimeoutError:
        raise AssertionError(f"left without a reason: {sorted(last.items())[:20]}, {len(last)} in all") from None
    versions = KEYS.group_versions(KEYS.partition_of(KEPT))
    assert await redis.hkeys(versions) == [KEYS.group_field("members", KEPT)]
    for table, item in items(KEPT):
        value = next(iter(item.values()))
        assert await redis.hlen(KEYS.items(table, value)) == sum(
            1 for other, row in items(KEPT) if other == table and next(iter(row.values())) == value
        )
