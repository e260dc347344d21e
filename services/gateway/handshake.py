"""What a handshake asks for, and whether its path and origin are allowed. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs

import msgspec

from tidewire.errors import BadRequest, NotFound, PermissionDenied, Unauthenticated
from tidewire.model.protocol import topics_problem

from .origins import Origins, split

PATHS = ("/", "/v1")
MAX_HEADER_BYTES = 32_768
"""Maximum bytes of all headers of a request, on both ports. Browsers send all cookies of a host."""
HEADERS_TOO_LARGE = f"the headers have more than {MAX_HEADER_BYTES} bytes: send fewer cookies, or topics another way"
REASON_BYTES = 123
"""Bytes of the reason in a close frame (RFC 6455, section 5.5): a control frame has 125, and the code takes two."""


def close_reason(message: str) -> str:
    """Return as much of a message as fits into a close frame. No character is cut."""
    return message.encode()[:REASON_BYTES].decode(errors="ignore")


@dataclass(frozen=True)
class Handshake:
    """What a client presents: a credential (None: it comes in the first frame), and the cursors to resume from."""

    auth_key: str | None = None
    cursor: str | None = None
    topics: dict[str, str] = field(default_factory=dict)
    browser: bool = False
    """Whether it carries an allowed Origin. A page never sees the status of a refused handshake."""


def credential(headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
    """Return the first credential of: header auth_key, header Authorization: Bearer, query parameter auth_key.

    Raises BadRequest if one of the headers appears more than once.
    """
    try:
        auth_key, authorization = headers.get("auth_key"), headers.get("Authorization", "")
    except LookupError:
        raise BadRequest("the header auth_key or Authorization appears more than once: send one credential") from None
    if auth_key:
        return auth_key
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return query.get("auth_key") or None


def presented(headers: Mapping[str, str]) -> str:
    """Return the credential in the headers. Raises Unauthenticated if there is none, and BadRequest as `credential`."""
    key = credential(headers, {})
    if key is None:
        raise Unauthenticated("a credential is needed: header auth_key, or Authorization: Bearer")
    return key


def read(path: str, headers: Mapping[str, str], origins: Origins, prefix: str = "") -> Handshake:
    """Read a handshake, before any authorizer is asked. `prefix` precedes every path.

    Raises:
        NotFound: the path is unknown.
        PermissionDenied: the origin is not allowed.
        BadRequest: the topics are malformed or too many, or a header appears more than once.
    """
    parts = split(path)
    if parts is None or parts.path not in [prefix + known for known in PATHS]:
        raise NotFound(f"websockets are served at {prefix}/ and {prefix}/v1")
    try:
        origin, host = headers.get("Origin"), headers.get("Host", "")
    except LookupError:
        raise BadRequest("the header Origin or Host appears more than once") from None
    if origin is not None and not origins.allow(origin, host):
        raise PermissionDenied(f"pages of {origin[:100]} may not connect: see --origins")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    try:
        topics = msgspec.json.decode(query.get("topics", "{}"), type=dict[str, str])
    except msgspec.DecodeError:
        raise BadRequest("topics: a JSON object of topic to cursor is needed") from None
    if problem := topics_problem(topics):
        raise BadRequest(problem)
    return Handshake(credential(headers, query), query.get("cursor"), topics, origin is not None)
