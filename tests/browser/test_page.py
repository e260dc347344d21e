"""The chat as people use it, and clients that have nothing of ours."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, WebSocketRoute, expect

pytestmark = pytest.mark.browser

SIZES = [(375, 667), (1280, 800)]
SECONDS = 1000
WAIT = 30 * SECONDS


async def opened(browser: Browser, link: str, size: tuple[int, int] = (1280, 800)) -> Page:
    """The chat in a browser of its own, connected."""
    context = await browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = await context.new_page()
    page.on("pageerror", lambda error: pytest.fail(f"an error in the page: {error}"))
    await page.goto(link)
    await expect(page.get_by_test_id("status")).to_contain_text("Connected", timeout=WAIT)
    return page


def links(up: Any) -> dict[str, str]:
    keys = up.keys()
    return {user: f"{up.http}/#key={keys[user]}&room=lobby&ws={up.ws_port}" for user in ("alice", "bob")}


async def say(page: Page, text: str) -> None:
    box = page.get_by_test_id("composer").locator("textarea, input").first
    await box.fill(text)
    await page.get_by_test_id("send").click()


def message(page: Page, text: str) -> Any:
    return page.get_by_test_id("message").filter(has_text=text)


async def test_two_people_chat_and_miss_nothing_while_the_gateway_dies(new_up: Any, browser: Browser) -> None:
    up = new_up()
    alice, bob = [await opened(browser, link) for link in links(up).values()]
    await expect(alice.get_by_test_id("room-title")).to_contain_text("Lobby", timeout=WAIT)
    await expect(alice.locator('[data-testid=member][data-user=bob][data-online="true"]')).to_have_count(
        1, timeout=WAIT
    )
    await say(alice, "good morning, bob")
    await expect(message(bob, "good morning, bob")).to_have_count(1, timeout=WAIT)
    os.kill(await up.pid("gateway"), signal.SIGKILL)
    await say(bob, "good morning, alice")  # into the gap: it is sent when the connection is back
    await expect(message(alice, "good morning, alice")).to_have_count(1, timeout=WAIT)
    await say(alice, "still here?")
    await expect(message(bob, "still here?")).to_have_count(1, timeout=WAIT)
    await expect(message(bob, "good morning")).to_have_count(2, timeout=WAIT)


async def test_there_is_nothing_to_write_in_before_there_is_a_room(new_up: Any, browser: Browser) -> None:
    """Who is quick would otherwise lose the words typed before the rooms were loaded."""
    up = new_up()
    page = await (await browser.new_context()).new_page()
    held: list[tuple[WebSocketRoute, str | bytes]] = []
    loads = asyncio.Event()

    def from_gateway(socket: WebSocketRoute, frame: str | bytes) -> None:
        if loads.is_set() or json.loads(frame)["type"] == "welcome":
            socket.send(frame)
        else:
            held.append((socket, frame))

    def between(socket: WebSocketRoute) -> None:
        socket.connect_to_server().on_message(lambda frame: from_gateway(socket, frame))

    await page.route_web_socket(re.compile("/v1"), between)
    await page.goto(links(up)["alice"])
    await expect(page.get_by_test_id("status")).to_contain_text("Connected", timeout=WAIT)
    await expect(page.get_by_test_id("composer")).to_be_hidden(timeout=WAIT)
    loads.set()
    for socket, frame in held:
        socket.send(frame)
    await say(page, "quick as the wind")
    await expect(message(page, "quick as the wind")).to_have_count(1, timeout=WAIT)


async def test_one_creates_a_room_and_invites(new_up: Any, browser: Browser) -> None:
    up = new_up()
    alice, bob = [await opened(browser, link) for link in links(up).values()]
    await alice.get_by_test_id("new-room-name").fill("Garden")
    await alice.get_by_test_id("create-room").click()
    await expect(alice.get_by_test_id("room-title")).to_contain_text("Garden", timeout=WAIT)
    await alice.get_by_test_id("invite-name").fill("bob")
    await alice.get_by_test_id("invite").click()
    await expect(bob.get_by_test_id("room-list")).to_contain_text("Garden", timeout=WAIT)
    await bob.get_by_test_id("room-list").get_by_text("Garden").click()
    await say(bob, "what a garden")
    await expect(message(alice, "what a garden")).to_have_count(1, timeout=WAIT)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
async def test_the_page_fits_and_is_accessible(
    new_up: Any, browser: Browser, modules: Path, size: tuple[int, int], tmp_path: Path
) -> None:
    up = new_up()
    page = await opened(browser, links(up)["alice"], size)
    await say(page, "a word that is too long for any screen: " + "tidewire" * 40)
    await expect(message(page, "too long")).to_have_count(1, timeout=WAIT)
    for state in ("closed", "open"):
        menu = page.get_by_test_id("menu")
        if state == "open":
            if not await menu.is_visible():
                continue
            await menu.click()
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0], f"it scrolls sideways: {width} > {size[0]}, the menu is {state}"
        await page.add_script_tag(path=modules / "axe-core" / "axe.min.js")
        found = await page.evaluate("axe.run()")
        serious = [one for one in found["violations"] if one["impact"] in ("serious", "critical")]
        shown = [(one["id"], one["help"], one["nodes"][0]["html"][:200]) for one in serious]
        assert serious == [], f"axe-core, the menu is {state}: {shown}"
        await page.screenshot(path=tmp_path / f"{size[0]}-{state}.png")


async def test_without_a_key_or_with_a_wrong_one_it_asks_for_one(new_up: Any, browser: Browser) -> None:
    up = new_up()
    page = await (await browser.new_context()).new_page()
    await page.goto(up.http)
    await expect(page.get_by_test_id("key-form")).to_be_visible(timeout=WAIT)
    page = await (await browser.new_context()).new_page()
    await page.goto(f"{up.http}/#key=tw_aaaaaaaaaaaa_bbbb&ws={up.ws_port}")
    await expect(page.get_by_test_id("key-form")).to_be_visible(timeout=WAIT)
    await expect(page.locator("body")).to_contain_text("not valid", timeout=WAIT)


async def test_a_bare_websocket_of_a_page_is_all_one_needs(new_up: Any, browser: Browser) -> None:
    up = new_up()
    page = await (await browser.new_context()).new_page()
    await page.goto(up.http)
    frames = await page.evaluate(
        """([url]) => new Promise((done, fail) => {
            const frames = [];
            const ws = new WebSocket(url);
            ws.onopen = () => ws.send(JSON.stringify({id: 1, action: "whoami"}));
            ws.onmessage = (event) => {
                frames.push(JSON.parse(event.data));
                if (frames.some((frame) => frame.type === "reply")) { ws.close(); done(frames); }
            };
            ws.onerror = () => fail("the websocket failed");
        })""",
        [f"{up.url}/?auth_key={up.keys()['alice']}"],
    )
    assert frames[0]["type"] == "welcome"
    assert next(frame for frame in frames if frame["type"] == "reply")["result"]["user"] == "alice"
    closed = await page.evaluate(
        "([url]) => new Promise((done) => { new WebSocket(url).onclose = (event) => done(event.code); })",
        [f"{up.url}/?auth_key=wrong"],
    )
    assert closed == 4401, "a page sees why it was refused"


async def test_an_rxjs_subject_writes_and_reads(new_up: Any, node: str, modules: Path) -> None:
    up = new_up()
    url = f"{up.url}/?auth_key={up.keys()['alice']}"
    process = await asyncio.create_subprocess_exec(
        node,
        str(modules.parent / "rxjs_client.mjs"),
        url,
        "alice",
        "lobby",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, error.decode()
    said = json.loads(out)
    assert said["reply"]["result"]["version"] == 1
    assert said["change"]["new"]["text"] == "hello from rxjs"
    assert said["change"]["by"] == "alice"
