"""Every error that Tidewire raises.

TidewireError
├── ConfigurationError      an application, a setting or an address that cannot be used
│   └── Unreachable         Redis does not answer; it may pass by itself
├── Fenced                  another worker owns the partition
├── Declined                a worker leaves a partition to one that knows more tables
├── ConnectionClosed        the server closed the client's connection for good
└── RequestError            the answer to a request: one class for each code
    ├── BadRequest  Unauthenticated  PermissionDenied  NotFound  Conflict  UnsupportedAction  TooLarge
    └── RateLimited  Overloaded  Timeout  Internal          (a retry can help)
"""

from __future__ import annotations

import traceback
from typing import Any, ClassVar


def told(error: BaseException) -> str:
    """Return an error of the application's own code with the place where it was raised, for a log."""
    trace = traceback.extract_tb(error.__traceback__)
    return f"{error!r}, {trace[-1].filename}:{trace[-1].lineno}" if trace else repr(error)


class TidewireError(Exception):
    """The base of all errors of Tidewire."""


class ConfigurationError(TidewireError):
    """The operator or the author of the application must change something. The message says what."""


class Unreachable(ConfigurationError):
    """Redis does not answer at the address. Unlike other configuration errors, this one may pass by itself."""


class Fenced(TidewireError):
    """Another worker has taken the partition. The call read and wrote nothing."""


class Declined(TidewireError):
    """The partition has entries of a table that another live process knows, and this one does not."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(f"this application does not declare {', '.join(sorted(names))}, another live one does")
        self.names = names


class ConnectionClosed(TidewireError):
    """The server closed the connection for good: the code tells clients not to come back."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed by the server with {code}: {reason or 'no reason given'}")
        self.code = code
        self.reason = reason


class RequestError(TidewireError):
    """An error that the server answers: `code`, `message`, whether a `retry` can help, and `details` (JSON values)."""

    code: ClassVar[str] = "internal"
    retry: ClassVar[bool] = False
    status: ClassVar[int] = 500  # of the HTTP interface

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details

    def as_frame(self, request_id: str | int | None) -> dict[str, Any]:
        frame: dict[str, Any] = {"type": "error", "id": request_id, "code": self.code, "message": self.message}
        return frame | {"retry": self.retry, "details": self.details}


class BadRequest(RequestError):
    code, status = "bad_request", 400


class Unauthenticated(RequestError):
    code, status = "unauthenticated", 401


class PermissionDenied(RequestError):
    code, status = "forbidden", 403


class NotFound(RequestError):
    code, status = "not_found", 404


class Conflict(RequestError):
    code, status = "conflict", 409


class UnsupportedAction(RequestError):
    code, status = "unsupported_action", 400


class TooLarge(RequestError):
    code, status = "too_large", 413


class RateLimited(RequestError):
    code, retry, status = "rate_limited", True, 429


class Overloaded(RequestError):
    code, retry, status = "overloaded", True, 503


class Timeout(RequestError):
    code, retry, status = "timeout", True, 504


class Internal(RequestError):
    code, retry, status = "internal", True, 500


BY_CODE: dict[str, type[RequestError]] = {
    kind.code: kind
    for kind in (
        BadRequest,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        Conflict,
        UnsupportedAction,
        TooLarge,
        RateLimited,
        Overloaded,
        Timeout,
        Internal,
    )
}


def from_wire(frame: dict[str, Any]) -> RequestError:
    """Return the error of an `error` frame, or of a stored reply."""
    kind = BY_CODE.get(str(frame.get("code")), Internal)
    error = kind(str(frame.get("message", "")))
    error.details = dict(frame.get("details") or {})
    return error


def item_too_large(size: int, limit: int) -> TooLarge:
    """Return the error for an item that exceeds its limit in bytes."""
    return TooLarge(
        f"the item has {size} bytes as JSON, and at most {limit} are allowed (TIDEWIRE_LIMIT_ITEM_BYTES): split it, or "
        "store large parts elsewhere",
        limit=limit,
        size=size,
    )
