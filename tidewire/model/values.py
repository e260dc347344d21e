"""The values of key attributes: their canonical form, and byte strings that sort as the values do. No I/O."""

from __future__ import annotations

import struct
from typing import NamedTuple

Scalar = str | int | float
"""A value of a key attribute. Booleans are refused before they get here."""

LARGEST_KEY_NUMBER = 2**53
"""Numbers in keys are ordered as IEEE doubles, which are exact up to here."""


def canonical(value: Scalar) -> Scalar:
    """1.0 and 1 are one key."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text_of(value: Scalar) -> bytes:
    """The value as text, in UTF-8."""
    return value.encode() if isinstance(value, str) else repr(canonical(value)).encode()


def name_of(value: Scalar) -> bytes:
    """The partition-key value as part of a Redis key; "1" and 1 differ."""
    return (b"s" if isinstance(value, str) else b"n") + text_of(value)


def sort_bytes(value: Scalar) -> bytes:
    """The sort-key value as bytes whose order is the order of the values: numbers, then strings by UTF-8 bytes."""
    if isinstance(value, str):
        return b"s" + value.encode()
    (bits,) = struct.unpack(">Q", struct.pack(">d", float(value) + 0.0))
    # The order of doubles is the order of their bits once the sign is folded in (negative ones count backwards).
    bits = bits ^ 0xFFFFFFFFFFFFFFFF if bits >> 63 else bits | (1 << 63)
    return b"n" + struct.pack(">Q", bits)


def value_of(name: bytes) -> Scalar:
    """The value that `name_of` made this of."""
    text = name[1:].decode()
    if name[:1] == b"s":
        return text
    return float(text) if any(letter in text for letter in ".en") else int(text)


def sort_value(field: bytes) -> Scalar:
    """The value that `sort_bytes` made this of."""
    if field[:1] == b"s":
        return field[1:].decode()
    (bits,) = struct.unpack(">Q", field[1:])
    bits = bits & ~(1 << 63) if bits >> 63 else bits ^ 0xFFFFFFFFFFFFFFFF
    (number,) = struct.unpack(">d", struct.pack(">Q", bits))
    return canonical(float(number))


def tuple_bytes(*values: Scalar) -> bytes:
    """Several values as bytes whose order is theirs, the first one counting most; no such text begins another."""
    return b"".join(_closed(sort_bytes(value)) if isinstance(value, str) else sort_bytes(value) for value in values)


def prefix_bytes(prefix: str) -> bytes:
    """What `tuple_bytes` of all strings with that prefix begin with."""
    return _closed(sort_bytes(prefix))[:-2]


def _closed(text: bytes) -> bytes:
    # A zero byte within is marked, so that the end sorts before all that goes on.
    return text.replace(b"\0", b"\0\xff") + b"\0\x01"


class ItemKey(NamedTuple):
    """One item: partition-key value, and sort-key value (None where the table has no sort key)."""

    table: str
    partition: Scalar
    sort: Scalar | None

    @property
    def field(self) -> bytes:
        return b"" if self.sort is None else sort_bytes(self.sort)
