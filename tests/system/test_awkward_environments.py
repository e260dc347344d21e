"""Environments that a user may have: odd paths, passwords, permissions, ports and variables."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.helpers import free_port
from tests.topologies import CONFIG, Server
from tidewire.process.settings import Settings
from tidewire.services.cli import embedded
from tidewire.services.cli.up import _Up

from .conftest import COMMAND, tidewire


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server", free_port(), CONFIG)
    server.start()
    while True:
        try:
            server.redis.ping()
            break
        except redis.ConnectionError:
            pass
    yield server
    server.close()


@pytest.mark.parametrize("name", ['d"x', "d\\x", "d x"])
def test_a_data_folder_may_have_any_name(tmp_path: Path, new_up: Any, name: str) -> None:
    up = new_up(begin=False)
    up.data = tmp_path / name
    up.start()
    assert tidewire("status", "--data", str(up.data)).returncode == 0


@pytest.mark.parametrize("password", ["hunter#2", "hunter/2", "hunter?2"])
def test_a_password_that_must_be_encoded_is_never_quoted(password: str) -> None:
    done = tidewire("status", "--redis", f"redis://:{password}@127.0.0.1:1")
    assert done.returncode == 1
    assert "percent-encode" in done.stderr
    assert "hunter" not in done.stderr


@pytest.mark.parametrize("url", ["redis://:hunter@127.0.0.1:port/0", "redis://:hunter@127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused_without_the_password(url: str) -> None:
    done = tidewire("status", "--redis", url)
    assert done.returncode == 1
    assert "is not a valid address" in done.stderr
    assert "hunter" not in done.stderr


@pytest.mark.parametrize(
    ("rules", "named"),
    [(["~*", "+@all"], "channel"), (["~*", "&*", "+@all", "-info"], "'info' command")],
    ids=["without channels", "without INFO"],
)
def test_a_redis_user_without_a_permission_is_refused_at_start(
    server: Server, tmp_path: Path, rules: list[str], named: str
) -> None:
    server.redis.execute_command("ACL", "SETUSER", "narrow", "reset", "on", ">secret", *rules)
    (tmp_path / "notes.py").write_text("from tidewire import App\napp = App('x')\n")
    url = f"redis://narrow:secret@127.0.0.1:{server.port}"
    done = tidewire("store", "notes:app", "--redis", url, "--admin-port", str(free_port()), cwd=tmp_path)
    assert done.returncode == 1
    assert named in done.stderr
    assert "ACL SETUSER" in done.stderr
    assert "is it running" not in done.stderr


def test_the_permissions_in_the_documentation_are_enough(server: Server, tmp_path: Path, new_up: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    rules = re.search(r"ACL SETUSER tidewire (.*)", text)
    assert rules, "docs/operations.md gives the command"
    server.redis.execute_command("ACL", "SETUSER", "tidewire", *rules[1].replace("PASSWORD", "secret").split())
    up = new_up("--redis", f"redis://tidewire:secret@127.0.0.1:{server.port}", "--stage", "dev")
    done = tidewire("put", "messages", '{"room": "lobby", "id": "m1", "author": "alice", "text": "hello"}',
                    "--key", up.keys()["alice"], "--url", up.http)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_up_ends_with_the_sentence_of_a_service_that_a_restart_cannot_repair(new_up: Any, tmp_path: Path) -> None:
    app = tmp_path / "notes.py"
    app.write_text("from tidewire import App, everyone\napp = App('x')\napp.table('t', key='id', readers=everyone)\n")
    up = new_up("notes:app", PYTHONPATH=str(tmp_path))
    up.stop()
    app.write_text(app.read_text().replace("'id'", "'number'"))
    log_before = len(up.log.read_text())
    command = [*COMMAND, "up", "notes:app", "--data", str(up.data), *up.ports, "--admin-port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=up.environment)
    assert done.returncode == 1, up.log.read_text()[log_before:]
    assert done.stderr.count("table 't' has the key") == 1
    assert "Traceback" not in done.stderr


def test_service_links_of_kubernetes_are_no_settings(new_up: Any) -> None:
    done = tidewire("--help", env=os.environ | {"TIDEWIRE_WS_PORT": "tcp://10.0.0.7:8080"})
    assert done.returncode == 0
    assert "TIDEWIRE_WS_PORT is ignored" in done.stderr
    up = new_up(TIDEWIRE_ADMIN_PORT="tcp://10.0.0.7:8090")
    assert "TIDEWIRE_ADMIN_PORT is ignored" in up.log.read_text()


def test_two_that_start_at_once_take_different_admin_ports(new_up: Any, tmp_path: Path) -> None:
    admin = str(free_port())
    ups = [new_up(begin=False) for _ in range(2)]
    processes = []
    for number, up in enumerate(ups):
        up.data = tmp_path / f"data{number}"
        command = [*COMMAND, "up", "--data", str(up.data), *up.ports, "--admin-port", admin]
        processes.append(
            subprocess.Popen(command, env=up.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline().startswith("ready"), process.communicate()[1]
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=30)


async def test_the_server_gets_another_port_when_its_own_is_taken_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another `up` in the same second may find the same port free, and be the first to listen there."""
    with socket.create_server(("127.0.0.1", free_port())) as other:
        ports = iter([taken := other.getsockname()[1], free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        up = _Up("tidewire.examples.chat.app:app", tmp_path, {}, Settings(), None)
        process = await up._start_server(dict(os.environ))
        try:
            assert f":{taken}" not in up.redis
            assert redis.Redis.from_url(up.redis).ping()
        finally:
            await process.stop(10)


async def test_changes_are_followed_over_a_restart_of_up(new_up: Any) -> None:
    up = new_up()
    key = up.keys()["alice"]

    def put(id_: str) -> None:
        item = json.dumps({"room": "lobby", "id": id_, "author": "alice", "text": "hello"})
        done = tidewire("put", "messages", item, "--key", key, "--url", up.http)
        assert done.returncode == 0, done.stderr

    following = await asyncio.create_subprocess_exec(
        *COMMAND, "changes", "messages", "--follow", "--json", "--data", str(up.data),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert following.stdout
    try:
        await asyncio.to_thread(put, "m1")
        seen = [json.loads(await asyncio.wait_for(following.stdout.readline(), 30))["key"]["id"]]
        await asyncio.to_thread(up.stop)
        await asyncio.to_thread(up.start)
        await asyncio.to_thread(put, "m2")
        seen.append(json.loads(await asyncio.wait_for(following.stdout.readline(), 60))["key"]["id"])
        assert seen == ["m1", "m2"], "nothing twice, nothing lost"
    finally:
        following.terminate()
        await following.wait()


def test_two_positions_of_one_partition_are_refused(new_up: Any) -> None:
    up = new_up()
    done = tidewire("changes", "messages", "--from", "1-0-1-0", "--from", "1-0-2-0", "--data", str(up.data))
    assert done.returncode == 1
    assert "two positions are of partition 1" in done.stderr
    done = tidewire("changes", "messages", "--from", "1-0-1-0", "--from", "2-0-2-0", "--data", str(up.data))
    assert done.returncode == 0, done.stderr


def test_every_command_that_reaches_redis_takes_the_same_three_options() -> None:
    for command in (
        ["keys", "create"],
        ["keys", "list"],
        ["keys", "revoke"],
        ["status"],
        ["changes"],
        ["export"],
        ["import"],
    ):
        help_ = tidewire(*command, "--help", env=os.environ | {"COLUMNS": "200"}).stdout
        for option in ("--redis", "--data", "--stage"):
            assert option in help_, f"{command} {option}"
    assert re.fullmatch(r"tidewire \d+\.\d+\.\d+\n", tidewire("--version").stdout)


def test_json_prints_one_line_where_a_terminal_would_get_a_table(new_up: Any) -> None:
    up = new_up()
    for command in (["status"], ["keys", "list"]):
        plain = tidewire(*command, "--data", str(up.data)).stdout
        as_json = tidewire(*command, "--json", "--data", str(up.data)).stdout
        assert plain != as_json
        assert as_json.count("\n") == 1
        json.loads(as_json)
