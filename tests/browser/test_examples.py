"""The small examples in a browser, as their READMEs say."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from tidewire.examples.notify.backend import work

pytestmark = [pytest.mark.browser, pytest.mark.real]

WAIT = 30_000
SHOTS = os.environ.get("TIDEWIRE_TEST_SCREENSHOTS")


async def opened(browser: Browser, url: str) -> Page:
    page = await (await browser.new_context(viewport={"width": 900, "height": 600})).new_page()
    page.on("pageerror", lambda error: pytest.fail(f"an error in the page: {error}"))
    await page.goto(url)
    return page


async def shot(page: Page, name: str) -> None:
    if SHOTS:
        await page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


async def test_two_people_share_a_board_and_see_each_other(new_up: Any, browser: Browser) -> None:
    up = new_up("tidewire.examples.board.app:app")
    alice, bob = [await opened(browser, f"{up.http}/#key={up.keys()[user]}&board=plans") for user in ("alice", "bob")]
    for page in (alice, bob):
        await expect(page.locator("#people")).to_have_text("Online: alice, bob", timeout=WAIT)
    await alice.get_by_label("New card").fill("Write the release notes")
    await alice.get_by_role("button", name="Add").click()
    card = bob.get_by_role("region", name="To do").get_by_text("Write the release notes")
    await expect(card).to_be_visible(timeout=WAIT)

    os.kill(await up.pid("gateway"), signal.SIGKILL)  # the event streams resume at the next gateway
    await expect(bob.locator("#people")).to_have_text("Online: alice, bob", timeout=WAIT)
    await bob.get_by_role("button", name="Move on: Write the release notes").click()
    moved = alice.get_by_role("region", name="Doing").get_by_text("Write the release notes")
    await expect(moved).to_be_visible(timeout=WAIT)
    await shot(alice, "board")

    await bob.close()
    await expect(alice.locator("#people")).to_have_text("Online: alice", timeout=WAIT)


async def test_a_backend_reports_to_a_user(new_up: Any, browser: Browser) -> None:
    up = new_up("tidewire.examples.notify.app:app")
    page = await opened(browser, f"{up.http}/#key={up.keys()['alice']}")
    await work(up.url, up.key("backend", "--role", "service"), "alice", step_s=0.05)
    await expect(page.locator("#messages li")).to_have_count(1, timeout=WAIT)
    await expect(page.locator("progress")).to_have_attribute("value", "5")
    await shot(page, "notify")


async def test_a_page_without_a_key_says_where_one_comes_from(new_up: Any, browser: Browser) -> None:
    up = new_up("tidewire.examples.notify.app:app")
    page = await opened(browser, f"{up.http}/")
    await expect(page.locator("#problem")).to_contain_text("tidewire keys create", timeout=WAIT)
