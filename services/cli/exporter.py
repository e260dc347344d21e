"""`tidewire export`: write the live items of tables, one JSON object per line, in an order that allows a resume."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
import typer

from tidewire.app import CONNECTIONS, Table
from tidewire.audiences import nobody
from tidewire.errors import BadRequest, ConfigurationError
from tidewire.model.records import Declaration
from tidewire.model.values import name_of
from tidewire.redis.backend import Backend
from tidewire.redis.keys import Keys
from tidewire.redis.walk import Found, WalkPosition, walk

from . import progress
from .output import write
from .reach import declaration_of, declarations

MAX_PAGE_ITEMS = 1000
PAGE_BYTES = 4 << 20
BLOCK_BYTES = 1 << 16
RESUME = ": the same command with --resume goes on"


class ExportedLine(msgspec.Struct):
    """The fields of a line. An import needs the first two."""

    table: str
    item: dict[str, Any]
    version: int = 0
    at: int = 0  # ms since 1970
    by: str = ""


class Mark(NamedTuple):
    """The progress of an export."""

    partition: int
    table: str
    place: WalkPosition


def table_of(name: str, declaration: Declaration) -> Table:
    """A table, as far as a stage knows it without its application."""
    return Table(name, tuple(declaration.key), nobody, nobody, expires=declaration.expires)


def chosen(named: Iterable[str], declared: Mapping[str, Declaration], stage: str) -> dict[str, Table]:
    """Return the tables to export, in the order of every export. Raises ConfigurationError."""
    names = set(named) or declared.keys() - {CONNECTIONS}
    return {name: table_of(name, declaration_of(name, declared, stage)) for name in sorted(names)}


async def export(
    backend: Backend, named: Iterable[str], output: Path | None, *, resume: bool, as_json: bool = False
) -> None:
    """Write the items as lines, and report how many.

    Raises:
        ConfigurationError: a table does not exist, or the file cannot be written or resumed.
    """
    tables, begun, items = chosen(named, await declarations(backend), backend.keys.stage), time.monotonic(), 0
    with _opened(output, resume=resume) as (file, last):
        mark = None if last is None else mark_of(last, tables, backend.keys, str(output))
        to_terminal = output is None and sys.stdout.isatty()
        name, advice = ("standard output", "") if output is None else (f"--output {output}", RESUME)
        try:
            async with contextlib.aclosing(pages(backend, tables, mark)) as found:
                total = await _total(backend, tables)
                with progress.shown("export", total, wanted=not (to_terminal or as_json)) as advance:
                    async for lines, count, done in found:
                        write(file, lines, name, advice)
                        items += count
                        advance(done, items)
        except asyncio.CancelledError:
            if output:
                typer.echo(f"stopped after {items:,} items{RESUME}", err=True)
            raise
    progress.report_end("exported", items, begun, as_json=as_json)


async def pages(
    backend: Backend, tables: Mapping[str, Table], mark: Mark | None
) -> AsyncGenerator[tuple[bytes, int, float], None]:
    """Yield the lines after a mark in batches: the lines, their count, and the partition-key values they complete."""
    now, done, at_a_time = await backend.now_ms(), 0.0, 100
    for partition in range(backend.keys.partitions):
        for name, table in tables.items():
            values = backend.keys.values(partition, name)
            all_values, passed = int(await backend.commands.zcard(values)), 0
            after = None
            if mark is not None and (partition, name) <= mark[:2]:
                if (partition, name) != mark[:2]:
                    done += all_values
                    continue
                after = mark.place
                passed = int(await backend.commands.zlexcount(values, b"-", b"[" + after.value))
            more = True
            while more:
                found = await walk(backend, partition, name, after, at_a_time)
                lines, count = _lines(table, found, now)
                passed += len({place.value for place, _, _ in found} - {after.value if after else b""})
                yield lines, count, done + min(passed, all_values)
                more = len(found) == at_a_time
                if found:
                    after = found[-1][0]
                    at_a_time = min(MAX_PAGE_ITEMS, len(found) * PAGE_BYTES // max(len(lines), 1) + 1)
            done += all_values


def _lines(table: Table, found: list[Found], now: int) -> tuple[bytes, int]:
    lines = [
        msgspec.json.encode(
            {"table": table.name, "item": record.item, "version": record.version, "at": record.at, "by": record.by}
        )
        for _, _, record in found
        if record.item is not None and not table.is_expired(record.item, now)
    ]
    return b"".join(line + b"\n" for line in lines), len(lines)


async def _total(backend: Backend, tables: Mapping[str, Table]) -> int:
    """Partition-key values of all tables."""
    keys = backend.keys
    values = [keys.values(partition, name) for partition in range(keys.partitions) for name in tables]
    return sum(await backend.calls([("ZCARD", key) for key in values]))


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def mark_of(line: bytes, tables: Mapping[str, Table], keys: Keys, file: str) -> Mark:
    """Return the place of a line's item. Raises ConfigurationError if no such export wrote the line."""
    try:
        last = msgspec.json.decode(line, type=ExportedLine)
        if last.table not in tables:
            raise ConfigurationError(
                f"--resume: the last line of {file} is of table {last.table!r}, which this export leaves out: "
                "name the same tables as before"
            )
        key = tables[last.table].key_of(last.item)
    except (msgspec.DecodeError, UnicodeDecodeError, BadRequest) as error:
        raise ConfigurationError(f"--resume: the last line of {file} is not one of an export: {error}") from None
    return Mark(keys.partition_of(key.partition), last.table, WalkPosition(name_of(key.partition), key.field))


def last_whole_line(file: BinaryIO) -> tuple[int, bytes | None]:
    """Return (end of the last whole line, that line). What follows the last newline is not a whole line."""
    end = _after_newline(file, file.seek(0, os.SEEK_END))
    if end == 0:
        return 0, None
    start = _after_newline(file, end - 1)
    file.seek(start)
    return end, file.read(end - start)


def _after_newline(file: BinaryIO, end: int) -> int:
    """Return the place just after the last newline before `end`."""
    while end > 0:
        start = max(end - BLOCK_BYTES, 0)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


@contextlib.contextmanager
def _opened(output: Path | None, *, resume: bool) -> Iterator[tuple[BinaryIO, bytes | None]]:
    """Return the file to write to, and the last line that it already holds."""
    if output is None:
        yield sys.stdout.buffer, None
        return
    try:
        file = open(output, "r+b" if resume and output.exists() else "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigurationError(f"--output {output}: {error.strerror}") from None
    try:
        last = None
        if resume:
            end, last = last_whole_line(file)
            file.seek(end)
        yield file, last
    finally:
        with contextlib.suppress(OSError):  # everything is flushed, or an error has been raised
            file.close()
