"""The load as plain values: the kinds of writes, their rates, and the number of users. Each part is optional."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

LOBBY = "lobby"
"""The room that nobody leaves."""
ROOMS = ("r1", "r2", "r3")
CELLS = ("c1", "c2", "c3")
TENANTS = ("a", "b")
CLUBS = ("k1", "k2")
"""Groups of the second version's membership."""
FLATS = 3
"""Number of flats. Users share them evenly and never leave."""
HALL = "hall"
SPRAWL = "sprawl"
"""The user that is in a thousand groups."""
PAIR = ("pair-a", "pair-b")
"""Written together: a live view shows both as of the same transaction."""
BULK = 100
"""Operations of a large transaction: as many as the contract allows."""
LARGE_BYTES = (1_000, 250_000)
"""Bounds of the size of a large item. The logarithm of the size is even between them."""
SECRET = "what only service keys may see"


def tenant_of(user: str) -> str:
    """The tenant of a user, by the number in the name."""
    return TENANTS[int(user[1:]) % len(TENANTS)]


def flat_of(user: str) -> str:
    """The flat that a user shares with others for good."""
    return f"f{int(user[1:]) % FLATS}"


def is_watched(user: str) -> bool:
    """Return whether a reader connects as this user: none of the hall's crowd, nor the user of a thousand groups."""
    return user != SPRAWL and not (user[0] == "c" and user[1:].isdigit())


class Pace(NamedTuple):
    """The rate of each kind of write, in writes per user and second, and how users come and go."""

    rates: dict[str, float]
    stays_s: tuple[float, float] = (2.0, 10.0)
    """Bounds of the seconds that a user stays in a room, or out of it."""
    reads_s: tuple[float, float] = (4.0, 20.0)
    """Bounds of the seconds that a reader stays connected."""
    users: int = 12
    notes: int = 30
    """Number of different ids of notes."""
    flees: bool = False
    """Whether all users are in all rooms, and leave them for a while, a second after each fault begins."""
    parts: frozenset[str] = frozenset()
    """The parts of the load beside the basic one, out of PARTS."""
    crowd: int = 5000
    """Members of the hall that are never online."""
    hall_stays_s: tuple[float, float] = (30.0, 120.0)
    """Bounds of the seconds that a user stays in the hall, or out of it."""
    flap_pause_s: tuple[float, float] = (3.0, 8.0)
    """Time between two bursts of a membership that flaps."""
    flaps: int = 10
    """Joins, and as many leaves, of a burst."""
    groups: int = 1000
    """Groups of the user that the expensive client asks about, and rooms of its index page."""
    names: int = 30_000
    """Invented names that the expensive client shares an item with."""
    mob: int = 2000
    """Members of the room that the expensive client writes to."""
    attacks: tuple[str, ...] = ("index", "unread", "transactions", "updates", "peers", "names", "rants")
    """The kinds of requests of the expensive client, in their order."""
    attack_depth: int = 1
    """Multiple of the usual number of requests that the expensive client has under way."""
    expensive_pause_s: float = 2.0
    """Time between two rounds of the expensive client."""


ALL = Pace(
    {
        "message": 1.2,
        "edit": 0.4,
        "delete": 0.2,
        "pair": 0.3,
        "post": 0.4,
        "thing": 0.4,
        "unit": 0.4,
        "note": 0.4,
        "notice": 0.2,
        "send": 0.2,
    }
)
"""The basic load."""

PARTS: dict[str, dict[str, float]] = {
    "probes": {},
    "large": {"file": 0.003, "scan": 0.01},
    "bulk": {"bulk": 0.005},
    "crowd": {"talk": 0.02},
    "flap": {"face": 0.02, "board": 0.1},
    "expensive": {},
    "next": {"minute": 0.1, "draft": 0.05},
}
"""The optional parts of the load, with their writes per user and second:

probes     a small write in each partition twice a second; connections and memory are watched
large      items of up to 250 KB
bulk       transactions of 100 operations
crowd      a room of 5,000 members
flap       memberships that change many times a second, with an index and topics that depend on them
expensive  one client that sends the most expensive requests it can find
next       tables of the second version of the application, while that runs
"""


def with_parts(parts: Iterable[str], pace: Pace = ALL) -> Pace:
    """A pace with these parts beside it. Raises ValueError for a part that does not exist."""
    chosen = frozenset(parts)
    if unknown := chosen - PARTS.keys():
        raise ValueError(f"no such part of the load: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    rates = dict(pace.rates)
    for part in sorted(chosen):
        rates |= PARTS[part]
    return pace._replace(rates=rates, parts=chosen)


EVERYTHING = with_parts(PARTS)
