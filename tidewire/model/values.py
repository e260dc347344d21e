"""The values of key attributes: their canonical form, and byte strings that sort as the values do. No I/O."""

from __future__ import annotations

import struct
from typing import NamedTuple

Scalar = str | int | float
"""A value of a key attribute. Booleans are refused earlier."""

LARGEST_KEY_NUMBER = 2**53
"""Largest absolute number in a key. Keys are ordered as IEEE doubles, which are exact up to it."""


def canonical(value: Scalar) -> Scalar:
    """Return the canonical form of a value: 1.0 and 1 are one key."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text_of(value: Scalar) -> bytes:
    """Return a value as text, in UTF-8."""
    return value.encode() if isinstance(value, str) else repr(canonical(value)).encode()


def name_of(value: Scalar) -> bytes:
    """Return a partition-key value as a part of a Redis key, in which "1" and 1 differ."""
    return (b"s" if isinstance(value, str) else b"n") + text_of(value)


def sort_bytes(value: Scalar) -> bytes:
    """Return a sort-key value as bytes that sort as the values do: numbers first, then strings by UTF-8."""
    if isinstance(value, str):
        return b"s" + value.encode()
    (bits,) = struct.unpack(">Q", struct.pack(">d", float(value) + 0.0))
    # Doubles sort as their bits do, once the sign is folded in: negative ones sort backwards.
    bits = bits ^ 0xFFFFFFFFFFFFFFFF if bits >> 63 else bits | (1 << 63)
    return b"n" + struct.pack(">Q", bits)


def value_of(name: bytes) -> Scalar:
    """Return the value of which `name_of` made these bytes."""
    text = name[1:].decode()
    if name[:1] == b"s":
        return text
    return float(text) if any(letter in text for letter in ".en") else int(text)


def sort_value(field: bytes) -> Scalar:
    """Return the value of which `sort_bytes` made these bytes."""
    if field[:1] == b"s":
        return field[1:].decode()
    (bits,) = struct.unpack(">Q", field[1:])
    bits = bits & ~(1 << 63) if bits >> 63 else bits ^ 0xFFFFFFFFFFFFFFFF
    (number,) = struct.unpack(">d", struct.pack(">Q", bits))
    return canonical(float(number))


def tuple_bytes(*values: Scalar) -> bytes:
    """Return several values as bytes that sort as the tuples do. No result is the beginning of another."""
    return b"".join(_closed(sort_bytes(value)) if isinstance(value, str) else sort_bytes(value) for value in values)


def prefix_bytes(prefix: str) -> bytes:
    """Return the bytes with which `tuple_bytes` of every string with that prefix begins."""
    return _closed(sort_bytes(prefix))[:-2]


def _closed(text: bytes) -> bytes:
    # Zero bytes in the text are marked, so that the end of a text sorts before any continuation.
    return text.replace(b"\0", b"\0\xff") + b"\0\x01"


class ItemKey(NamedTuple):
    """The key of an item: table, partition-key value, and sort-key value (None in a table without one)."""

    table: str
    partition: Scalar
    sort: Scalar | None

    @property
    def field(self) -> bytes:
        return b"" if self.sort is None else sort_bytes(self.sort)
