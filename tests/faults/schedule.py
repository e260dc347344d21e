"""Which faults happen when. Pure: the same seed gives the same schedule."""

from __future__ import annotations

import random
from itertools import cycle
from typing import NamedTuple

SERVICES = ("gateway", "store", "broadcaster", "authorizer")
PAUSE_S = (4.0, 7.0)
"""Bounds of the seconds that a process is stopped: longer than a lease, which is 3 s."""
STALL_S = (4.0, 10.0)
"""Bounds of the seconds that a server is stopped: from a lease to the time-out of a request."""
CALM_S = 20.0
"""Seconds without a fault after each kind has happened once. Recovery must be complete by their end."""


class Fault(NamedTuple):
    """One thing that goes wrong."""

    at_s: float  # since the beginning
    kind: str
    service: str | None  # the affected service
    number: int  # which of them
    lasts_s: float  # 0 for what happens at once


ANYWHERE = tuple((kind, service) for kind in ("kill", "pause") for service in SERVICES)
"""Faults of every topology."""
CUTS = tuple(("cut", service) for service in SERVICES)
"""Faults of all connections between a process and Redis. A proxy makes them, or the servers, if there are several."""
BEHIND_PROXIES = (
    *CUTS,
    *((kind, service) for kind in ("hold", "slow", "swallow") for service in SERVICES),
    *(("hold_commit", service) for service in ("store", "broadcaster")),
    *((kind, service) for kind in ("swallow_read", "swallow_commit") for service in ("store", "broadcaster")),
    ("hold_link", "broadcaster"),
    ("swallow_link", "broadcaster"),
)
"""Faults between a service and a single server. Some wait for a certain command."""
ROLL = ("roll", None)
"""All processes are replaced by those of the other version of the application: forward and back in turn."""
AT: dict[str, tuple[tuple[str, str | None], ...]] = {
    "embedded": (*ANYWHERE, *BEHIND_PROXIES, *(2 * (("kill_redis", None), ("stall_redis", None))), ROLL),
    "sentinel": (*ANYWHERE, *CUTS, *(3 * (("fail_over", None), ("change_places", None), ("hang_master", None))), ROLL),
    "cluster": (*ANYWHERE, *CUTS, *(3 * (("fail_over", None), ("move_slot", None), ("hang_master", None))), ROLL),
}
"""The faults of each topology. One that is listed twice is twice as likely."""


def schedule(topology: str, seed: int, seconds: float, kinds: frozenset[str] | None = None) -> list[Fault]:
    """One fault after another, with a few seconds between the end of one and the next; all have ended by then."""
    choice = random.Random(seed)
    choices = [one for one in AT[topology] if kinds is None or one[0] in kinds]
    faults: list[Fault] = []
    at_s = 5.0
    bag: list[tuple[str, str | None]] = []
    rolls = cycle(("roll_forward", "roll_back"))
    while choices:
        if not bag:  # each of them once, in another order each time
            bag = choice.sample(choices, len(choices))
            at_s += CALM_S if faults else 0.0
        kind, service = bag.pop()
        lasts_s = 0.0
        if kind == "pause" or kind.startswith("hold"):
            lasts_s = choice.uniform(*PAUSE_S)
        elif kind in ("cut", "slow"):
            lasts_s = choice.uniform(0.0, 4.0)
        elif kind == "stall_redis":
            lasts_s = choice.uniform(*STALL_S)
        elif kind == "roll":
            kind = next(rolls)
        if at_s + lasts_s + 5.0 > seconds:
            break
        faults.append(Fault(round(at_s, 2), kind, service, choice.randrange(2), round(lasts_s, 2)))
        at_s += lasts_s + choice.uniform(1.0, 5.0)
    return faults
