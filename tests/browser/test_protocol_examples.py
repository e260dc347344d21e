"""The examples of docs/protocol.md as they stand there, against a real `tidewire up` whose gateway is killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser

from tests.helpers import wait_until
from tests.system.conftest import Up, tidewire

pytestmark = [pytest.mark.browser, pytest.mark.real]

DOCS = Path(__file__).parents[2] / "docs" / "protocol.md"


PRELUDE = """
import Ws from "ws";

// Where nobody listens for it, an error of a socket ends node; a browser's is followed by its close, and that is all.
globalThis.WebSocket = class extends Ws {
  constructor(...args) {
    super(...args);
    this.on("error", () => {});
  }
};
const [url, key] = process.argv.slice(2);
const say = (said) => console.log(JSON.stringify(said));
"""


def example(name: str) -> str:
    """The block of code that is marked to be run."""
    found = re.findall(rf"<!-- run: {name} -->\n```js\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(found) == 1, f"docs/protocol.md has {len(found)} examples {name}"
    return str(found[0])


class Said:
    """What a program prints: a JSON text a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[Any] = []

    async def listen(self) -> None:
        assert self.process.stdout
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        try:
            await wait_until(condition, what, 60)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last it said: {self.lines[-3:]}") from None


@contextlib.asynccontextmanager
async def program(code: str, up: Up, key: str, folder: Path, node: str, modules: Path) -> AsyncIterator[Said]:
    """Run as a module, with the WebSocket that browsers have, and newer versions of node."""
    (folder / "node_modules").symlink_to(modules)
    script = folder / "example.mjs"
    script.write_text(PRELUDE + code)
    process = await asyncio.create_subprocess_exec(
        node, str(script), up.url, key, stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    said = Said(process)
    listening = asyncio.create_task(said.listen())
    try:
        yield said
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await listening


async def key_of(up: Up, user: str) -> tuple[str, str]:
    """(auth_key, its id)"""
    done = await asyncio.to_thread(
        tidewire, "keys", "create", "--user", user, "--data", str(up.data), "--json", timeout_s=60
    )
    made = json.loads(done.stdout)
    return made["auth_key"], made["id"]


async def kill_gateway(up: Up) -> None:
    status = await up.status()
    pid = next(service["pid"] for service in status["services"] if service["kind"] == "gateway" and service["alive"])
    os.kill(pid, signal.SIGKILL)


async def revoke(up: Up, id_: str) -> None:
    done = await asyncio.to_thread(tidewire, "keys", "revoke", id_, "--data", str(up.data))
    assert done.returncode == 0, done.stderr


def message(number: int) -> dict[str, Any]:
    return {"room": "lobby", "id": f"m{number:03}", "author": "alice", "text": "hello"}


async def write_while_the_gateway_dies(up: Up) -> dict[str, Any]:
    """Some messages, of which one is removed; those that are left."""
    async with up.client("alice", up.keys()["alice"]) as alice:
        for number in range(30):
            if number == 10:
                await kill_gateway(up)
            await alice.put("messages", message(number))
        await alice.delete("messages", {"room": "lobby", "id": "m005"})
    return {one["id"]: one for one in map(message, range(30)) if one["id"] != "m005"}


async def test_a_live_view_over_a_bare_websocket(new_up: Any, node: str, modules: Path, tmp_path: Path) -> None:
    up = new_up()
    key, id_ = await key_of(up, "bob")
    code = example("live") + (
        'live({ url, key, table: "messages", attribute: "room", value: "lobby", sort: "id",\n'
        "  show: (items) => say(Object.fromEntries(items)), ended: (code) => say({ ended: code }) });\n"
    )
    async with program(code, up, key, tmp_path, node, modules) as said:
        await said.until(lambda: said.lines, "it shows what is there")
        stored = await write_while_the_gateway_dies(up)
        await said.until(lambda: said.lines[-1] == stored, "it shows what is stored")
        counts = [len(shown) for shown in said.lines]
        assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(counts) if later), counts
        await revoke(up, id_)
        await said.until(lambda: said.lines[-1] == {"ended": 4401}, "it does not come back with a revoked key")


async def test_frames_as_an_observable(new_up: Any, node: str, modules: Path, tmp_path: Path) -> None:
    up = new_up()
    key, id_ = await key_of(up, "bob")
    code = example("rxjs") + 'frames(url, key).subscribe({ next: say, complete: () => say("complete") });\n'
    async with program(code, up, key, tmp_path, node, modules) as said:
        await said.until(lambda: said.lines, "it is welcome")
        await write_while_the_gateway_dies(up)

        def heard() -> list[tuple[str, str]]:
            changes = [one for one in said.lines if one["type"] == "change" and one["table"] == "messages"]
            return [(one["event"], one["key"]["id"]) for one in changes]

        await said.until(lambda: ("REMOVE", "m005") in heard(), "it has heard the last change")
        assert heard() == [*(("INSERT", f"m{number:03}") for number in range(30)), ("REMOVE", "m005")]
        welcomes = [one for one in said.lines if one["type"] == "welcome"]
        assert [one["resumed"] for one in welcomes] == [False, True]
        await revoke(up, id_)
        await said.until(lambda: said.lines[-1] == "complete", "it does not come back with a revoked key")


async def test_an_event_source_in_a_page(new_up: Any, browser: Browser) -> None:
    up = new_up()
    key, id_ = await key_of(up, "bob")
    page = await (await browser.new_context()).new_page()
    await page.goto(up.http)
    await page.add_script_tag(content=example("events"))
    await page.evaluate(
        """([http, key]) => {
            window.heard = [];
            listen(http, key, (frame) => heard.push(frame), () => heard.push({ type: "refused" }));
        }""",
        [up.http, key],
    )

    async def heard(kind: str) -> list[Any]:
        found: list[Any] = await page.evaluate("(kind) => heard.filter((frame) => frame.type === kind)", kind)
        return found

    await wait_until(lambda: heard("welcome"), "it is welcome", 60)
    await write_while_the_gateway_dies(up)
    result = await page.evaluate(
        """([http, key, item]) => act(http, key, "put", { table: "messages", item, request: crypto.randomUUID() })""",
        [up.http, key, message(900) | {"author": "bob"}],
    )
    assert result["version"] == 1

    async def ids() -> list[str]:
        return [one["key"]["id"] for one in await heard("change") if one["table"] == "messages"]

    async def all_are_there() -> bool:
        return "m900" in await ids()

    await wait_until(all_are_there, "it has heard its own message", 60)
    assert await ids() == [*(f"m{number:03}" for number in range(30)), "m005", "m900"]
    assert [one["resumed"] for one in await heard("welcome")] == [False, True]
    await revoke(up, id_)
    await wait_until(lambda: heard("refused"), "it does not come back with a revoked key", 60)
