"""What a logged exception tells, and what it must not tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from tidewire.process.telemetry import configure_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_names_places_and_no_values(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(credential: str) -> None:
        raise RuntimeError("it failed")

    configure_logging(log_format)
    try:
        fail("tw_" + "a" * 3)
    except RuntimeError:
        structlog.get_logger("test").exception("task_died")
    logged = capsys.readouterr().err
    assert "task_died" in logged
    assert "it failed" in logged
    assert "in fail" in logged or '"name": "fail"' in logged, "it names the function"
    assert "tw_aaa" not in logged, "it names no value"
