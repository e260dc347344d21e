"""Conditions on a connection's claims. No I/O.

The broadcaster makes them when it evaluates an audience, and each connection is checked against them. A condition is
True, False, or one of the tuples ("is", claim, value), ("not", condition), ("all", condition, …) and ("any", condition,
…). It is stored in this form in a feed's entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidewire.model.values import Scalar

ClaimCondition = bool | tuple[Any, ...]


def claim_is(name: str, value: Scalar | bool) -> ClaimCondition:
    """The claim of that name has that value."""
    return ("is", name, value)


def both(*conditions: ClaimCondition) -> ClaimCondition:
    """All conditions hold."""
    return _joined("all", conditions, neutral=True)


def either(*conditions: ClaimCondition) -> ClaimCondition:
    """At least one condition holds."""
    return _joined("any", conditions, neutral=False)


def unless(condition: ClaimCondition) -> ClaimCondition:
    """The condition does not hold."""
    if isinstance(condition, bool):
        return not condition
    return condition[1] if condition[0] == "not" else ("not", condition)


def holds(condition: Any, claims: Mapping[str, Any]) -> bool:
    """Whether claims meet a condition, given as a tuple or as the list that MessagePack makes of it."""
    if isinstance(condition, bool):
        return condition
    kind, *parts = condition
    if kind == "is":
        return parts[0] in claims and _equal(claims[parts[0]], parts[1])
    if kind == "not":
        return not holds(parts[0], claims)
    return (all if kind == "all" else any)(holds(part, claims) for part in parts)


def _joined(kind: str, conditions: tuple[ClaimCondition, ...], *, neutral: bool) -> ClaimCondition:
    parts: dict[str, ClaimCondition] = {}  # by their text: each once, in a fixed order
    for condition in conditions:
        if condition is neutral:
            continue
        if isinstance(condition, bool):
            return condition
        inner = condition[1:] if condition[0] == kind else (condition,)
        parts |= {repr(part): part for part in inner}
    if any(repr(unless(part)) in parts for part in parts.values()):
        return not neutral
    found = [parts[name] for name in sorted(parts)]
    if not found:
        return neutral
    return found[0] if len(found) == 1 else (kind, *found)


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal in JSON, where true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
