"""The commands that read and write a stage's data through Redis: changes, export and import."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidewire.errors import ConfigurationError

from .options import Data, Json, Redis, Stage, option

if TYPE_CHECKING:
    from tidewire.redis.backend import Backend

DATA = Path(".tidewire")


def changes(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="The table.")],
    after: Annotated[
        str | None,
        option("--from", "A position: begin after it, and in other partitions at its time.", shown="the oldest change"),
    ] = None,
    follow: Annotated[bool, option("--follow", "Go on with what is written, until Ctrl-C.")] = False,
    format_: Annotated[str, option("--format", "json, or dynamodb: as DynamoDB Streams has them.")] = "json",
    redis: Redis = None,
    data: Data = DATA,
    stage: Stage = None,
    as_json: Json = True,
) -> None:
    """Print a table's change records, the oldest first, one JSON object a line."""
    import msgspec

    from . import change_formats, reach
    from .changes import Found, print_changes
    from .output import write

    if format_ not in change_formats.FORMATS:
        raise typer.BadParameter("json or dynamodb", param_hint="--format")

    async def work(backend: Backend) -> None:
        keys = backend.keys
        declared = reach.declaration_of(table, await reach.declarations(backend), keys.stage)
        position = None if after is None else change_formats.parse_position(after, keys.partitions)

        def record(found: Found) -> dict[str, Any]:
            if format_ == "dynamodb":
                return change_formats.as_dynamodb(found.position, found.change, declared.stream_view, keys.stage)
            return change_formats.as_json(found.position, found.change, declared.stream_view)

        def show(all_found: Iterable[Found], /, *, at_once: bool) -> None:
            lines = b"".join(msgspec.json.encode(record(found)) + b"\n" for found in all_found)
            write(sys.stdout.buffer, lines, "standard output", at_once=at_once)

        await print_changes(backend, table, position, show, follow=follow)

    reach.with_redis(redis, data, stage, work)


def export(
    tables: Annotated[
        list[str] | None, typer.Argument(metavar="TABLE", help="The tables.", show_default="all but connections")
    ] = None,
    output: Annotated[Path | None, option("--output", "File to write.", shown="standard output")] = None,
    resume: Annotated[bool, option("--resume", "Go on in that file after its last whole line.")] = False,
    redis: Redis = None,
    data: Data = DATA,
    stage: Stage = None,
    as_json: Json = True,
) -> None:
    """Write all items as JSON lines: table, item, version, at (ms since 1970), by."""
    from . import exporter
    from .reach import with_redis

    if resume and output is None:
        raise ConfigurationError("--resume goes on in a file: name it with --output")

    async def work(backend: Backend) -> None:
        await exporter.export(backend, tables or (), output, resume=resume)

    with_redis(redis, data, stage, work)


def import_(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="JSON lines.", show_default="standard input")
    ] = None,
    skip: Annotated[int, option("--skip", "Lines that are done: begin after them.")] = 0,
    redis: Redis = None,
    data: Data = DATA,
    stage: Stage = None,
) -> None:
    """Write the items of JSON lines that have a table and an item, as `export` has them. Needs a running store."""
    import logging

    import structlog

    from . import importer
    from .reach import with_redis

    if skip < 0:
        raise typer.BadParameter("0 or more", param_hint="--skip")
    # The bus logs what it could not send; here it is sent again, or the end says what was wrong.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

    async def work(backend: Backend) -> None:
        await importer.import_(backend, file, skip)

    with_redis(redis, data, stage, work)
