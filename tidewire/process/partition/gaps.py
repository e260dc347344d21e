"""Gaps in a partition's changes, as a group reads them: changes that were trimmed unread."""

from __future__ import annotations

from collections.abc import Sequence

from tidewire.model.records import Change, Id


def unbroken(passed: Id, changes: Sequence[tuple[Id, Change | None]]) -> int:
    """Return how many of the changes follow without a gap on the last one that was passed.

    None marks a trimmed change.
    """
    for count, (id_, change) in enumerate(changes):
        if change is None:
            return count
        if change.previous is not None and id_of(change.previous) > passed:
            return count
        passed = id_
    return len(changes)


def id_of(raw: Sequence[int]) -> Id:
    """Convert an id from a record."""
    ms, seq = raw
    return ms, seq
