"""Which pages may connect: their origins (RFC 6454), and CORS on the HTTP port (Fetch Standard, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple, Self
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidewire.errors import ConfigurationError

DEFAULT_PORTS = {"http": 80, "https": 443}
CORS_METHODS = "GET, POST, DELETE"
CORS_HEADERS = "auth_key, Authorization, Content-Type, Last-Event-ID, traceparent"
CORS_EXPOSED = "Retry-After"
CORS_MAX_AGE_S = 600
"""How long a browser may keep the answer to a preflight."""


class Origin(NamedTuple):
    """An origin in its normal form: lower case, with its port. A host `*.example.com` stands for all below it."""

    scheme: str
    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse an origin as browsers send it; None if it is not an origin."""
        parts = split(text)
        if parts is None or not parts.scheme or not parts.hostname:
            return None
        if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
            return None
        try:
            host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else parts.hostname
            return cls(parts.scheme.lower(), host, parts.port or DEFAULT_PORTS.get(parts.scheme.lower()))
        except ValueError:  # a port or a name that is invalid
            return None

    def matches(self, other: Origin) -> bool:
        """Whether a page's origin is this one, or below it."""
        if (self.scheme, self.port) != (other.scheme, other.port):
            return False
        if self.host.startswith("*."):
            return other.host.endswith(self.host[1:])
        return self.host == other.host


class Origins:
    """The origins of `--origins`; without any, pages of the same host name on any port may connect.

    Raises:
        ConfigurationError: an entry can match no page.
    """

    def __init__(self, setting: str) -> None:
        entries = [entry.strip() for entry in setting.split(",") if entry.strip()]
        self._any = "*" in entries
        self._null = "null" in entries
        self._listed: list[Origin] = []
        for entry in entries:
            if entry in ("*", "null"):
                continue
            origin = Origin.parse(entry)
            if origin is None or "*" in origin.host.removeprefix("*."):
                raise ConfigurationError(
                    f"--origins {entry!r} matches no page: write scheme and host, as https://app.example.com, "
                    "https://*.example.com or http://localhost:3000; or * for all"
                )
            self._listed.append(origin)
        self._same_host = not entries

    def allow(self, origin: str, host: str) -> bool:
        """Whether pages of an origin may connect to a server that they call `host`."""
        if self._any or (self._null and origin == "null"):
            return True
        page = Origin.parse(origin)
        if page is None:
            return False
        if self._same_host:
            ours = split(f"//{host}")
            return ours is not None and ours.hostname is not None and page.host == ours.hostname
        return any(listed.matches(page) for listed in self._listed)


def split(address: str) -> SplitResult | None:
    """Split an address; None if it is malformed."""
    try:
        return urlsplit(address)
    except ValueError:  # an unbalanced bracket
        return None


class Cors:
    """Lets pages of the allowed origins call every route, and answers their preflights."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("Origin")
        if scope["type"] != "http" or origin is None:
            await self._app(scope, receive, send)
            return
        allowed = self._origins.allow(origin, headers.get("Host", ""))
        if scope["method"] == "OPTIONS" and "Access-Control-Request-Method" in headers:
            await self._preflight(origin, allowed=allowed)(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")
                if allowed:
                    answer["Access-Control-Allow-Origin"] = origin
                    answer["Access-Control-Expose-Headers"] = CORS_EXPOSED
            await send(message)

        await self._app(scope, receive, send_with_cors)

    def _preflight(self, origin: str, *, allowed: bool) -> Response:
        if not allowed:
            return Response(f"pages of {origin[:100]} may not call this: see --origins\n", 403, {"Vary": "Origin"})
        headers = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": CORS_METHODS,
            "Access-Control-Allow-Headers": CORS_HEADERS,
            "Access-Control-Max-Age": str(CORS_MAX_AGE_S),
            "Vary": "Origin",
        }
        return Response(status_code=204, headers=headers)
