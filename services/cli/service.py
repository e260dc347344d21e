"""One service in the foreground, as containers run it."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

from tidewire.app import App, load_app
from tidewire.errors import ConfigurationError
from tidewire.process import lifecycle, telemetry
from tidewire.process.registry import all_services
from tidewire.process.settings import Settings, load
from tidewire.redis.backend import Backend
from tidewire.redis.connect import connect
from tidewire.redis.keys import Keys


def import_app(reference: str) -> App:
    """The application, with the working directory importable."""
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
    """asyncio.run, on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _run(kind: str, app: App, settings: Settings) -> None:
    keys = Keys(settings.stage, settings.partitions)
    async with await connect(settings.redis, keys) as backend:
        service = lifecycle.Service(kind, backend, settings)
        with contextlib.closing(lifecycle.listen(settings.host, settings.admin_port, "admin")) as admin:
            if kind == "gateway":
                await _run_gateway(service, app, admin)
                return
            if kind == "store":
                from ..store.service import build as build_store

                build_store(service, app)
            elif kind == "broadcaster":
                from ..broadcaster.service import build as build_broadcaster

                build_broadcaster(service, app)
            else:
                from ..authorizer.service import build as build_authorizer

                build_authorizer(service)
            await lifecycle.run_service(service, admin)


async def _run_gateway(service: lifecycle.Service, app: App, admin: Any) -> None:
    from ..gateway.service import build as build_gateway

    settings = service.settings
    await claim_ports(service.backend, settings)
    with (
        contextlib.closing(lifecycle.listen(settings.host, settings.ws_port, "ws", shared=True)) as ws,
        contextlib.closing(lifecycle.listen(settings.host, settings.http_port, "http", shared=True)) as http,
    ):
        gateway = build_gateway(service, app)
        async with gateway.listening(ws, http):
            await lifecycle.run_service(service, admin)


async def claim_ports(backend: Backend, settings: Settings) -> None:
    """Gateways of a stage share their ports; anybody else there is found, and named.

    A bind with SO_REUSEPORT succeeds beside any program that set it too, so that it cannot be asked.
    """
    ports = {"ws": settings.ws_port, "http": settings.http_port}
    deadline = time.monotonic() + 3  # a gateway started at the same time may listen before it is registered
    while True:
        taken = {what: port for what, port in ports.items() if port and lifecycle.port_is_taken(settings.host, port)}
        if not taken:
            return
        gateways = [
            service.info
            for service in (await all_services(backend)).values()
            if service.kind == "gateway" and service.alive and service.info["host"] == platform.node()
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
