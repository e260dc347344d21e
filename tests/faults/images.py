"""Images of items as the checker compares them: by a digest, with large texts cut out so that memory stays bounded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

LARGE = 256
"""Longest text, in characters, that is kept as it is."""


def slim(image: Any) -> Any:
    """The image with each large text replaced by its length and checksum. Idempotent."""
    if not isinstance(image, Mapping):
        return image
    return {name: _slim_text(value) if isinstance(value, str) else value for name, value in image.items()}


def _slim_text(value: str) -> str:
    return value if len(value) <= LARGE else f"{len(value)} characters, checksum {zlib.crc32(value.encode())}"


def digest(image: Any) -> int | None:
    """The checksum of a slim image as JSON; None for None."""
    return None if image is None else zlib.crc32(msgspec.json.encode(slim(image), order="deterministic"))
