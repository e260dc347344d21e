"""Judges which processes are dead. No I/O, no clock.

Every process renews its registration, and reads those of all others. An expired registration proves nothing by itself,
because no process can renew one while Redis stalls or fails over. A process is dead only if an observer that was in
contact with the registry throughout sees its registration expired twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

CONTACT_LEASES = 1.0
"""Leases of uninterrupted contact before an observer suspects a process.

Live ones renew their registrations in that time.
"""
INTERRUPTED_LEASES = 1 / 2
"""Leases that a heartbeat may take, or may follow the last one. A longer time interrupts the contact."""
CONFIRMED_LEASES = 1 / 3
"""Leases between the heartbeat that first finds a registration expired and the one that confirms the death."""


class Verdict(NamedTuple):
    """The judgement after one heartbeat."""

    live: frozenset[str]
    """Processes with a valid registration and, in doubt, those that had one when the observer last was certain."""
    dead: frozenset[str]
    """Processes that are confirmed dead. A suspected one is in neither set."""
    interrupted: bool
    """Whether contact was lost before this heartbeat."""


class Liveness:
    """The judgement of one observer: a state machine, which is given the times of each heartbeat."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._contact_since: float | None = None
        self._last_s = 0.0
        self._seen: set[str] = set()  # processes whose registration was valid when this observer last was certain
        self._suspected: dict[str, float] = {}  # process: the first heartbeat that found its registration expired

    def judge(self, begun_s: float, ended_s: float, expired: Mapping[str, bool]) -> Verdict:
        """Judge by one answered heartbeat: when it began and ended, and whether each registration had expired."""
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
