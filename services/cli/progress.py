"""A progress bar on standard error, shown only on a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[float, int], None]
"""Takes how much of the total is done, and how many items that is."""


@contextlib.contextmanager
def shown(what: str, total: float | None, *, wanted: bool = True) -> Iterator[Advance]:
    """Show a bar while the block runs, if `wanted` and standard error is a terminal."""
    begun = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[items]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (wanted and sys.stderr.isatty())) as progress:
        task = progress.add_task(what, total=total, items="")

        def advance(done: float, items: int) -> None:
            progress.update(task, completed=done, items=rate(items, time.monotonic() - begun))

        yield advance


def rate(items: int, seconds: float) -> str:
    """For example "12,000 items, 4,000/s"."""
    return f"{items:,} item{'' if items == 1 else 's'}, {items / max(seconds, 0.001):,.0f}/s"


def report_end(done: str, items: int, begun: float, *, as_json: bool) -> None:
    """Report on standard error what was done since `begun` (monotonic seconds), for people or as JSON."""
    seconds = time.monotonic() - begun
    if as_json:
        typer.echo(json.dumps({done: items, "seconds": round(seconds, 3)}), err=True)
    else:
        typer.echo(f"{done} {rate(items, seconds)} ({seconds:.1f} s)", err=True)
