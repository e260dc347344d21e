"""Arrangements of real servers, started from the binary that `tidewire up` uses."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from tests.helpers import free_port
from tidewire.services.cli.embedded import binary

SLOTS = 16384
BUS = 10000
"""Offset of the port of the cluster bus from the port of a node."""

CONFIG = """\
bind 127.0.0.1
port {port}
dir "{folder}"
save ""
appendonly no
logfile "{folder}/server.log"
repl-diskless-sync-delay 0
"""
OF_A_CLUSTER = """\
cluster-enabled yes
cluster-config-file nodes.conf
cluster-node-timeout 1000
cluster-replica-validity-factor 0
cluster-announce-ip 127.0.0.1
"""
SENTINEL = """\
bind 127.0.0.1
port {port}
dir "{folder}"
logfile "{folder}/sentinel.log"
sentinel monitor tidewire 127.0.0.1 {master} 2
sentinel down-after-milliseconds tidewire 1000
sentinel failover-timeout tidewire 5000
"""


class Server:
    """One process, which can be killed, paused and started again."""

    def __init__(
        self, folder: Path, port: int, config: str, *args: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self._environment = os.environ | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        self._config = folder / "server.conf"
        self._config.write_text(config.format(port=port, folder=folder))
        self._args = args
        self.redis: Any = redis.Redis(port=port, decode_responses=True, socket_timeout=5)

    def start(self) -> None:
        command = [binary(), str(self._config), *self._args]
        self._process = subprocess.Popen(
            command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def close(self) -> None:
        self.kill()
        self.redis.close()


class Cluster:
    """Masters with an equal share of the slots each, and as many replicas of each as asked for."""

    def __init__(self, folder: Path, masters: int, replicas: int, environment: Mapping[str, str] | None = None) -> None:
        ports = _cluster_ports(masters * (1 + replicas))
        self.servers = [
            Server(folder / str(port), port, CONFIG + OF_A_CLUSTER, environment=environment) for port in ports
        ]
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)
        self._masters = masters

    def start(self) -> None:
        for server in self.servers:
            server.start()
        nodes: list[Any] = [server.redis for server in self.servers]
        _until("every node answers", lambda: all(node.ping() for node in nodes))
        _share_slots(nodes[: self._masters])
        for server in self.servers[1:]:
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port)
        _until("the nodes are one cluster", lambda: all(_is_whole(node, len(nodes)) for node in nodes))
        for number, replica in enumerate(nodes[self._masters :]):
            master = nodes[number % self._masters].execute_command("CLUSTER MYID")
            replica.execute_command("CLUSTER REPLICATE", master)
        _until("the replicas follow", lambda: all(map(_follows, nodes[self._masters :])))

    def master_of(self, slot: int, but: Server | None = None) -> Server:
        """Return the live master of a slot, as most nodes that answer see it. `but` hangs and is not asked."""
        seen: list[int] = []
        for server in self.servers:
            if server is but:
                continue
            with contextlib.suppress(redis.RedisError):
                for low, high, (_, port, *_), *_ in server.redis.execute_command("CLUSTER SLOTS"):
                    if low <= slot <= high:
                        seen.append(port)
        return next(server for server in self.servers if server.port == max(set(seen), key=seen.count))

    def put_aside(self, slot: int) -> Server:
        """Stop the replica of a slot's master. It keeps its file, and receives no further writes."""
        master = self.master_of(slot)
        replica = next(one for one in self.servers if one.redis.role()[:3] == ["slave", "127.0.0.1", master.port])
        replica.redis.save()
        replica.kill()
        return replica

    def fail_over(self, slot: int, aside: Server | None = None) -> Server:
        """Kill the master of a slot, and wait until a replica has taken its place; the one that was killed.

        A replica that was put aside comes back when the master is dead, and lacks what was written meanwhile.
        """
        killed = self.master_of(slot)
        killed.kill()
        if aside:
            aside.start()
        _until("a replica has taken over", lambda: self.master_of(slot) is not killed)
        others = [server.redis for server in self.servers if server is not killed]
        _until("the cluster is whole", lambda: all(map(_is_ok, others)))
        return killed

    def come_back(self, server: Server) -> None:
        """Restart a server, and wait until it is a replica of the new master."""
        server.start()
        _until("it follows", lambda: _follows(server.redis))

    def hang(self, slot: int, replaced: Callable[[], None] = lambda: None, stays_s: float = 0.0) -> None:
        """Stop the master of a slot until a replica has taken its place, then let it go on. Its sockets stay open.

        `replaced` is called when the replica has taken over. The old master hangs for `stays_s` more.
        """
        hung = self.master_of(slot)
        hung.signal(signal.SIGSTOP)
        try:
            _until("a replica has taken over", lambda: self.master_of(slot, but=hung) is not hung)
            others = [server.redis for server in self.servers if server is not hung]
            _until("the cluster is whole", lambda: all(map(_is_ok, others)))
            replaced()
            time.sleep(stays_s)
        finally:
            hung.signal(signal.SIGCONT)
        _until("it follows", lambda: _follows(hung.redis))

    def move(self, slot: int) -> None:
        """Move a slot with its keys to another master, as an operator does, key by key."""
        source = self.master_of(slot)
        target = next(self.master_of(s) for s in range(0, SLOTS, 1000) if self.master_of(s) is not source)
        ids = {server: server.redis.execute_command("CLUSTER MYID") for server in (source, target)}
        target.redis.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        source.redis.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        while keys := source.redis.execute_command("CLUSTER GETKEYSINSLOT", slot, 10):
            source.redis.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for server in (target, source):
            server.redis.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])

    def close(self) -> None:
        for server in self.servers:
            server.close()


class Sentinels:
    """A master, a replica, and three sentinels."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        master, replica, *watching = (free_port() for _ in range(5))
        follows = f"replicaof 127.0.0.1 {master}\n"
        self.servers = [
            Server(folder / "master", master, CONFIG, environment=environment),
            Server(folder / "replica", replica, CONFIG + follows, environment=environment),
        ]
        self._watching = [
            Server(folder / str(port), port, SENTINEL.replace("{master}", str(master)), "--sentinel")
            for port in watching
        ]
        self.url = "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in watching) + "/tidewire"

    def start(self) -> None:
        for server in (*self.servers, *self._watching):
            server.start()
        _until("the replica follows", lambda: _follows(self.servers[1].redis))
        _until("they watch", lambda: all(self._sees_all(server) for server in self._watching))

    def _sees_all(self, server: Server) -> bool:
        state = server.redis.execute_command("SENTINEL MASTER", "tidewire")
        return int(state["num-other-sentinels"]) == len(self._watching) - 1 and int(state["num-slaves"]) == 1

    def master(self) -> Server:
        """Return the master as the sentinels see it."""
        for server in self._watching:
            with contextlib.suppress(redis.RedisError):
                _, port = server.redis.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "tidewire")
                return next(one for one in self.servers if one.port == int(port))
        raise AssertionError("nobody watches")

    def fail_over(self) -> Server:
        """Kill the master, and wait until the replica has taken its place; the one that was killed."""
        killed = self.master()
        killed.kill()
        _until("the replica has taken over", lambda: self.master() is not killed)
        _until("it is a master", lambda: self.master().redis.role()[0] == "master")
        return killed

    def hang(self, replaced: Callable[[], None] = lambda: None, stays_s: float = 0.0) -> None:
        """Stop the master until the replica has taken its place, then let it go on. Its sockets stay open.

        `replaced` is called when the replica has taken over. The old master hangs for `stays_s` more.
        """
        hung = self.master()
        hung.signal(signal.SIGSTOP)
        try:
            _until("the replica has taken over", lambda: self.master() is not hung)
            _until("it is a master", lambda: self.master().redis.role()[0] == "master")
            replaced()
            time.sleep(stays_s)
        finally:
            hung.signal(signal.SIGCONT)
        self._bring_back(hung)

    def switch(self) -> None:
        """Let the two change places while both live, as an operator does before maintenance."""
        before = self.master()

        def changed() -> bool:
            # Repeated, because the sentinels accept a replica only some time after its return.
            if self.master() is before:
                self._watching[0].redis.execute_command("SENTINEL FAILOVER", "tidewire")
            return self.master() is not before

        _until("the replica has taken over", changed)
        _until("the other follows", lambda: _follows(before.redis))

    def come_back(self, server: Server) -> None:
        """Restart a server as a replica of the new master, and wait until it is one."""
        server.start()
        _until("it answers", server.redis.ping)
        self._bring_back(server)

    def _bring_back(self, server: Server) -> None:
        """Make a former master follow the new one. The sentinels would see to it, in a while."""

        def follows() -> bool:
            # Repeated, because a sentinel may just then tell it to follow another one.
            if (master := self.master()) is not server and server.redis.role()[0] == "master":
                server.redis.replicaof("127.0.0.1", master.port)
            return _follows(server.redis)

        _until("it follows", follows)

    def close(self) -> None:
        for server in (*self.servers, *self._watching):
            server.close()


@contextlib.contextmanager
def replicated_cluster(masters: int = 3, replicas: int = 1) -> Iterator[Cluster]:
    """A cluster of masters with replicas."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        made = Cluster(Path(folder), masters, replicas)
        try:
            made.start()
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def sentinels() -> Iterator[Sentinels]:
    """A master with a replica, watched by three."""
    with tempfile.TemporaryDirectory(prefix="sentinel-") as folder:
        made = Sentinels(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def cluster(masters: int = 3) -> Iterator[str]:
    """Run masters with equal shares of the slots, and yield the address for --redis."""
    with replicated_cluster(masters, replicas=0) as made:
        yield made.url


def _follows(node: Any) -> bool:
    info = node.info("replication")
    return bool(info["role"] == "slave" and info["master_link_status"] == "up")


def _share_slots(nodes: Sequence[Any]) -> None:
    bounds = [SLOTS * i // len(nodes) for i in range(len(nodes) + 1)]
    for number, node in enumerate(nodes):
        node.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        # Nodes of one epoch would have to agree first on who takes which: that takes seconds.
        node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)


def _is_ok(node: Any) -> bool:
    return bool(node.execute_command("CLUSTER INFO")["cluster_state"] == "ok")


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


def _until(what: str, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, f"within {timeout_s:.0f} s it did not come to be that {what}"
        time.sleep(0.02)
