"""Arrangements of real servers, started from the binary that `tidewire up` uses."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from tests.helpers import free_port
from tidewire.services.cli.embedded import binary

SLOTS = 16384
BUS = 10000
"""The nodes of a cluster talk to each other on the port that many above their own."""

CONFIG = """\
bind 127.0.0.1
port {port}
dir "{folder}"
save ""
appendonly no
logfile "{folder}/server.log"
cluster-enabled yes
cluster-config-file nodes.conf
cluster-node-timeout 1000
cluster-announce-ip 127.0.0.1
"""


@contextlib.contextmanager
def cluster(masters: int = 3) -> Iterator[str]:
    """That many masters with an equal share of the slots each; the address, as --redis takes it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-")))
        ports = _cluster_ports(masters)
        for port in ports:
            stack.enter_context(_server(folder / str(port), port))
        nodes: list[Any] = [stack.enter_context(redis.Redis(port=port, decode_responses=True)) for port in ports]
        _until("every node answers", lambda: all(node.ping() for node in nodes))
        _share_slots(nodes)
        for port in ports[1:]:
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", port)
        _until("the nodes are one cluster", lambda: all(_is_whole(node, masters) for node in nodes))
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


def _share_slots(nodes: Sequence[Any]) -> None:
    bounds = [SLOTS * i // len(nodes) for i in range(len(nodes) + 1)]
    for number, node in enumerate(nodes):
        node.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        # Nodes of one epoch would have to agree first on who takes which: that takes seconds.
        node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)


def _is_whole(node: Any, nodes: int) -> bool:
    info = node.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes)


def _cluster_ports(count: int) -> list[int]:
    """Free ports whose bus ports are free too."""
    found: set[int] = set()
    while len(found) < count:
        port = free_port()
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port + BUS))
            found.add(port)
    return sorted(found)


@contextlib.contextmanager
def _server(folder: Path, port: int) -> Iterator[None]:
    folder.mkdir()
    config = folder / "server.conf"
    config.write_text(CONFIG.format(port=port, folder=folder))
    process = subprocess.Popen([binary(), str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


def _until(what: str, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, f"within {timeout_s:.0f} s it did not come to be that {what}"
        time.sleep(0.02)
