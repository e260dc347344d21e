"""The parts of an `update`: set, remove and add, by paths into nested objects. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Context, Decimal
from typing import Any

from tidewire.errors import BadRequest
from tidewire.model.protocol import MAX_DEPTH, Assignments, Path, Update, fault_in
from tidewire.model.records import Item


def apply_update(item: Item, update: Update) -> Item:
    """Return the updated item: first set, then remove, then add. Raises BadRequest that names the wrong path.

    The new item shares everything that the update does not touch with the old one. Neither may be changed in place. The
    cost grows with the paths, not with the item.
    """
    new = dict(item)
    own = {id(new): new}  # objects that this function has made, and may change
    for path, value in _pairs(update.set):
        parent, name = _parent(new, path, own, make=True)
        parent[name] = value  # shared with the request, which may be decided again
    for path in update.remove:
        try:
            parent, name = _parent(new, path, own, make=False)
        except KeyError:
            continue  # nothing to remove
        parent.pop(name, None)
    for path, value in _pairs(update.add):
        if not _number(value):
            raise BadRequest(f"update: add {_shown(path)}: a number is needed")
        parent, name = _parent(new, path, own, make=True)
        before = parent.get(name, 0)
        if not _number(before):
            raise BadRequest(f"update: add {_shown(path)}: what is there is not a number")
        try:
            parent[name] = _sum(before, value)
        except ValueError as error:
            raise BadRequest(f"update: add {_shown(path)}: {error}") from None
    return new


_EXACT = Context(prec=1200, traps=[])
"""Digits enough for the sum of any two doubles."""


def _sum(a: float, b: float) -> float:
    """Add two numbers in decimal arithmetic, so that ten times 0.1 is 1. The sum is the double nearest to the result.

    Raises:
        ValueError: the sum has no place in an item, or its integer part would be rounded.
    """
    total: int | float
    if isinstance(a, int) and isinstance(b, int):
        total = a + b
    else:
        exact = _EXACT.add(Decimal(repr(a)), Decimal(repr(b)))
        total = float(exact)
        if abs(exact) > 2**53 and Decimal(total) != exact and Decimal(repr(total)) != exact:
            if exact != exact.to_integral_value():
                raise ValueError("the sum has more digits than a number keeps")
            total = int(exact)
    if abs(total) >= float("inf") or (isinstance(total, int) and not -(2**63) <= total < 2**64):
        raise ValueError("the sum is beyond what a number holds")
    return total


def check_values(update: Update) -> None:
    """Check that the updated item can be stored, above all that it is not nested too deeply. Raises BadRequest.

    The rest of the item was checked when it was written, and `apply_update` checks sums.
    """
    for path, value in _pairs(update.set):
        if fault := fault_in(value, depth=MAX_DEPTH - len(_names(path))):
            raise BadRequest(f"update: set {_shown(path)}: the item would hold {fault}")


def touched(update: Update) -> set[str]:
    """Return the attributes that an update names."""
    paths = [*(path for path, _ in _pairs(update.set)), *update.remove, *(path for path, _ in _pairs(update.add))]
    return {path.partition(".")[0] if isinstance(path, str) else path[0] for path in paths if path}


def _pairs(assignments: Assignments) -> Iterable[tuple[Path, Any]]:
    return assignments.items() if isinstance(assignments, dict) else assignments


def _names(path: Path) -> list[str]:
    return path.split(".") if isinstance(path, str) else path or [""]


def _parent(item: Item, path: Path, own: dict[int, Item], *, make: bool) -> tuple[Item, str]:
    """Return a copy of the object that holds the last name of a path.

    Raises KeyError if it is missing and not `make`.
    """
    *names, last = _names(path)
    if not last or not all(names):
        raise BadRequest(f"update: the path {_shown(path)} has an empty name")
    if len(names) > 31:
        raise BadRequest(f"update: the path {_shown(path)[:100]} is deeper than 32 names")
    parent = item
    for name in names:
        inner = parent.get(name, {}) if make else parent[name]
        if not isinstance(inner, dict):
            raise BadRequest(f"update: path {_shown(path)}: {name!r} is not an object")
        if id(inner) not in own:
            inner = parent[name] = dict(inner)
            own[id(inner)] = inner
        parent = inner
    return parent, last


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(path: Path) -> str:
    return repr(path if isinstance(path, str) else list(path))
