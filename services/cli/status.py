"""`tidewire status`: the live services, what each owns, and how far behind it is."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from tidewire.model.records import unpack
from tidewire.process.lag import lag_of, streams_of, total_lag
from tidewire.process.registry import all_services
from tidewire.redis.backend import Backend
from tidewire.redis.connect import NO_EVICTION
from tidewire.redis.keys import ConsumerGroup, LeaseField, PartitionField

PARTITIONED = (ConsumerGroup.STORE, ConsumerGroup.INDEXER, ConsumerGroup.BROADCASTER)


async def owners(backend: Backend, group: str) -> dict[int, str | None]:
    """Return each partition's owner while its lease runs, or None."""
    keys = backend.keys
    now = await backend.now_ms()
    names = (keys.lease(partition, group) for partition in range(keys.partitions))
    leases = await backend.calls([("HMGET", name, LeaseField.OWNER, LeaseField.EXPIRES) for name in names])
    return {
        partition: owner.decode() if owner and int(expires or 0) > now else None
        for partition, (owner, expires) in enumerate(leases)
    }


async def collect(backend: Backend) -> dict[str, Any]:
    """Return the whole status, as `--json` prints it."""
    keys = backend.keys
    services = [
        {"id": service.id, "alive": service.alive, "silent_ms": max(service.silent_ms, 0), **service.info}
        for service in (await all_services(backend)).values()
    ]
    groups: dict[str, Any] = {}
    for group in PARTITIONED:
        found = await asyncio.gather(*(lag_of(backend, stream, group) for stream in streams_of(keys, group)))
        if group == ConsumerGroup.INDEXER and not any(found):
            continue  # no table has an index
        numbers, holders = [one or (0, 0) for one in found], await owners(backend, group)
        groups[group] = {
            "lag": sum(lag for lag, _ in numbers),
            "pending": sum(pending for _, pending in numbers),
            "partitions": [
                {"partition": partition, "owner": holders[partition], "lag": lag, "pending": pending}
                for partition, (lag, pending) in enumerate(numbers)
            ],
        }
    lag, pending = await total_lag(backend, ConsumerGroup.AUTHORIZER)
    groups[ConsumerGroup.AUTHORIZER] = {"lag": lag, "pending": pending, "partitions": []}
    return {
        "stage": keys.stage,
        "partitions": keys.partitions,
        "connections": sum(service.get("connections", 0) for service in services if service["alive"]),
        "services": sorted(services, key=lambda service: (service["kind"], service["id"])),
        "groups": groups,
        "redis": await _redis(backend),
        "indexes": await _indexes(backend),
        "warnings": await _warnings(backend),
    }


async def _warnings(backend: Backend) -> list[str]:
    policy = await backend.may_evict()
    return [f"maxmemory-policy is {policy}: {NO_EVICTION}"] if policy else []


async def _redis(backend: Backend) -> list[dict[str, Any]]:
    """Return for each partition its node, and when it last fell back and when its feeds last began anew (ms, or 0)."""
    keys, found = backend.keys, []
    for partition in range(keys.partitions):
        name = keys.partition(partition)
        went_back, feeds = await backend.commands.hmget(name, PartitionField.GENERATION, PartitionField.FEEDS)
        node = await backend.address_of(name)
        times = {"went_back": int(went_back or 0), "feeds_begun": int(feeds or 0)}
        found.append({"partition": partition, "node": node} | times)
    return found


async def _indexes(backend: Backend) -> list[dict[str, Any]]:
    """Return each index, and how many of its table's partition-key values have filled it."""
    keys, found = backend.keys, dict[tuple[str, str, str], list[float]]()
    for partition in range(keys.partitions):
        for field, raw in (await backend.commands.hgetall(keys.indexes(partition))).items():
            table, *attributes = unpack(field)
            add, place, done, *_ = unpack(raw)
            if add:
                share = 1.0 if done else await _share(backend, keys.values(partition, table), place)
                found.setdefault((table, *attributes), []).append(share)
    return [
        {"table": table, "attributes": [first, second], "filled": round(sum(shares) / keys.partitions, 3)}
        for (table, first, second), shares in sorted(found.items())
    ]


async def _share(backend: Backend, values: bytes, place: Any) -> float:
    if place is None:
        return 0.0
    done = await backend.commands.zlexcount(values, "-", b"[" + place[0])
    return float(done) / max(await backend.commands.zcard(values), 1)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(" ", "seconds")


def show(status: dict[str, Any]) -> None:
    """Print the status for people."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"stage [bold]{status['stage']}[/], {status['partitions']} partitions, connections: {status['connections']}"
    )
    services = Table("service", "id", "alive", "host", "pid", "admin", "partitions", "commits", "connections", box=None)
    for service in status["services"]:
        services.add_row(
            service["kind"],
            service["id"],
            "yes" if service["alive"] else f"no, for {service['silent_ms'] / 1000:.0f} s",
            str(service["host"]),
            str(service["pid"]),
            str(service.get("admin_port", "")),
            " ".join(map(str, service.get("partitions", []))),
            str(service.get("commits", "")),
            str(service.get("connections", "")),
        )
    console.print(services)
    groups = Table("group", "lag", "pending", "partitions without an owner", box=None)
    for group, numbers in status["groups"].items():
        orphans = [str(one["partition"]) for one in numbers["partitions"] if one["owner"] is None]
        groups.add_row(group, str(numbers["lag"]), str(numbers["pending"]), " ".join(orphans) or "none")
    console.print(groups)
    nodes: dict[str, list[str]] = {}
    for one in status["redis"]:
        nodes.setdefault(one["node"], []).append(str(one["partition"]))
    for node, partitions in sorted(nodes.items()):
        console.print(f"Redis at {node}: partitions {' '.join(partitions)}")
    for what, field in (("Redis last restarted or failed over", "went_back"), ("all feeds began anew", "feeds_begun")):
        times: dict[str, list[str]] = {}
        for one in status["redis"]:
            if one[field]:
                times.setdefault(_time(one[field]), []).append(str(one["partition"]))
        for time, partitions in sorted(times.items()):
            console.print(f"{what} at {time}: partitions {' '.join(partitions)}")
    filling = [index for index in status["indexes"] if index["filled"] < 1]
    for warning in status["warnings"]:
        console.print(f"[yellow]warning[/]: {warning}")
    for index in filling:
        console.print(f"index {index['table']} {index['attributes']}: filled to {index['filled']:.0%}")
