"""Logs, metrics, and the admin port of each service: /livez, /readyz, /metrics."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

_traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
"""Tracebacks name no local variables: these may hold credentials, or items of users."""


def configure_logging(log_format: str, level: str = "info") -> None:
    """Log to standard error with structlog: coloured for people, or as one JSON object a line."""
    json = log_format == "json"
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True) if json else structlog.processors.TimeStamper("%H:%M:%S"),
    ]
    ending: list[Any] = (
        [structlog.processors.ExceptionRenderer(_traceback), structlog.processors.JSONRenderer()]
        if json
        else [structlog.dev.ConsoleRenderer(sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[*shared, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping().get(level.upper(), 20)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # The libraries' own messages, without one for each connection.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are about malformed requests


def admin_app(ready: Callable[[], str | None]) -> Starlette:
    """Return the application of the admin port. `ready` returns why the service is not ready, or None."""

    async def livez(_: Request) -> Response:
        return PlainTextResponse("the loop turns\n")

    async def readyz(_: Request) -> Response:
        missing = ready()
        return PlainTextResponse(f"{missing or 'ready'}\n", status_code=503 if missing else 200)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)])
