"""A service process from start to drain: its backend, its registration, its supervised tasks and its admin port."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import structlog

from tidewire.errors import ConfigurationError
from tidewire.process import telemetry
from tidewire.process.http import serve_http
from tidewire.process.keeper import Keeper
from tidewire.process.partition.worker import Worker
from tidewire.process.registry import Registry
from tidewire.process.settings import Settings
from tidewire.redis.backend import Backend
from tidewire.tasks import end

log = structlog.get_logger(__name__)

REDIS_MISSED_S = 10.0
"""Seconds without an answer from Redis after which a service is not ready."""


class Service:
    """One service. Its parts register their tasks, their steps at start and drain, and what `tidewire status` shows."""

    def __init__(self, kind: str, backend: Backend, settings: Settings) -> None:
        self.kind = kind
        self.backend = backend
        self.settings = settings
        self.registry = Registry(kind, self._describe)
        self.keeper = Keeper(backend, self.registry, settings.lease_ms)
        self.stopping = asyncio.Event()
        self.worker: Worker | None = None
        self._runs: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._starts: list[Callable[[], Awaitable[None]]] = []
        self._drains: list[Callable[[], Awaitable[None]]] = []
        self._tells: list[Callable[[], dict[str, Any]]] = []

    def run(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Register a task for the service's whole life. If it ends with an error, so does the service."""
        self._runs.append(task)

    def at_start(self, step: Callable[[], Awaitable[None]]) -> None:
        """Register a step before all tasks. It may raise ConfigurationError, and then the service does not start."""
        self._starts.append(step)

    def at_drain(self, step: Callable[[], Awaitable[None]]) -> None:
        """Register a step of the drain, before the tasks end. Steps run in reverse order."""
        self._drains.append(step)

    def tell(self, information: Callable[[], dict[str, Any]]) -> None:
        """Register information for `tidewire status`. It is published with each heartbeat."""
        self._tells.append(information)

    def work(self, worker: Worker) -> Worker:
        """Register a worker, so that the service owns partitions."""
        self.worker = worker
        self.run(worker.run)
        self.at_drain(worker.drain)
        self.tell(lambda: {"partitions": worker.partitions, "commits": worker.commits})
        return worker

    def missing(self) -> str | None:
        """Return why the service is not ready, or None."""
        if self.stopping.is_set():
            return "draining"
        if not self.registry.heard_at:
            return "starting"
        if time.monotonic() - self.registry.heard_at > REDIS_MISSED_S:
            return "Redis has not answered for 10 s"
        return None

    def stop(self) -> None:
        """Begin the drain."""
        self.stopping.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run everything that is registered while the block runs, then drain. Raises the error of a failed task."""
        for step in self._starts:
            await step()
        async with self.keeper:  # it ends last, and renews leases while partitions are handed over
            tasks = [asyncio.create_task(start(), name=start.__qualname__) for start in (self.keeper.run, *self._runs)]
            watch = asyncio.create_task(self._watch(tasks))
            try:
                yield
            finally:
                watch.cancel()
                self.stopping.set()
                try:
                    for leave in reversed(self._drains):
                        await leave()
                finally:
                    await end([*tasks, watch], ask_again_s=1.0)
        for task in tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def _watch(self, tasks: list[asyncio.Task[None]]) -> None:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            error = None if task.cancelled() else task.exception()
            log.critical("task_died", service=self.kind, task=task.get_name(), exc_info=error)
        self.stopping.set()

    def _describe(self) -> dict[str, Any]:
        information: dict[str, Any] = {}
        for tell in self._tells:
            information |= tell()
        return information


async def run_service(service: Service, admin: socket.socket) -> None:
    """Run a service until SIGTERM or SIGINT, then drain. A second signal ends it at once."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if service.stopping.is_set():
            raise SystemExit(1)
        log.info("draining", service=service.kind)
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    service.tell(lambda: {"admin_port": admin.getsockname()[1]})
    async with serve_http(telemetry.admin_app(service.missing), admin), service.running():
        log.info("service_started", service=service.kind, id=service.registry.id)
        await service.stopping.wait()
    log.info("service_stopped", service=service.kind)


class PortTaken(ConfigurationError):
    """Another program listens on the port."""


def listen(host: str, port: int, what: str, *, shared: bool = False) -> socket.socket:
    """Bind a socket and listen on it.

    With `shared`, other processes may listen on the same port (SO_REUSEPORT). The caller checks that they are gateways.

    Raises:
        PortTaken: another program listens on the port.
        ConfigurationError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        raise (PortTaken if taken else ConfigurationError)(_why_not(error, host, port, what)) from None
    listener.setblocking(False)
    return listener


def port_is_taken(host: str, port: int) -> bool:
    """Whether any program listens on the port, even one that shares it, which a shared bind would not notice."""
    try:
        listen(host, port, "probe").close()
    except ConfigurationError:  # also an address that cannot be bound at all: the caller's own bind says why
        return True
    return False


def _why_not(error: OSError, host: str, port: int, what: str) -> str:
    option = f"--{what}-port"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: end the program that listens there, or choose another {option}"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user: choose another {option}"
    return f"cannot listen on {host} port {port}: {error.strerror or error}"
