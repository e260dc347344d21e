"""Who is dead, judged with doubt: a registry that was away makes everyone look dead.

Every service renews a word in the registry, and every service reads the words of all. A word that has expired proves
nothing by itself: while Redis stalls or fails over, nobody can renew one. A service is dead only when an observer that
has been in contact with the registry throughout sees its word expired twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

CONTACT_LEASES = 1.0
"""Leases of uninterrupted contact before an observer suspects anybody: in that time the living renew their words."""
INTERRUPTED_LEASES = 1 / 2
"""A beat that took longer than this, or came later than this after the one before, interrupts the contact."""
CONFIRMED_LEASES = 1 / 3
"""Leases between the beats of the first look that finds a word expired and of the one that confirms the death."""


class Verdict(NamedTuple):
    """What one beat shows."""

    live: frozenset[str]
    """Services that take part: those with a valid word and, in doubt, those that had one when last seen."""
    dead: frozenset[str]
    """Services whose death is confirmed. One that is suspected is in neither set."""
    interrupted: bool
    """Whether contact was lost before this beat."""


class Liveness:
    """One observer's judgement. A state machine without a clock: `judge` is told the times of each beat."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._contact_since: float | None = None
        self._last_s = 0.0
        self._seen: set[str] = set()  # had a valid word when this observer last was certain
        self._suspected: dict[str, float] = {}  # service: the first look that found its word expired

    def judge(self, begun_s: float, ended_s: float, expired: Mapping[str, bool]) -> Verdict:
        """Judge by one answered beat: when it began and ended, and whether each registered word had expired."""
        limit_s = INTERRUPTED_LEASES * self._lease_s
        first = self._contact_since is None
        interrupted = not first and max(begun_s - self._last_s, ended_s - begun_s) > limit_s
        if self._contact_since is None or interrupted:
            self._contact_since = ended_s
            self._suspected.clear()
        self._last_s = ended_s
        certain = ended_s - self._contact_since >= CONTACT_LEASES * self._lease_s
        for service, gone in expired.items():
            if not gone:
                self._seen.add(service)
                self._suspected.pop(service, None)
            elif certain:
                self._seen.discard(service)  # so that a later stall does not bring it back
                self._suspected.setdefault(service, begun_s)
        self._seen &= expired.keys()
        self._suspected = {service: at for service, at in self._suspected.items() if service in expired}
        return Verdict(
            frozenset(service for service, gone in expired.items() if not gone or service in self._seen),
            frozenset(
                service for service, at in self._suspected.items() if begun_s - at >= CONFIRMED_LEASES * self._lease_s
            ),
            interrupted,
        )
