"""The options of the command line: each one has an environment variable, and the same one in every command."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from tidewire.services.cli.main import app

OF_THE_PARSER = {"--help", "--version"}
WS_URL = ("listen", "--url")
"""The address that one command needs is another one than that of the others with this option."""


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{path} {name}".strip())


OPTIONS = [
    (path, flag, parameter)
    for path, command in commands(typer.main.get_command(app))
    for parameter in command.params
    for flag in parameter.opts
    if parameter.param_type_name == "option" and flag not in OF_THE_PARSER
]


def test_there_are_options() -> None:
    assert len(OPTIONS) > 60


@pytest.mark.parametrize(("path", "flag", "option"), OPTIONS, ids=[f"{path} {flag}" for path, flag, _ in OPTIONS])
def test_an_option_can_be_given_as_an_environment_variable(path: str, flag: str, option: Any) -> None:
    variable = "TIDEWIRE_" + flag.removeprefix("--").replace("-", "_").upper()
    assert option.envvar == ("TIDEWIRE_WS_URL" if (path, flag) == WS_URL else variable)
    assert option.help


def test_an_option_is_described_alike_in_all_commands() -> None:
    found = defaultdict[str, set[str]](set)
    for path, flag, option in OPTIONS:
        if (path, flag) != WS_URL:
            found[flag].add(option.help)
    differing = {flag for flag, texts in found.items() if len(texts) > 1}
    assert differing == {"--redis", "--json"}, "`up` may start a server; export and import show progress"
