"""What a handshake asks for, and whether it may come in. Pure: from a path and headers to a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, urlsplit

import msgspec

from tidewire.errors import BadRequest, NotFound, PermissionDenied

PATHS = ("/", "/v1")


@dataclass(frozen=True)
class Handshake:
    """What was asked: the credential (None: it comes with the first frame), and where to go on."""

    auth_key: str | None = None
    cursor: str | None = None
    topics: dict[str, str] = field(default_factory=dict)
    browser: bool = False  # with an allowed Origin: its page would never see a status


def credential(headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
    """The first one present: header auth_key, header Authorization: Bearer, query parameter auth_key."""
    try:
        auth_key, authorization = headers.get("auth_key"), headers.get("Authorization", "")
    except LookupError:  # one of them is there twice: neither can be the first
        return "ambiguous"
    if auth_key:
        return auth_key
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return query.get("auth_key") or None


def read(path: str, headers: Mapping[str, str], origins: Sequence[str]) -> Handshake:
    """What is asked for. Raises NotFound, PermissionDenied or BadRequest before anybody is asked who it is."""
    parts = _split(path)
    if parts is None or parts.path not in PATHS:
        raise NotFound("websockets are served at / and /v1")
    origin = headers.get("Origin")
    if origin is not None and not origin_allowed(origin, headers.get("Host", ""), origins):
        raise PermissionDenied(f"pages of {origin[:100]} may not connect: see --origins")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    try:
        topics = msgspec.json.decode(query.get("topics", "{}"), type=dict[str, str])
    except msgspec.DecodeError:
        raise BadRequest("topics: a JSON object of topic to cursor is needed") from None
    return Handshake(credential(headers, query), query.get("cursor"), topics, origin is not None)


def origin_allowed(origin: str, host: str, origins: Sequence[str]) -> bool:
    """By the list of --origins; without one, the same host name, any port."""
    if origins:
        return "*" in origins or origin.rstrip("/") in origins
    theirs, ours = _split(origin), _split(f"//{host}")
    return theirs is not None and ours is not None and theirs.hostname is not None and theirs.hostname == ours.hostname


def _split(address: str) -> SplitResult | None:
    try:
        return urlsplit(address)
    except ValueError:  # an unbalanced bracket
        return None
