"""Answers of the HTTP port: every request ends in one, whatever happens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from redis.exceptions import RedisError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tidewire.errors import Internal, Overloaded, RateLimited, RequestError, TooLarge

log = structlog.get_logger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a value as a JSON response."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def error_frame(error: RequestError) -> Response:
    """Return an error as its frame, with the status of its code."""
    headers = {}
    if isinstance(error, RateLimited):
        headers["Retry-After"] = str(max(1, int(error.details.get("retry_after_ms", 1000)) // 1000))
    return as_json(error.as_frame(None), error.status, headers)


def answered(endpoint: Endpoint, refuse: Callable[[RequestError], Response] = error_frame) -> Endpoint:
    """Turn each error of an endpoint into a response."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except RequestError as error:
            return refuse(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except (RedisError, OSError):
            return refuse(Overloaded("Redis does not answer, and nothing was done: try again"))
        except Exception:
            log.exception("request_failed", path=request.url.path)
            return refuse(Internal("something went wrong on the server"))

    return answer


async def read_body(request: Request, limit: int, setting: str = "") -> bytes:
    """Return the body. Raises TooLarge before it has read more than the limit; with 0 there is none."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if limit and len(data) > limit:
            raise TooLarge(f"the body has more than {limit} bytes{setting}: send less at a time", limit=limit)
    return bytes(data)
