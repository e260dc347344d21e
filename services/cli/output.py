"""What a command prints to standard output."""

from __future__ import annotations

import sys
from typing import Any, BinaryIO

import msgspec

from tidewire.errors import ConfigurationError


def write(file: BinaryIO, data: bytes, name: str, advice: str = "", *, at_once: bool = True) -> None:
    """Write all of the text. With `at_once` it is there even if this process is killed.

    Raises ConfigurationError naming the file, or BrokenPipeError.
    """
    try:
        file.write(data)
        if at_once:
            file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigurationError(f"{name}: {error.strerror}{advice}") from None


def show(value: Any, *, as_json: bool, indent: int | None = 2, at_once: bool = True) -> None:
    """Print a JSON value, coloured and indented on a terminal. Elsewhere, or with `as_json`, print one compact line."""
    if as_json or not sys.stdout.isatty():
        write(sys.stdout.buffer, msgspec.json.encode(value) + b"\n", "standard output", at_once=at_once)
        return
    from rich.console import Console

    Console(soft_wrap=True).print_json(data=value, indent=indent)


def flush() -> None:
    """Flush everything printed so far."""
    write(sys.stdout.buffer, b"", "standard output")
