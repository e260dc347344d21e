"""The event loops of the unit tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

ON_UVLOOP = ("test_conformance.py", "test_websocket.py")
"""Tests of sockets, on the loop that the services run on. The contract tests have asyncio's own."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Name the loop of a test."""
    if item.path.name in ON_UVLOOP:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
