"""`changes`, `export` and `import` as processes: killed, cut off, fed through pipes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from pathlib import Path
from typing import IO, Any

from .conftest import COMMAND, tidewire

ROOMS, LINES = 50, 10_000


def item(number: int) -> dict[str, Any]:
    return {"room": f"r{number % ROOMS}", "id": f"m{number:05}", "author": "alice", "text": "x" * 100}


def _fed(pipe: IO[bytes], text: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write(text)
        pipe.flush()


def test_out_and_in_again(new_up: Any, tmp_path: Path) -> None:
    up = new_up()
    data = ["--data", str(up.data)]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"table": "messages", "item": item(n)}) + "\n" for n in range(LINES)))

    # Killed in the middle, as its input has not ended, and started once more.
    running = subprocess.Popen([*COMMAND, "import", *data], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert running.stdin
    half = file.read_bytes()[: file.stat().st_size // 2]
    feeder = threading.Thread(target=_fed, args=(running.stdin, half))
    feeder.start()
    following = subprocess.Popen(
        [*COMMAND, "changes", "messages", "--follow", *data],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in its background has them ignore it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - it does nothing else
    )
    assert following.stdout
    assert json.loads(following.stdout.readline())["table"] == "messages"
    running.kill()
    running.wait()
    feeder.join()
    with contextlib.suppress(BrokenPipeError):
        running.stdin.close()
    following.send_signal(signal.SIGINT)
    assert b"Traceback" not in following.communicate(timeout=30)[1]
    assert tidewire("export", "messages", "--output", str(out), *data).returncode == 0
    there = len(out.read_text().splitlines())
    assert 0 < there <= LINES / 2
    again = tidewire("import", str(file), *data)
    assert (again.returncode, again.stderr.startswith("imported 10,000 items")) == (0, True), again.stderr
    assert tidewire("export", "messages", "--output", str(out), "--resume", *data).returncode == 0
    assert tidewire("export", "messages", "--output", str(out), *data).returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["item"] for line in lines), key=lambda one: str(one["id"])) == [item(n) for n in range(LINES)]
    assert {line["version"] for line in lines} == {1}, "what was there already was not written again"

    # Told to stop, it says where to go on.
    running = subprocess.Popen([*COMMAND, "import", *data], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdin
    running.stdin.write(file.read_bytes()[:100_000])
    running.stdin.flush()
    assert tidewire("status", *data).returncode == 0  # meanwhile
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 128 + signal.SIGTERM
    assert running.stderr
    assert b" goes on" in running.stderr.read()
    running.stdin.close()
    running.stderr.close()

    # Readers that leave, as `| head` does.
    for command in (["export"], ["changes", "messages"], ["changes", "messages", "--format", "dynamodb"]):
        reading = subprocess.Popen([*COMMAND, *command, *data], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert reading.stdout
        assert reading.stderr
        json.loads(reading.stdout.readline())
        reading.stdout.close()
        assert reading.stderr.read() == b""
        reading.stderr.close()
        assert reading.wait(30) == 1

    # What cannot be done is one sentence.
    file.write_text('{"table":"messages","item":{"room":"r","id":"a"}}\n{"table":"messages"}\n')
    for args, code, said in (
        (["changes", "nix"], 1, "there is no table 'nix'"),
        (["changes", "messages", "--format", "xml"], 2, "json or dynamodb"),
        (["export", "--output", str(tmp_path / "no" / "file")], 1, "No such file"),
        (["import", str(tmp_path)], 1, "directory"),
        (["import", str(file)], 1, f"{file}:2: Object missing required field `item`"),
        (["import", str(file), "--skip", "9"], 1, "has 2 lines"),
    ):
        done = tidewire(*args, *data)
        assert (done.returncode, done.stdout) == (code, ""), args
        assert said in done.stderr
        assert "Traceback" not in done.stderr
