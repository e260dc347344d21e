"""Format a change as a line: Tidewire's own, or the record of DynamoDB Streams. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from tidewire.errors import ConfigurationError
from tidewire.model.records import Change, Item, Position

FORMATS = ("json", "dynamodb")
NEW, OLD = frozenset({"NEW_IMAGE", "NEW_AND_OLD_IMAGES"}), frozenset({"OLD_IMAGE", "NEW_AND_OLD_IMAGES"})
EXPIRY = "tidewire:expiry"
TTL_IDENTITY = {"type": "Service", "principalId": "dynamodb.amazonaws.com"}


MAX_NUMBER, MIN_NUMBER = Decimal("9.9999999999999999999999999999999999999E+125"), Decimal("1E-130")
"""The range of DynamoDB's numbers, which have up to 38 significant digits."""


class Unrepresentable(ValueError):
    """The format cannot express a value."""


def parse_position(text: str, partitions: int) -> Position:
    """Raises ConfigurationError if the text is not a position of such a stage."""
    if not re.fullmatch(r"\d{1,5}-\d{1,19}-\d{1,19}-\d{1,19}", text):
        raise ConfigurationError(
            f"--from {text!r} is not a position: <partition>-<generation>-<ms>-<seq>, as changes and replies have it"
        )
    position = Position(*map(int, text.split("-")))
    if position.partition >= partitions:
        raise ConfigurationError(
            f"--from {text!r}: there is no partition {position.partition}, only 0 to {partitions - 1}"
        )
    return position


def as_json(position: Position, change: Change, view: str) -> dict[str, Any]:
    """The whole change, with the images that the table's stream view shows."""
    record: dict[str, Any] = {
        "position": str(position),
        "event": change.event,
        "table": change.table,
        "key": change.key,
        "version": change.version,
    }
    if view in NEW:
        record["new"] = change.new
    if view in OLD:
        record["old"] = change.old
    return record | {
        "at": change.at,
        "by": change.by,
        "connection": change.connection,
        "request": change.request,
        "transaction": change.transaction,
        "more": change.more,
        "trace": change.trace,
    }


def as_dynamodb(position: Position, change: Change, view: str, stage: str) -> dict[str, Any]:
    """The record, as DynamoDB Streams passes it to a function."""
    images: dict[str, Item] = {"Keys": change.key}
    if view in NEW and change.new is not None:
        images["NewImage"] = change.new
    if view in OLD and change.old is not None:
        images["OldImage"] = change.old
    record: dict[str, Any] = {
        "eventID": str(position),
        "eventName": change.event,
        "eventVersion": "1.1",
        "eventSource": "aws:dynamodb",
        "awsRegion": "local",
        "dynamodb": {
            "ApproximateCreationDateTime": change.at // 1000,
            **{name: typed_item(image) for name, image in images.items()},
            "SequenceNumber": sequence_number(position),
            "SizeBytes": sum(size_of_item(image) for image in images.values()),
            "StreamViewType": view,
        },
        "eventSourceARN": f"arn:aws:dynamodb:local:000000000000:table/{change.table}/stream/{stage}",
    }
    if change.event == "REMOVE" and change.by == EXPIRY:
        record["userIdentity"] = TTL_IDENTITY
    return record


def sequence_number(position: Position) -> str:
    """Forty digits, the most that DynamoDB has. Within a partition they sort as the positions do.

    Generations are times in ms too. The store counts the seq of a millisecond from 0.
    """
    return f"{position.generation:014d}{position.ms:014d}{position.seq:012d}"


def typed_item(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item with a type letter for each value. Raises `Unrepresentable`, which names the attribute."""
    typed_values = {}
    for name, value in item.items():
        try:
            typed_values[name] = typed(value)
        except Unrepresentable as error:
            raise Unrepresentable(f"{name}: {error}") from None
    return typed_values


def typed(value: Any) -> dict[str, Any]:
    """A JSON value with its type letter."""
    if value is None:
        return {"NULL": True}
    if isinstance(value, bool):
        return {"BOOL": value}
    if isinstance(value, str):
        return {"S": value}
    if isinstance(value, int | float):
        return {"N": number_text(value)}
    if isinstance(value, dict):
        return {"M": typed_item(value)}
    return {"L": [typed(inner) for inner in value]}


def number_text(value: int | float) -> str:
    """Write a number as DynamoDB does: all digits, with an exponent only beyond 38 of them.

    Raises:
        Unrepresentable: the number is outside of DynamoDB's range, or has more than 38 significant digits.
    """
    number = Decimal(repr(value)).normalize()
    if not number:
        return "0"
    if not MIN_NUMBER <= abs(number) <= MAX_NUMBER or len(number.as_tuple().digits) > 38:
        raise Unrepresentable(f"the number {value!r} does not fit into a number of DynamoDB")
    return f"{number.normalize():f}" if -38 <= number.adjusted() < 38 else f"{number.normalize():E}"


def size_of_item(item: Mapping[str, Any]) -> int:
    """The size in bytes as DynamoDB counts it: names and values."""
    return sum(len(name.encode()) + size_of(value) for name, value in item.items())


def size_of(value: Any) -> int:
    if value is None or isinstance(value, bool):
        return 1
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, int | float):
        sign, digits, _ = Decimal(repr(value)).normalize().as_tuple()
        return (len(digits) + 1) // 2 + 1 + sign
    if isinstance(value, dict):
        return 3 + len(value) + size_of_item(value)
    return 3 + sum(1 + size_of(inner) for inner in value)
