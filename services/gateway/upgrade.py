"""The HTTP of a handshake: the request for a websocket, and the answers to it (RFC 6455, section 4.2). No I/O."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

from websockets.datastructures import Headers

from tidewire.model.protocol import SUBPROTOCOL, encode_json

from .handshake import HEADERS_TOO_LARGE, MAX_HEADER_BYTES

VERSION = "13"
"""The version of the websocket protocol (RFC 6455, section 4.1)."""
MAX_HEADERS = 128
MAX_HEAD_BYTES = 2 * MAX_HEADER_BYTES
"""Maximum bytes of a request line and headers: each may have half of them."""
END = b"\r\n\r\n"

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_KEY_BYTES = 16
# A bare CR or LF, or a line that continues another, would be read differently by others (RFC 9112, section 5.2).
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\0-\x20\x7f]+) (HTTP/\d\.\d)\r\n")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)\r\n")

_CODES = {
    HTTPStatus.UNAUTHORIZED: "unauthenticated",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limited",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "too_large",
    HTTPStatus.REQUEST_URI_TOO_LONG: "too_large",
}


class Refusal(Exception):
    """A handshake that is answered with an HTTP error."""

    def __init__(self, status: HTTPStatus, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}

    def response(self) -> bytes:
        """Return the response, after which the connection is closed. Its body is an error frame."""
        frame = {"type": "error", "id": None, "code": _CODES.get(self.status, "bad_request"), "message": self.message}
        body = encode_json(frame)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **self.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n{lines}\r\n".encode() + body


class UpgradeRequest(NamedTuple):
    """A sound request for a websocket."""

    path: str
    """The target of the request, with its query."""
    headers: Headers
    key: str


def parse_upgrade(head: bytes) -> UpgradeRequest:
    """Parse a request line and headers, up to and with the empty line. Raises Refusal."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the request line is malformed")
    method, target, version = line.groups()
    if len(target) > MAX_HEADER_BYTES:
        raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, f"the request line has more than {MAX_HEADER_BYTES} bytes")
    headers = _headers(head, line.end())
    if version != b"HTTP/1.1":
        raise Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "a websocket needs HTTP/1.1")
    if method != b"GET":
        raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "a websocket needs the method GET", {"Allow": "GET"})
    if not (_has(headers, "Connection", "upgrade") and _has(headers, "Upgrade", "websocket")):
        raise Refusal(
            HTTPStatus.UPGRADE_REQUIRED,
            "this port serves websockets: connect with a websocket client. HTTP has a port of its own",
            {"Upgrade": "websocket", "Connection": "upgrade, close"},
        )
    if headers.get_all("Sec-WebSocket-Version") != [VERSION]:
        # RFC 6455, section 4.4: the answer names the versions that are spoken here.
        message = f"websockets of version {VERSION} are served here"
        raise Refusal(HTTPStatus.UPGRADE_REQUIRED, message, {"Sec-WebSocket-Version": VERSION})
    keys = headers.get_all("Sec-WebSocket-Key")
    if len(keys) != 1 or not _is_key(keys[0]):
        raise Refusal(HTTPStatus.BAD_REQUEST, "Sec-WebSocket-Key must be 16 bytes in base64, once")
    if len(headers.get_all("Host")) != 1:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the header Host is needed once")
    return UpgradeRequest(target.decode("ascii", "replace"), headers, keys[0])


def _headers(head: bytes, at: int) -> Headers:
    """Parse the headers that begin at an index."""
    headers, size_bytes, count = Headers(), 0, 0
    while not head.startswith(b"\r\n", at):
        line = _HEADER.match(head, at)
        if line is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "a header is malformed")
        name, value = line.groups()
        count += 1
        size_bytes += len(name) + len(value)
        if size_bytes > MAX_HEADER_BYTES:
            raise headers_too_large()
        if count > MAX_HEADERS:
            raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"there are more than {MAX_HEADERS} headers")
        headers[name.decode()] = value.strip(b" \t").decode("latin-1")
        at = line.end()
    return headers


def headers_too_large() -> Refusal:
    return Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, HEADERS_TOO_LARGE)


def _has(headers: Headers, name: str, token: str) -> bool:
    """Whether a header that is a list of tokens has this one."""
    return any(one.strip().lower() == token for value in headers.get_all(name) for one in value.split(","))


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text.encode(), validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def wants_msgpack(request: UpgradeRequest) -> bool:
    """Whether the client offers our subprotocol for MessagePack. With any other one, frames are JSON."""
    return any(
        one.strip() == SUBPROTOCOL
        for value in request.headers.get_all("Sec-WebSocket-Protocol")
        for one in value.split(",")
    )


def accepting_response(request: UpgradeRequest, *, binary: bool) -> bytes:
    """Return the response that opens the websocket (RFC 6455, section 4.2.2)."""
    accept = base64.b64encode(hashlib.sha1(request.key.encode() + _GUID, usedforsecurity=False).digest())
    chosen = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n".encode() if binary else b""
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %s\r\n%s\r\n" % (accept, chosen)
    )
