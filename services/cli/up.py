"""`tidewire up`: run the server and the services, each as a process that is restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import structlog
import typer

from tidewire.errors import ConfigurationError
from tidewire.model.credentials import ApiKey
from tidewire.model.records import Credential, unpack
from tidewire.process import lifecycle, telemetry
from tidewire.process.settings import Settings, load
from tidewire.redis import keyring
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import ConsumerGroup, Keys

from ..wiring import WIRING
from .embedded import Embedded, ServerPortTaken, announce, end_with_parent, locked, write_private
from .options import ADMIN_SOCKET, MISCONFIGURED, SUPERVISED
from .service import import_app, start
from .status import owners

log = structlog.get_logger(__name__)

CHAT = "tidewire.examples.chat.app:app"
DEMO_USERS = ("alice", "bob")
READY_S = 60.0
GENTLE_S = 4.0
"""Seconds that a child has for its drain before it is killed, unless --drain-seconds is less."""


MAX_FAILED_STARTS = 3
"""Immediate exits of a service that `up` tolerates before it aborts startup."""


class Misconfigured(Exception):
    """A service has printed a configuration error and ended. `up` ends too."""


class Child:
    """A process that is restarted when it ends. `admin`, its bound admin socket, outlives each restart."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str],
        stopping: asyncio.Event,
        admin: socket.socket | None = None,
    ) -> None:
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.failures = 0
        """How often in a row it has ended soon after its start."""
        self._command = command
        self._environment = environment
        self._stopping = stopping
        self._descriptors: tuple[int, ...] = ()
        if admin:
            self._descriptors = (admin.fileno(),)
            self._environment = environment | {ADMIN_SOCKET: str(admin.fileno())}

    async def start(self) -> asyncio.subprocess.Process:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,  # what `up` prints to standard output is data
            start_new_session=True,  # Ctrl-C is for `up`, which ends the others in their order
            preexec_fn=end_with_parent,
            pass_fds=self._descriptors,
        )
        return self.process

    async def keep(self, again: Callable[[], Awaitable[None]] | None = None) -> None:
        """Restart it whenever it ends, with a growing pause while it ends at once."""
        pause_s = 0.1
        while True:
            assert self.process
            begun = time.monotonic()
            code = await self.process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - begun > 2:
                pause_s, self.failures = 0.1, 0
            self.failures += 1
            if code == MISCONFIGURED:  # it has printed why, and a restart would end the same way
                raise Misconfigured
            log.warning("process_died", name=self.name, pid=self.process.pid, code=code)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)
            if not self._stopping.is_set():
                await self.start()
                if again:
                    await again()

    async def stop(self, timeout_s: float) -> None:
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await self.process.wait()
        except TimeoutError:
            log.warning("process_killed", name=self.name, pid=self.process.pid)
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


def up(reference: str, data: Path, counts: dict[str, int], **flags: Any) -> None:
    """Run everything until Ctrl-C or SIGTERM. Raises ConfigurationError when it cannot start."""
    settings = load(**flags)
    telemetry.configure_logging(settings.log_format, settings.log_level)
    for kind, count in counts.items():
        if not 1 <= count <= 64:
            raise ConfigurationError(f"--{kind}s {count}: between 1 and 64")
    import_app(reference)  # report what is wrong with it once, before anything runs
    for what, port in (("ws", settings.ws_port), ("http", settings.http_port)):
        if lifecycle.port_is_taken(settings.host, port):
            raise ConfigurationError(
                f"port {port} on {settings.host} is in use: end the program that listens there, "
                f"or choose another --{what}-port"
            )
    with locked(data), contextlib.suppress(Misconfigured):
        start(_Up(reference, data, counts, settings, flags.get("redis")).run())
        return
    sys.exit(1)  # the service has printed why


class _Up:
    def __init__(
        self, reference: str, data: Path, counts: dict[str, int], settings: Settings, redis: str | None
    ) -> None:
        self.reference = reference
        self.data = data
        self.counts = counts
        self.settings = settings
        self.stopping = asyncio.Event()
        self.redis = redis or ""  # without an address, that of the embedded server once it runs
        self.server: Child | None = None
        self.services: list[Child] = []
        self.admin_sockets: list[socket.socket] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        try:
            await self._start()
            ready = asyncio.create_task(self._ready())
            stopping = asyncio.create_task(self.stopping.wait())
            await asyncio.wait({ready, stopping, *self.tasks}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                await asyncio.wait({stopping, *self.tasks}, return_when=asyncio.FIRST_COMPLETED)
            else:
                ready.cancel()
            self.stopping.set()
            for task in self.tasks:
                if task.done():
                    task.result()
        finally:
            self.stopping.set()
            await self._stop()

    async def _start(self) -> None:
        environment = dict(os.environ)
        if not self.redis:
            self.server = await self._start_server(environment)
            self.tasks.append(asyncio.create_task(self.server.keep()))
        # Reported once here, rather than by each service.
        async with await connect(self.redis, Keys(self.settings.stage, self.settings.partitions)):
            pass
        environment |= {
            "TIDEWIRE_REDIS": self.redis,  # not in the arguments: it holds a password
            "TIDEWIRE_STAGE": self.settings.stage,
            "TIDEWIRE_PARTITIONS": str(self.settings.partitions),
            "TIDEWIRE_HOST": self.settings.host,
            "TIDEWIRE_WS_PORT": str(self.settings.ws_port),
            "TIDEWIRE_HTTP_PORT": str(self.settings.http_port),
            "TIDEWIRE_ORIGINS": self.settings.origins,
            "TIDEWIRE_TRUSTED_PROXIES": self.settings.trusted_proxies,
            "TIDEWIRE_PATH_PREFIX": self.settings.path_prefix,
            "TIDEWIRE_TLS_CERT": self.settings.tls_cert,
            "TIDEWIRE_TLS_KEY": self.settings.tls_key,
            "TIDEWIRE_DURABILITY": self.settings.durability,
            "TIDEWIRE_DRAIN_SECONDS": str(self.settings.drain_seconds),
            "TIDEWIRE_LOG_FORMAT": self.settings.log_format,
            # `up` reports that all is ready. Beside it, only unusual events of the services are of interest.
            "TIDEWIRE_LOG_LEVEL": os.environ.get("TIDEWIRE_LOG_LEVEL", "warning"),
            SUPERVISED: "1",
        }
        port = self.settings.admin_port
        for kind in WIRING:
            for number in range(self.counts[kind]):
                admin = self._bind_admin(port)
                port = admin.getsockname()[1] + 1
                command = [sys.executable, "-m", "tidewire.services.cli.main", kind, self.reference]
                child = Child(f"{kind}-{number + 1}", command, environment, self.stopping, admin)
                await child.start()
                self.services.append(child)
                self.tasks.append(asyncio.create_task(child.keep()))

    async def _start_server(self, environment: dict[str, str]) -> Child:
        """Start the embedded server. It binds its port itself. If another `up` was faster, take another port."""
        while True:
            embedded = Embedded(self.data)
            self.redis = embedded.url
            server = Child("server", embedded.command(), environment, self.stopping)
            try:
                await embedded.wait_until_ready(await server.start())
            except ServerPortTaken:
                log.info("port_taken", name=server.name, port=embedded.port)
                continue
            except BaseException:
                await server.stop(10)
                raise
            return server

    def _bind_admin(self, port: int) -> socket.socket:
        """Bind the first free port from `port` on, for a service's probes and metrics.

        Finding a free port first and binding it later would race with another `up`.
        """
        while True:
            try:
                bound = lifecycle.listen(self.settings.host, port, "admin")
            except lifecycle.PortTaken:
                port += 1
                continue
            self.admin_sockets.append(bound)
            return bound

    async def _stop(self) -> None:
        """Stop the gateways first, because their connections are removed through the store. Stop the server last."""
        gentle_s = min(GENTLE_S, self.settings.drain_seconds)
        gateways = [child for child in self.services if child.name.startswith("gateway")]
        others = [child for child in self.services if child not in gateways]
        await asyncio.gather(*(child.stop(gentle_s) for child in gateways))
        await asyncio.gather(*(child.stop(gentle_s) for child in others))
        if self.server:
            await self.server.stop(10)
        with contextlib.suppress(OSError):
            (self.data / "up.json").unlink()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # ── ready ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ready(self) -> None:
        host, prefix = _shown(self.settings.host), self.settings.path_prefix
        secure = "s" if self.settings.tls_cert else ""
        ws = f"ws{secure}://{host}:{self.settings.ws_port}{prefix}/"
        http = f"http{secure}://{host}:{self.settings.http_port}{prefix}/"
        announce(self.data, {"pid": os.getpid(), "redis": self.redis, "stage": self.settings.stage, "http": http})
        async with await connect(self.redis, Keys(self.settings.stage, self.settings.partitions)) as backend:
            deadline = time.monotonic() + READY_S
            while not await self._all_ready(backend):
                if time.monotonic() > deadline:
                    raise ConfigurationError(f"not ready within {READY_S:.0f} s: see the messages above")
                for child in self.services:
                    if child.failures >= MAX_FAILED_STARTS:
                        raise ConfigurationError(f"{child.name} ends as soon as it is started: see the messages above")
                await asyncio.sleep(0.05)
            keys = await demo_keys(backend, self.data)
        rooms = self.reference.split(":")[0].endswith("examples.chat.app") and await asyncio.to_thread(
            first_room, http, keys, self.settings.tls_cert
        )
        typer.echo(f"ready  {http}  {ws}")
        if rooms:
            for user in DEMO_USERS:
                typer.echo(f"  {user}: {http}#key={keys[user]}&room=lobby&ws={self.settings.ws_port}")
        sys.stdout.flush()

    async def _all_ready(self, backend: Backend) -> bool:
        answers = await asyncio.gather(
            *(asyncio.to_thread(self._probe, port) for port in (bound.getsockname()[1] for bound in self.admin_sockets))
        )
        if not all(answers):
            return False
        for kind in (ConsumerGroup.STORE, ConsumerGroup.BROADCASTER):
            if self.counts[kind] and not all((await owners(backend, kind)).values()):
                return False
        return True

    def _probe(self, port: int) -> bool:
        try:
            with urllib.request.urlopen(f"http://{_shown(self.settings.host)}:{port}/readyz", timeout=2):
                return True
        except (OSError, HTTPException):
            return False


def _shown(host: str) -> str:
    """Return an address that clients can connect to."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


async def demo_keys(backend: Backend, data: Path) -> dict[str, str]:
    """Return the sample keys. Those that the server still knows are kept."""
    path = data / "demo-keys.json"
    try:
        kept: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    for user in DEMO_USERS:
        key = ApiKey.parse(str(kept.get(user, "")))
        raw = await backend.commands.hget(backend.keys.credentials(), key.id) if key else None
        if raw is None or Credential(*unpack(raw)).revoked_at is not None:
            kept[user] = str(await keyring.create(backend, user))
    write_private(path, json.dumps({user: kept[user] for user in DEMO_USERS}))
    return kept


def first_room(http: str, keys: dict[str, str], tls_cert: str = "") -> bool:
    """Write a room with both sample users, for the chat example. With TLS, the certificate is that of `tls_cert`."""
    context = ssl.create_default_context(cafile=tls_cert) if tls_cert else None
    if context:
        context.check_hostname = False  # it names the host that clients know
    for user, role in zip(DEMO_USERS, ("owner", "member"), strict=True):
        item = {"room": "lobby", "user": user, "role": role, "title": "Lobby"}
        # Only if the room is missing: a user who left it, or renamed it, meant to.
        body = json.dumps({"table": "members", "item": item, "if": {"absent": True}}).encode()
        headers = {"auth_key": keys[DEMO_USERS[0]], "Content-Type": "application/json"}
        try:
            urllib.request.urlopen(
                urllib.request.Request(f"{http}v1/put", body, headers), timeout=10, context=context
            ).close()
        except urllib.error.HTTPError as error:
            if error.code not in (403, 409):
                raise ConfigurationError(f"the first room could not be made: {error.read().decode()}") from None
    return True
