"""Writing what a command prints, so that a full disk is one sentence, and a reader who has left is none."""

from __future__ import annotations

from typing import BinaryIO

from tidewire.errors import ConfigurationError


def write(file: BinaryIO, data: bytes, name: str, advice: str = "", *, at_once: bool = True) -> None:
    """All of it; `at_once` it is there, should this process be killed.

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
