"""`/@connections/{id}`: the calls of boto3's client `apigatewaymanagementapi`, about any gateway's connections."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

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
from .answers import answered, as_json, read_body
from .core import Core, require_service
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
        principal = await core.gatekeeper.authorize(credential(request.headers))
        require_service(principal, "/@connections")
        return await methods[request.method](core, request, request.path_params["id"])

    endpoint = answered(act, _refused)
    return [
        Route(path, endpoint, methods=list(methods)) for path in ("/@connections/{id}", "/{_:path}/@connections/{id}")
    ]


def credential(headers: Mapping[str, str]) -> str:
    """Return the auth_key: the access key id of a signed request, or as for other requests. Raises Unauthenticated.

    The signature is not looked at, because the key itself is the secret.
    """
    signed = _SIGNED.match(headers.get("Authorization", ""))
    return signed[1] if signed else handshake.presented(headers)


async def _post(core: Core, request: Request, id_: str) -> Response:
    data = await read_body(request, MAX_POSTED_BYTES)
    await core.orders.to_connection(OrderAction.POST, id_, data=data)
    return Response(status_code=200)


async def _get(core: Core, request: Request, id_: str) -> Response:
    found = await core.orders.to_connection(OrderAction.DESCRIBE, id_)
    body = {
        "connectedAt": _iso(found["connected_at"]),
        "lastActiveAt": _iso(found["active_at"]),
        "identity": {"sourceIp": found["source_ip"], "userAgent": found["user_agent"]},
    }
    return as_json(body)


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
    return as_json({"message": error.message}, status, {"x-amzn-ErrorType": name})
