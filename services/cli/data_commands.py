"""The commands that reach a stage's data through Redis: `changes`, `export` and `import`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidewire.errors import ConfigurationError

from .options import DATA, DataOption, JsonOption, JsonReportOption, RedisOption, StageOption, TableArgument, option

if TYPE_CHECKING:
    from tidewire.redis.backend import Backend


def changes(
    table: TableArgument,
    after: Annotated[
        list[str] | None,
        option(
            "--from",
            "A position: begin after it. May be repeated, once for each partition. Other partitions begin at its time.",
            shown="the oldest change",
        ),
    ] = None,
    follow: Annotated[bool, option("--follow", "Continue with new changes, until Ctrl-C.")] = False,
    format_: Annotated[str, option("--format", "json, or dynamodb: records as DynamoDB Streams has them.")] = "json",
    redis: RedisOption = None,
    data: DataOption = DATA,
    stage: StageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a table's change records, the oldest first, one JSON object per line."""
    from .change_formats import FORMATS
    from .changes import Printer

    if format_ not in FORMATS:
        raise typer.BadParameter("json or dynamodb", param_hint="--format")
    Printer(table, after or [], format_, follow=follow, as_json=as_json).run(redis, data, stage)


def export(
    tables: Annotated[
        list[str] | None, typer.Argument(metavar="TABLE", help="The tables.", show_default="all but connections")
    ] = None,
    output: Annotated[Path | None, option("--output", "File to write.", shown="standard output")] = None,
    resume: Annotated[bool, option("--resume", "Go on in that file after its last whole line.")] = False,
    redis: RedisOption = None,
    data: DataOption = DATA,
    stage: StageOption = None,
    as_json: JsonReportOption = False,
) -> None:
    """Write all items as JSON lines: table, item, version, at (ms since 1970), by."""
    from . import exporter
    from .reach import with_redis

    if resume and output is None:
        raise ConfigurationError("--resume goes on in a file: name it with --output")

    async def work(backend: Backend) -> None:
        await exporter.export(backend, tables or (), output, resume=resume, as_json=as_json)

    with_redis(redis, data, stage, work)


def import_(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="JSON lines.", show_default="standard input")
    ] = None,
    skip: Annotated[int, option("--skip", "Number of lines at the beginning that are done already.")] = 0,
    redis: RedisOption = None,
    data: DataOption = DATA,
    stage: StageOption = None,
    as_json: JsonReportOption = False,
) -> None:
    """Write the items of JSON lines, each with a table and an item, as `export` prints them. Needs a running store."""
    import logging

    import structlog

    from . import importer
    from .reach import with_redis

    if skip < 0:
        raise typer.BadParameter("0 or more", param_hint="--skip")
    # The bus logs a failed send. This command sends again, or ends with an error, so the log would only confuse.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))

    async def work(backend: Backend) -> None:
        await importer.import_(backend, file, skip, as_json=as_json)

    with_redis(redis, data, stage, work)
