"""One service in the foreground, as containers run it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

import structlog

from tidewire.app import App, load_app
from tidewire.errors import ConfigurationError, Unreachable
from tidewire.process import lifecycle, telemetry
from tidewire.process.registry import all_services
from tidewire.process.settings import Settings, load
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys, ServiceKind

from ..wiring import WIRING
from .options import ADMIN_SOCKET

log = structlog.get_logger(__name__)

CONNECT_PATIENCE_S = 10.0
"""Seconds after which a starting service gives up to connect to Redis. A failover takes a few."""
CONNECT_PAUSE_S = 0.5
CLAIM_PATIENCE_S = 10.0
"""Seconds that a gateway waits for the one that has its ports to register. Both may start on a busy machine."""


def import_app(reference: str) -> App:
    """Load the application, with the working directory importable."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return load_app(reference)


def run(kind: str, reference: str, **flags: Any) -> None:
    """Run a service until it is told to stop. Raises ConfigurationError when it cannot start."""
    settings = load(**flags)
    telemetry.configure_logging(settings.log_format, settings.log_level)
    app = import_app(reference)
    start(_run(kind, app, settings))


def start(main: Any) -> None:
    """Call `asyncio.run`, on uvloop if it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _run(kind: str, app: App, settings: Settings) -> None:
    wiring = WIRING[ServiceKind(kind)]
    keys = Keys(settings.stage, settings.partitions)
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(await _connect(settings.redis, keys))
        service = lifecycle.Service(kind, backend, settings)
        admin = stack.enter_context(contextlib.closing(_admin_socket(settings)))
        if wiring.listens:
            await claim_ports(backend, settings)
            ws, http = (
                stack.enter_context(contextlib.closing(lifecycle.listen(settings.host, port, what, shared=True)))
                for what, port in (("ws", settings.ws_port), ("http", settings.http_port))
            )
            await stack.enter_async_context(wiring.build(service, app).listening(ws, http))
        else:
            wiring.build(service, app)
        await lifecycle.run_service(service, admin)


async def _connect(url: str, keys: Keys) -> Backend:
    """Connect, and retry while Redis does not answer. Raises as `tidewire.redis.connect.connect` does."""
    deadline, warned = time.monotonic() + CONNECT_PATIENCE_S, False
    while True:
        try:
            return await connect(url, keys)
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise
            if not warned:
                log.warning("redis_not_reachable", error=str(error), advice="the service retries before it gives up")
            warned = True
            await asyncio.sleep(CONNECT_PAUSE_S)


def _admin_socket(settings: Settings) -> socket.socket:
    """The bound socket of the admin port. Under `up` the parent process has bound it and hands it down."""
    if descriptor := os.environ.get(ADMIN_SOCKET):
        inherited = socket.socket(fileno=int(descriptor))
        inherited.setblocking(False)
        return inherited
    return lifecycle.listen(settings.host, settings.admin_port, "admin")


async def claim_ports(backend: Backend, settings: Settings) -> None:
    """Check that only gateways of this stage listen on the websocket and HTTP ports.

    A bind with SO_REUSEPORT succeeds beside any other program that set the option, so the bind alone proves nothing.

    Raises:
        ConfigurationError: another program listens on one of the ports.
    """
    ports = {"ws": settings.ws_port, "http": settings.http_port}
    deadline = time.monotonic() + CLAIM_PATIENCE_S
    while True:
        taken = {what: port for what, port in ports.items() if port and lifecycle.port_is_taken(settings.host, port)}
        if not taken:
            return
        gateways = [
            service.info
            for service in (await all_services(backend)).values()
            if service.kind == ServiceKind.GATEWAY and service.alive and service.info["host"] == platform.node()
        ]
        if all(any(info.get(f"{what}_port") == port for info in gateways) for what, port in taken.items()):
            return
        if time.monotonic() > deadline:
            what, port = next(iter(taken.items()))
            raise ConfigurationError(
                f"port {port} on {settings.host} is in use by something that is no gateway of stage "
                f"{settings.stage!r}: end that program, or choose another --{what}-port"
            )
        await asyncio.sleep(0.2)
