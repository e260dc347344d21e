"""`/@connections/{id}`: the calls of boto3's client `apigatewaymanagementapi`, about any gateway's connections."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tidewire.errors import (
    NotFound,
    PermissionDenied,
    RateLimited,
    RequestError,
    TooLarge,
    Unauthenticated,
)

from . import handshake
from .core import Core
from .orders import OrderAction, no_connection

MAX_POSTED_BYTES = 131_072
"""Maximum bytes of data that are posted to a connection."""
_SIGNED = re.compile(r"AWS4-HMAC-SHA256 .*\bCredential=([^/,\s]+)/")
ERRORS: tuple[tuple[type[RequestError], int, str], ...] = (
    (NotFound, 410, "GoneException"),
    (TooLarge, 413, "PayloadTooLargeException"),
    (RateLimited, 429, "LimitExceededException"),
    (Unauthenticated, 403, "ForbiddenException"),
    (PermissionDenied, 403, "ForbiddenException"),
)
"""Status and type of each error, as that client knows them. Others are an `InternalFailure`, which it repeats."""


Method = Callable[[Core, Request, str], Awaitable[Response]]


def routes(core: Core) -> list[BaseRoute]:
    """The routes under any path prefix, because clients have the stage's name in their address."""
    methods: dict[str, Method] = {"POST": _post, "GET": _get, "DELETE": _delete}

    async def act(request: Request) -> Response:
        try:
            await _check(core, request.headers)
            return await methods[request.method](core, request, request.path_params["id"])
        except RequestError as error:
            return _refused(error)

    return [Route(path, act, methods=list(methods)) for path in ("/@connections/{id}", "/{_:path}/@connections/{id}")]


async def _check(core: Core, headers: Mapping[str, str]) -> None:
    """Check that the caller has a service key. Raises Unauthenticated or PermissionDenied."""
    principal = await core.gatekeeper.authorize(credential(headers))
    if principal.role != "service":
        raise PermissionDenied("/@connections requires a service key")


def credential(headers: Mapping[str, str]) -> str:
    """Return the auth_key: the access key id of a signed request, or as for other requests. Raises Unauthenticated.

    The signature is not looked at, because the key itself is the secret.
    """
    signed = _SIGNED.match(headers.get("Authorization", ""))
    key = signed[1] if signed else handshake.credential(headers, {})
    if key is None:
        raise Unauthenticated("a credential is needed: an auth_key as access key id, or in a header")
    return key


async def _post(core: Core, request: Request, id_: str) -> Response:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_POSTED_BYTES:
            raise TooLarge(f"the data has more than {MAX_POSTED_BYTES} bytes", limit=MAX_POSTED_BYTES)
    await core.orders.to_connection(OrderAction.POST, id_, data=bytes(data))
    return Response(status_code=200)


async def _get(core: Core, request: Request, id_: str) -> Response:
    found = await core.orders.to_connection(OrderAction.DESCRIBE, id_)
    body = {
        "connectedAt": _iso(found["connected_at"]),
        "lastActiveAt": _iso(found["active_at"]),
        "identity": {"sourceIp": found["source_ip"], "userAgent": found["user_agent"]},
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _delete(core: Core, request: Request, id_: str) -> Response:
    counts = await core.orders.to_all(OrderAction.DISCONNECT, connections=[id_], users=[])
    if not sum(counts):
        raise no_connection(id_)
    return Response(status_code=204)


def _iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _refused(error: RequestError) -> Response:
    known = ((status, name) for kind, status, name in ERRORS if isinstance(error, kind))
    status, name = next(known, (error.status, "InternalFailure"))
    body: dict[str, Any] = {"message": error.message}
    return Response(msgspec.json.encode(body), status, {"x-amzn-ErrorType": name}, "application/json")
