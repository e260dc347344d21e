"""The HTTP port: the actions for backends, and the application's static folder."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from tidewire.errors import (
    BadRequest,
    Internal,
    RateLimited,
    RequestError,
    TooLarge,
    Unauthenticated,
    UnsupportedAction,
)
from tidewire.protocol import STORE_ACTIONS, Send, decode_frame, is_traceparent, parse_request

from .core import Core
from .handshake import credential

log = structlog.get_logger(__name__)


class _Static(StaticFiles):
    """Files that browsers ask for again at each visit, so that a new version is seen at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


def http_app(core: Core) -> Starlette:
    """Routes of the HTTP port."""

    async def act(request: Request) -> Response:
        action = request.path_params["action"]
        try:
            return _json(await _perform(core, request, action))
        except RequestError as error:
            frame = error.as_frame(None)
            headers = {}
            if isinstance(error, RateLimited):
                headers["Retry-After"] = str(max(1, int(error.details.get("retry_after_ms", 1000)) // 1000))
            return _json(frame, error.status, headers)
        except Exception:
            log.exception("request_failed", action=action)
            return _json(Internal("something went wrong on the server").as_frame(None), 500)

    routes: list[BaseRoute] = [Route("/v1/{action}", act, methods=["POST"])]
    if core.app.static:
        routes.append(Mount("/", _Static(directory=core.app.static, html=True)))
    return Starlette(routes=routes)


async def _perform(core: Core, request: Request, action: str) -> Any:
    key = credential(request.headers, {})
    if key is None:
        raise Unauthenticated("a credential is needed: header auth_key, or Authorization: Bearer")
    principal = await core.gatekeeper.authorize(key)
    frame = await _body(request, core.settings.limit_frame_bytes)
    if frame.setdefault("action", action) != action:
        raise BadRequest(f"the body says action {frame['action']!r}, the path {action!r}")
    trace = request.headers.get("traceparent")
    if trace is not None and is_traceparent(trace):  # else it is as if there were none: Trace Context, section 3.2
        frame.setdefault("traceparent", trace)
    parsed = parse_request(frame)
    if action == "whoami":
        return {"user": principal.user, "connection": None, "claims": principal.claims}
    if action == "ping":
        return {}
    if isinstance(parsed, Send):
        return await core.send(principal, None, frame, parsed)
    if action not in STORE_ACTIONS:
        raise UnsupportedAction(f"{action} is for websockets")
    return await core.store(principal, None, frame, parsed)


async def _body(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object of the body. Raises TooLarge before it has read more than the limit."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if limit and len(data) > limit:
            raise TooLarge(f"the body has more than {limit} bytes", limit=limit)
    try:
        text = bytes(data or b"{}").decode()
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8") from None
    return decode_frame(text, binary=False)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
