"""`changes`, `export` and `import`, from one stage into another, on each kind of server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tidewire.errors import ConfigurationError
from tidewire.model.records import Change, Position
from tidewire.redis.backend import Backend
from tidewire.redis.functions import NumberedCall, StreamBounds
from tidewire.services.cli import importer
from tidewire.services.cli.changes import Found, print_changes, starts
from tidewire.services.cli.exporter import export
from tidewire.services.cli.importer import import_
from tidewire.testing import Stage

from .conftest import Open, as_user, eventually

Lines = list[dict[str, Any]]

ITEMS: Lines = [
    *({"table": "lines", "item": {"page": f"p{n % 3}", "n": n / 2, "text": "é" * n}} for n in range(40)),
    *({"table": "notes", "item": {"id": f"n{n}", "owner": "alice", "deep": [{"a": None}, n]}} for n in range(40)),
    {"table": "notes", "item": {"id": 7, "owner": "bob"}},
    {"table": "secrets", "item": {"id": "s", "pin": "1234"}},
    {"table": "orders", "item": {"id": "o", "owner": "alice", "until": 4_000_000_000}},
]


def write(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def items(lines: Lines) -> list[str]:
    """What the lines are about, in an order of its own."""
    return sorted(json.dumps([line["table"], line["item"]], sort_keys=True) for line in lines)


async def changes(backend: Backend, table: str, after: Position | None = None) -> list[tuple[Position, Change]]:
    found: list[tuple[Position, Change]] = []

    def show(all_found: Iterable[Found], /, *, at_once: bool) -> None:
        found.extend((one.position, one.change) for one in all_found)

    await print_changes(
        backend,
        table,
        starts(backend.keys.partitions, [after] if after else []),
        show,
        follow=False,
        replaced=lambda: False,
    )
    return found


async def test_an_export_imported_elsewhere_gives_the_same_items(open_stage: Open, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    async with open_stage() as stage:
        await import_(stage.backend, write(tmp_path / "in.jsonl", ITEMS), 0)
        await export(stage.backend, (), first, resume=False)
    assert items(read(first)) == items(ITEMS)
    assert all((line["version"], line["by"]) == (1, "tidewire:import") for line in read(first))
    async with open_stage(partitions=3) as stage:
        await import_(stage.backend, first, 0)
        await export(stage.backend, (), second, resume=False)
        assert items(read(second)) == items(ITEMS)
        before = await changes(stage.backend, "lines")
        assert len(before) == 40, "each has its change"
        await import_(stage.backend, first, 0)
        assert await changes(stage.backend, "lines") == before, "an item that is there already makes none"
        await export(stage.backend, ["lines", "secrets"], second, resume=False)
        assert {line["table"] for line in read(second)} == {"lines", "secrets"}


async def test_an_export_goes_on_after_the_last_whole_line(stage: Stage, tmp_path: Path) -> None:
    await import_(stage.backend, write(tmp_path / "in.jsonl", ITEMS), 0)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    await export(stage.backend, (), whole, resume=False)
    for size in (0, 10, len(whole.read_bytes()) // 2, len(whole.read_bytes()) - 1, len(whole.read_bytes())):
        part.write_bytes(whole.read_bytes()[:size])
        await export(stage.backend, (), part, resume=True)
        assert part.read_bytes() == whole.read_bytes()


WRONG: list[tuple[Any, str]] = [
    ("{", "truncated"),
    ({"table": "lines", "item": {"page": "p"}}, "key attribute 'n'"),
    ({"table": "lines", "item": {"page": "p", "n": "a string"}}, "must be a number"),
    ({"table": "orders", "item": {"id": "o1"}}, "does not fit its schema"),
    ({"table": "notes", "item": {"id": "big", "text": "x" * 270_000}}, "at most 262144"),
    ({"table": "members", "item": {"room": "r", "user": 3}}, "the name of a user"),
]


async def test_a_faulty_line_is_named_and_all_before_it_is_done(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    for wrong, what in WRONG:
        file = write(tmp_path / "in.jsonl", [*ITEMS[:60], wrong, *ITEMS[60:]])
        with pytest.raises(ConfigurationError, match=r"60 lines are surely done.*--skip 60 .*--skip 61 without it"):
            await import_(stage.backend, file, 0)
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(file))]
        assert said.startswith(f"{file}:61: ")
        assert what in said
        await export(stage.backend, (), out, resume=False)
        assert set(items(ITEMS[:60])) <= set(items(read(out))) <= set(items(ITEMS)), "the line itself is not there"
    await import_(stage.backend, file, 61)
    await export(stage.backend, (), out, resume=False)
    assert items(read(out)) == items(ITEMS)


async def test_an_import_that_is_stopped_goes_on_where_it_says(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Lines = [{"table": "lines", "item": {"page": f"p{n % 7}", "n": n}} for n in range(2000)]
    file, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    work = asyncio.create_task(import_(stage.backend, file, 0))
    await eventually(lambda: changes(stage.backend, "lines"))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    said = capsys.readouterr().err
    skip = int(said.split("--skip ")[1].split()[0])
    await export(stage.backend, ["lines"], out, resume=False)
    assert set(items(lines[:skip])) <= set(items(read(out))), "what is said to be done is done"
    await import_(stage.backend, file, skip)
    await export(stage.backend, ["lines"], out, resume=False)
    assert items(read(out)) == items(lines)
    assert len(await changes(stage.backend, "lines")) == len(lines), "each was written once"


async def test_rows_that_find_no_room_are_sent_again(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue, refused = stage.backend.functions.enqueue, list[bytes]()

    async def crowded(stream: bytes, call: NumberedCall, bounds: StreamBounds, records: list[bytes]) -> int:
        if len(refused) < 4:
            refused.append(stream)
            return 0
        return await enqueue(stream, call, bounds, records)

    monkeypatch.setattr(stage.backend.functions, "enqueue", crowded)
    await import_(stage.backend, write(tmp_path / "in.jsonl", ITEMS), 0)
    monkeypatch.undo()
    assert len(refused) == 4
    out = tmp_path / "out.jsonl"
    await export(stage.backend, (), out, resume=False)
    assert items(read(out)) == items(ITEMS)
    pattern = f"{stage.backend.keys.stage}:{{g-import-*".encode()
    left = [key async for key in stage.backend.scan(pattern)]
    assert not left, "its replies are removed at the end"


async def test_without_a_store_it_ends_and_says_so(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(stream: bytes, call: NumberedCall, bounds: StreamBounds, records: list[bytes]) -> int:
        return 0

    monkeypatch.setattr(stage.backend.functions, "enqueue", full)
    monkeypatch.setattr(importer, "PATIENCE_S", 0.1)
    with pytest.raises(ConfigurationError, match="nothing was done"):
        await import_(stage.backend, write(tmp_path / "in.jsonl", ITEMS), 0)


async def test_changes_tell_who_wrote_what_and_go_on_after_a_position(stage: Stage) -> None:
    async with AsyncExitStack() as stack:
        alice = await as_user(stage, stack, "alice")
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        item = {"id": "n1", "owner": "alice"}
        await alice.do("put", table="notes", item=item, request="r1", traceparent=trace)
        second = await alice.do("put", table="notes", item=item | {"text": "b"})
        await alice.do("put", table="scores", item={"id": "s"})
        await alice.do("delete", table="notes", key="n1")
        found = await changes(stage.backend, "notes")
        assert [change.event for _, change in found] == ["INSERT", "MODIFY", "REMOVE"]
        first = found[0][1]
        assert (first.by, first.request, first.trace) == ("alice", "r1", trace)
        assert first.connection == alice.welcome["connection"]
        after = Position(*map(int, second["position"].split("-")))
        assert [change.event for _, change in await changes(stage.backend, "notes", after)] == ["REMOVE"]
