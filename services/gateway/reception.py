"""The reception: which websockets a gateway takes, with whose credential, and how many of whom."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import NamedTuple

import structlog
from prometheus_client import Counter as Metric
from websockets.exceptions import ConnectionClosed

from tidewire.errors import Overloaded, RateLimited, RequestError, Unauthenticated
from tidewire.model.protocol import Auth, decode_frame, parse_request
from tidewire.model.records import Principal

from . import handshake
from .connection import Connection
from .core import Core
from .deadline import Deadline
from .handshake import Handshake
from .opening import OpeningHandshake
from .origins import Origins
from .proxies import TrustedProxies
from .quotas import TokenBucket
from .upgrade import Refusal
from .websocket import Websocket

log = structlog.get_logger(__name__)

HANDSHAKES = Metric(
    "tidewire_gateway_handshakes_total", "Handshakes by the outcome of their authorization.", ["outcome"]
)
MAX_FIRST_FRAME_BYTES = 4096
"""Maximum size of a frame before the peer has presented a credential."""

_CLOSE_CODES = {400: 4401, 401: 4401, 403: 4403, 429: 4429}
"""Close codes by the status of an error. A websocket with another error is closed with 1013: try again later."""
_TOLD = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses that a browser gets as a close code. It hides the status of a handshake from its page."""

Serve = Callable[[Connection, str | None, dict[str, str]], Awaitable[None]]
"""Serves a connection from the cursors of its feed and its topics, until it ends."""


class Entry(NamedTuple):
    """An authorized websocket, and where it begins."""

    websocket: Websocket
    principal: Principal
    cursor: str | None
    topics: dict[str, str]
    deadline: Deadline


class Reception:
    """Takes each websocket through its authorization, within the limits, and has it served."""

    def __init__(self, core: Core, serve: Serve) -> None:
        self._core = core
        self._settings = core.settings
        self._serve = serve
        self.origins = Origins(self._settings.origins)
        self.proxies = TrustedProxies(self._settings.trusted_proxies)
        self._handshakes = TokenBucket(self._settings.limit_handshakes_per_s, time.monotonic())
        self._addresses: Counter[str] = Counter()
        self._unauthenticated = 0

    def refused(self) -> None:
        """Count a refused handshake."""
        HANDSHAKES.labels("refused").inc()

    async def open(self, opening: OpeningHandshake) -> None:
        """Serve a connection of the websocket port from its request to its end. Raises Refusal."""
        wanted, source_ip = self._read(opening)
        with contextlib.ExitStack() as counted:
            counted.enter_context(self._from_address(source_ip))
            with self._unauthenticated_one():
                entry = await self._authorized(opening, wanted, source_ip, counted)
            if entry:
                connection = Connection(self._core, entry.websocket, entry.principal, entry.deadline)
                await self._serve(connection, entry.cursor, entry.topics)
            else:
                self.refused()

    async def count(self, principal: Principal, deadline: Deadline, counted: contextlib.ExitStack) -> None:
        """Count a connection of its user, until `counted` is closed. Raises RateLimited, and Overloaded in the end."""
        quota = self._core.connection_quota
        if principal.role == "service":
            return
        deadline.step = "Redis to count the connections of the user"
        if not await deadline.bound(quota.enter(principal.user)):
            raise RateLimited(
                f"this user has {self._settings.limit_connections} connections (TIDEWIRE_LIMIT_CONNECTIONS): close one",
                retry_after_ms=1000,
            )
        counted.callback(quota.leave, principal.user)

    # ── the steps ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, opening: OpeningHandshake) -> tuple[Handshake, str]:
        """Return what a request wants, and the address that it comes from. Raises Refusal."""
        request = opening.request
        per_s = self._settings.limit_handshakes_per_s
        if per_s and self._handshakes.take(per_s, time.monotonic()):
            raise _refusal(Overloaded("this server is asked for too many connections a second: try again"))
        try:
            wanted = handshake.read(request.path, request.headers, self.origins, self._settings.path_prefix)
        except RequestError as error:
            raise _refusal(error) from None
        if self._core.service.stopping.is_set():
            raise _refusal(Overloaded("this server is shutting down: connect again"))
        return wanted, self.proxies.source(opening.address, request.headers.get_all("X-Forwarded-For"))

    @contextlib.contextmanager
    def _from_address(self, source_ip: str) -> Iterator[None]:
        """Count a connection of an address. Raises Refusal if there are too many."""
        most = self._settings.limit_address_connections
        if most and self._addresses[source_ip] >= most:
            limit = "TIDEWIRE_LIMIT_ADDRESS_CONNECTIONS"
            raise _refusal(RateLimited(f"your address has {most} connections to this server ({limit}): close one"))
        self._addresses[source_ip] += 1
        try:
            yield
        finally:
            self._addresses[source_ip] -= 1
            if not self._addresses[source_ip]:
                del self._addresses[source_ip]

    @contextlib.contextmanager
    def _unauthenticated_one(self) -> Iterator[None]:
        """Count a connection whose credential is not known yet. Raises Refusal if there are too many."""
        most = self._settings.limit_unauthenticated
        if most and self._unauthenticated >= most:
            raise _refusal(Overloaded(f"{most} connections wait for their credentials to be checked: try again"))
        self._unauthenticated += 1
        try:
            yield
        finally:
            self._unauthenticated -= 1

    async def _authorized(
        self, opening: OpeningHandshake, wanted: Handshake, source_ip: str, counted: contextlib.ExitStack
    ) -> Entry | None:
        """Authorize by the request or the first frame, and count the connection of the user.

        Returns None if the websocket was closed instead. Raises Refusal.
        """
        if wanted.auth_key is None and self._settings.first_frame_auth_s > 0:
            return await self._first_frame(opening.accept(source_ip, MAX_FIRST_FRAME_BYTES), counted)
        deadline = Deadline(self._settings.welcome_timeout_s)
        try:
            if wanted.auth_key is None:
                raise Unauthenticated("a credential is needed in the handshake")
            principal = await deadline.bound(self._core.gatekeeper.authorize(wanted.auth_key))
            await self.count(principal, deadline, counted)
        except RequestError as error:
            refusal = _refusal(error)
            if not wanted.browser or refusal.status not in _TOLD:
                raise refusal from None
            await _close(opening.accept(source_ip, MAX_FIRST_FRAME_BYTES), error)
            return None
        websocket = opening.accept(source_ip, self._settings.limit_frame_bytes or None)
        return Entry(websocket, principal, wanted.cursor, wanted.topics, deadline)

    async def _first_frame(self, websocket: Websocket, counted: contextlib.ExitStack) -> Entry | None:
        """Do the same by the first frame."""
        try:
            async with asyncio.timeout(self._settings.first_frame_auth_s):
                message = await websocket.recv()
            request = parse_request(decode_frame(message, binary=websocket.binary))
            if not isinstance(request, Auth):
                raise Unauthenticated("the first frame must be auth, with an auth_key")
            deadline = Deadline(self._settings.welcome_timeout_s)  # from here on, the peer waits for the gateway
            principal = await deadline.bound(self._core.gatekeeper.authorize(request.auth_key))
            await self.count(principal, deadline, counted)
        except TimeoutError:
            await websocket.close(4408, "no credential in time")
        except RequestError as error:
            await _close(websocket, error)
        except ConnectionClosed:
            pass
        else:
            websocket.limit_messages(self._settings.limit_frame_bytes or None)
            return Entry(websocket, principal, request.cursor, request.topics, deadline)
        return None


def _refusal(error: RequestError) -> Refusal:
    """Return the answer to a handshake that fails with an error."""
    status = error.status if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else HTTPStatus.SERVICE_UNAVAILABLE
    return Refusal(HTTPStatus(status), error.message, {"Retry-After": "1"} if error.retry else None)


async def _close(websocket: Websocket, error: RequestError) -> None:
    """Close a websocket whose credential is refused, or cannot be checked."""
    if code := _CLOSE_CODES.get(error.status):
        await websocket.close(code, handshake.close_reason(error.message))
    else:
        log.warning("not_authorized", error=error.message)
        await websocket.close(1013, "try again later")
