"""The HTTP port: the actions for backends, the feed as server-sent events, and the application's static folder."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any
from urllib.parse import quote

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from tidewire.errors import (
    BadRequest,
    Overloaded,
    RateLimited,
    TooLarge,
    Unauthenticated,
)
from tidewire.model.protocol import decode_frame, is_traceparent, parse_request, topics_problem
from tidewire.process.lag import total_lag
from tidewire.redis.keys import ConsumerGroup
from tidewire.tasks import end

from . import administration, handshake
from .answers import answered, as_json, read_body
from .connection import Connection
from .core import Admission, Core, require_service
from .deadline import Deadline
from .event_stream import EventIds, EventStream, read_event_id
from .origins import Cors
from .reception import Reception, Serve

log = structlog.get_logger(__name__)


ONCE = ("host", "origin", "auth_key", "authorization", "content-length", "transfer-encoding")
"""Headers that a request has at most once."""


class _StrictFraming:
    """Refuses requests that two HTTP parsers could read differently (RFC 9112, sections 3.2 and 6.1)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        problem = next(
            (f"the header {name} appears more than once" for name in ONCE if len(headers.getlist(name)) > 1), None
        )
        if "content-length" in headers and "transfer-encoding" in headers:
            problem = "a request must not have both Content-Length and Transfer-Encoding"
        if sum(len(name) + len(value) for name, value in scope["headers"]) > handshake.MAX_HEADER_BYTES:
            response = as_json(TooLarge(handshake.HEADERS_TOO_LARGE).as_frame(None), 431, {"Connection": "close"})
            await response(scope, receive, send)
        elif problem:
            response = as_json(BadRequest(problem).as_frame(None), 400, {"Connection": "close"})
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Static(StaticFiles):
    """Files that browsers revalidate at each visit, so that a new version is seen at once. Dotfiles are hidden."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        parts = path.replace("\\", "/").split("/")
        if any(part.startswith(".") and part != "." for part in parts):
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        if "Location" in response.headers:  # of a folder: relative, since only the proxy in front knows our address
            response.headers["Location"] = f"{quote(parts[-1])}/"
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


LAGGING = (ConsumerGroup.STORE, ConsumerGroup.BROADCASTER, ConsumerGroup.AUTHORIZER)
EVENTS = "text/event-stream"
EVENT_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class _Events(StreamingResponse):
    """The events of a connection. The connection ends with the response, also where its body was never begun."""

    def __init__(self, peer: EventStream, serving: asyncio.Task[None]) -> None:
        super().__init__(peer.events(), headers=EVENT_HEADERS, media_type=EVENTS)
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await end([self._serving])


def http_app(core: Core, serve: Serve, reception: Reception) -> ASGIApp:
    """Routes of the HTTP port."""

    @answered
    async def act(request: Request) -> Response:
        return await _perform(core, request, request.path_params["action"])

    @answered
    async def feed(request: Request) -> Response:
        return await _feed(core, serve, reception, request)

    @answered
    async def lag(request: Request) -> Response:
        return await _lag(core, request)

    routes: list[BaseRoute] = [
        Route("/v1/lag", lag, methods=["GET"]),
        Route("/v1/feed", feed, methods=["GET"]),
        Route("/v1/{action}", act, methods=["POST"]),
        *administration.routes(core),
    ]
    if core.app.static:
        routes.append(Mount("/", _Static(directory=core.app.static, html=True)))
    prefix = core.settings.path_prefix
    app = Starlette(routes=[Mount(prefix, routes=routes)] if prefix else routes)
    app.router.redirect_slashes = False
    return _StrictFraming(Cors(app, reception.origins))


async def _feed(core: Core, serve: Serve, reception: Reception, request: Request) -> Response:
    """The feed as server-sent events. It begins where Last-Event-ID says, or the query as for websockets."""
    wanted = handshake.read(f"/v1?{request.url.query}", request.headers, reception.origins)
    if core.service.stopping.is_set():
        raise Overloaded("this server is shutting down: connect again")
    if wanted.auth_key is None:
        raise Unauthenticated(
            "a credential is needed: header auth_key, Authorization: Bearer, or auth_key in the query"
        )
    deadline = Deadline(core.settings.welcome_timeout_s)
    principal = await deadline.bound(core.gatekeeper.authorize(wanted.auth_key))
    last_id = request.headers.get("Last-Event-ID", "")
    deadline.step = "Redis to say where the stream continues"
    user = principal.user
    cursor, topics = await deadline.bound(read_event_id(core.backend, user, last_id, wanted.topics))
    if problem := topics_problem(topics):
        raise BadRequest(problem)
    if request.method == "HEAD":
        return Response(headers=EVENT_HEADERS, media_type=EVENTS)
    peer = EventStream(
        reception.proxies.source(
            request.client.host if request.client else "", request.headers.getlist("X-Forwarded-For")
        ),
        request.headers.get("User-Agent", ""),
        core.settings.limit_queued_bytes,
        EventIds(core.backend, user, core.settings.resume_window_s),
    )
    connection = Connection(core, peer, principal, deadline)

    async def serve_it() -> None:
        try:
            with contextlib.ExitStack() as counted:
                await reception.count(principal, deadline, counted)
                await serve(connection, cursor or wanted.cursor, topics)
        except (RateLimited, Overloaded) as error:
            connection.refused = error
        finally:
            peer.end()
            connection.begun.set()

    serving = asyncio.create_task(serve_it(), name="events")
    try:
        await connection.begun.wait()
    except asyncio.CancelledError:
        await end([serving])
        raise
    if (refused := connection.refused) is not None:
        # It is answered at once; its feeds are left in the background, which may take as long as Redis is silent.
        response = as_json(refused.as_frame(None), refused.status)
        response.background = BackgroundTask(asyncio.wait, {serving})
        return response
    return _Events(peer, serving)


class _Answer(Response):
    """An answer that holds its user's budgets until it has been handed to the socket, or cannot be."""

    def __init__(self, value: Any, admission: Admission) -> None:
        super().__init__(msgspec.json.encode(value), media_type="application/json")
        self._admission = admission
        admission.room.resize(len(self.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._admission):
            await super().__call__(scope, receive, send)


async def _perform(core: Core, request: Request, action: str) -> Response:
    principal = await core.gatekeeper.authorize(handshake.presented(request.headers))
    frame, size_bytes = await _body(request, core.settings.limit_frame_bytes)
    if frame.setdefault("action", action) != action:
        raise BadRequest(f"the body says action {frame['action']!r}, the path {action!r}")
    trace = request.headers.get("traceparent")
    if trace is not None and is_traceparent(trace):  # an invalid one is ignored: Trace Context, section 3.2
        frame.setdefault("traceparent", trace)
    parsed = parse_request(frame)
    admission = await core.admit(None, principal, parsed, size_bytes)
    try:
        result = core.begin(principal, None, parsed, admission.work)
    except BaseException:
        admission.cancel()
        raise
    try:
        return _Answer(await result, admission)
    except BaseException:
        admission.close()
        raise


async def _lag(core: Core, request: Request) -> Response:
    """How far each service is behind, over all partitions. Autoscalers ask for it."""
    principal = await core.gatekeeper.authorize(handshake.presented(request.headers))
    require_service(principal, "/v1/lag")
    found = await asyncio.gather(*(total_lag(core.backend, group) for group in LAGGING))
    return as_json({group: one._asdict() for group, one in zip(LAGGING, found, strict=True)})


async def _body(request: Request, limit: int) -> tuple[dict[str, Any], int]:
    """The JSON object of the body, and its bytes."""
    data = await read_body(request, limit, " (TIDEWIRE_LIMIT_FRAME_BYTES)")
    try:
        text = (data or b"{}").decode()
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    return decode_frame(text, binary=False), len(data)
