"""Gaps in what a group reads of a partition's changes: what was trimmed before the group had read it."""

from __future__ import annotations

from collections.abc import Sequence

from tidewire.model.records import Change, Id


def unbroken(passed: Id, changes: Sequence[tuple[Id, Change | None]]) -> int:
    """How many of the changes follow on what was passed, one on the other; None is one that is trimmed itself."""
    for count, (id_, change) in enumerate(changes):
        if change is None:
            return count
        if change.previous is not None and id_of(change.previous) > passed:
            return count
        passed = id_
    return len(changes)


def id_of(raw: Sequence[int]) -> Id:
    """An id as records hold it."""
    ms, seq = raw
    return ms, seq
