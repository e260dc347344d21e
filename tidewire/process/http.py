"""HTTP servers inside a service: uvicorn, with time-outs for peers that do not go on, and a bound on their number."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import resource
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from tidewire.errors import ConfigurationError

REFUSED = Counter("tidewire_http_refused_total", "HTTP connections that were closed, by reason.", ["reason"])

HEAD_S = 10.0
"""Maximum seconds from a connection, or from the first byte of a further request, to the end of the headers."""
BODY_S = 30.0
"""Maximum seconds from the end of the headers to the end of the body."""
IDLE_S = 5
"""Maximum seconds between two requests of a connection."""
UNREAD_S = 60.0
"""Maximum seconds that a peer takes too little of a response for more to be sent."""
MAX_HEAD_BYTES = 65_536
"""Maximum bytes of a request line and headers that are read."""
HTTP_SHARE = 4
"""A server takes at most this part of the process's file descriptors, so that a flood leaves the rest to others."""


class _Protocol(H11Protocol):
    """One connection. It is closed when its peer takes too long to send a request."""

    _deadline: asyncio.TimerHandle | None = None
    _within = ""
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= max_connections(HTTP_SHARE):
            REFUSED.labels("full").inc()
            transport.abort()
            return
        super().connection_made(transport)
        self._expect("head", HEAD_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.more_body and self._within != "body":
                self._expect("body", BODY_S)
            elif not cycle.more_body:
                self._expect_nothing()
        elif self._within != "head":
            self._expect("head", HEAD_S)  # a further request has begun

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_S, self._abort_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        if self._unread:
            self._unread.cancel()
        if self.transport is not None:
            super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._expect_nothing()
        super().on_response_complete()

    def _expect(self, what: str, within_s: float) -> None:
        self._expect_nothing()
        self._within = what
        self._deadline = self.loop.call_later(within_s, self._late)

    def _expect_nothing(self) -> None:
        self._within = ""
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _abort_unread(self) -> None:
        REFUSED.labels("unread").inc()
        self.transport.abort()

    def _late(self) -> None:
        REFUSED.labels(f"slow_{self._within}").inc()
        self.transport.abort()


def max_connections(share: int) -> int:
    """Return the maximum connections of a server that may take this part of the process's file descriptors."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // share


class _Server(uvicorn.Server):
    """uvicorn inside a service: the service handles signals, and the server ends at once when it is told to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._told.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        ticks = itertools.count()
        while not await self.on_tick(next(ticks)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._told.wait()


@contextlib.asynccontextmanager
async def serve_http(app: Any, listener: Any, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """Serve an ASGI application on a bound socket while the block runs."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=IDLE_S,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        ws="none",
        server_header=False,
        proxy_headers=False,  # anybody could name another address
    )
    config.load()
    config.ssl = tls  # our own, because its certificate is loaded again when it changes
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    try:
        while not server.started:
            if task.done():
                task.result()
                raise ConfigurationError("the HTTP server did not start")
            await asyncio.sleep(0.01)
        yield
    finally:
        server.end()
        with contextlib.suppress(asyncio.CancelledError):
            await task
