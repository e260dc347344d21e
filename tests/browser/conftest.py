"""Chromium, driven by Playwright, against a real `tidewire up`."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.conftest import new_up

__all__ = ["new_up"]

MODULES = Path(__file__).parent / "node_modules"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def needed(what: str, present: object, how: str) -> None:
    """Skip the test and print what is missing. Fail if the browser is required."""
    if present:
        return
    message = f"{what} is missing: {how}"
    if os.environ.get("TIDEWIRE_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    needed("Chromium", path, "apt-get install chromium, for the tests of the page")
    assert path
    return path


@pytest.fixture
def modules() -> Path:
    """The npm packages of package.json."""
    needed("tests/browser/node_modules", MODULES.is_dir(), "npm ci --prefix tests/browser")
    return MODULES


@pytest.fixture
def node() -> str:
    path = shutil.which("node")
    needed("node", path, "apt-get install nodejs npm")
    assert path
    return path


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[object]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        await launched.close()
