"""A locale that orders text otherwise than by its bytes, for servers under test.

Redis and Valkey call `setlocale(LC_COLLATE, "")`, and Lua's `<` on strings is `strcoll`. Most developers' machines and
containers run under C or C.UTF-8, where both orders are the same, so no test there meets the difference.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

NAME = "en_US.UTF-8"
REQUIRED = os.environ.get("TIDEWIRE_REQUIRE_LOCALE") == "1"
"""Whether tests fail on a machine without the locale, as in CI."""
HOW = f"{NAME} cannot be compiled here: on Debian, `apt-get install locales`"


class NoLocale(Exception):
    """The machine lacks the locale and the means to compile it. The message says what to install."""


@functools.cache
def compiled() -> Mapping[str, str]:
    """Environment variables under which a process runs in the locale. Raises NoLocale.

    The locale is compiled into a folder of this run, so nothing is installed and no privilege is needed.
    """
    folder = Path(tempfile.gettempdir()) / f"tidewire-locales-{os.getuid()}"
    if not (folder / NAME / "LC_COLLATE").exists():
        with tempfile.TemporaryDirectory(prefix="locale-") as made:
            command = ["localedef", "-i", "en_US", "-f", "UTF-8", f"{made}/{NAME}"]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise NoLocale(HOW) from error
            folder.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(OSError):  # another run was faster
                (Path(made) / NAME).rename(folder / NAME)
    return {"LOCPATH": str(folder), "LC_ALL": NAME}


def needed() -> Mapping[str, str]:
    """Like `compiled`, but without the locale, skip the test, or fail it under TIDEWIRE_REQUIRE_LOCALE=1."""
    try:
        return compiled()
    except NoLocale as error:
        if REQUIRED:
            pytest.fail(f"{error} (TIDEWIRE_REQUIRE_LOCALE=1)")
        pytest.skip(str(error))


def if_possible() -> Mapping[str, str]:
    """Like `compiled`, but without the locale, print so and return nothing. Raises NoLocale if it is required."""
    try:
        return compiled()
    except NoLocale as error:
        if REQUIRED:
            raise
        print(f"servers run without a locale: {error}")
        return {}


@contextlib.contextmanager
def inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """Give these variables to the processes that are started in this block."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
