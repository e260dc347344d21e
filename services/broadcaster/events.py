"""The events by which each feed learns of a change, from who saw the item before and who sees it after. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tidewire.audiences import Recipients, claim_topic
from tidewire.model.claims import ClaimCondition, both, either, unless
from tidewire.model.records import RECHECK

from .route import STEP_FEEDS, Destination, Destinations

Events = Sequence[tuple[str, ClaimCondition]]
"""Events with the condition that a connection's claims must meet to receive each. No connection meets two of them."""
EventsByFeed = dict[Destination, Events]
PLAIN_TYPES = {"message": "message", "reset": "reset", RECHECK: RECHECK}
"""Frame types of events that are no change of an item."""


def events_by_feed(
    feeds: Destinations, event: str, table: str, before: Recipients, after: Recipients, found: EventsByFeed
) -> Iterator[None]:
    """Add to `found` the events of each feed. Yields between steps."""
    if before.open is False and after.open is False:
        yield from _of_named_users(feeds, event, before.users, after.users, found)
    else:
        for count, user in enumerate({**before.users, **after.users}, 1):
            if not count % STEP_FEEDS:
                yield
            if told := events_of(event, before.user(user), after.user(user)):
                found[feeds.user(user)] = told
    topics_before, topics_after = ({**one.topics, **open_topics(table, one.open)} for one in (before, after))
    for topic in {**topics_before, **topics_after}:
        # The followers of a topic see everything that every user sees.
        saw = before.open is True or topics_before.get(topic, False)
        sees = after.open is True or topics_after.get(topic, False)
        if told := events_of(event, saw, sees):
            found[feeds.topic(topic)] = told


def _of_named_users(
    feeds: Destinations,
    event: str,
    before: Mapping[str, ClaimCondition],
    after: Mapping[str, ClaimCondition],
    found: EventsByFeed,
) -> Iterator[None]:
    """Add the events of users that are named. Usually that is a large group whose members saw the item and see it."""
    plain = ((event, True),)
    always = event in ("INSERT", "REMOVE")
    if event == "REMOVE":
        after = before
    for count, (user, sees) in enumerate(after.items(), 1):
        if not count % STEP_FEEDS:
            yield
        if sees is True and (always or before.get(user) is True):
            found[feeds.user(user)] = plain
        elif told := events_of(event, before.get(user, False), sees):
            found[feeds.user(user)] = told
    if always:
        return
    for count, (user, saw) in enumerate(before.items(), 1):
        if not count % STEP_FEEDS:
            yield
        if user not in after and (told := events_of(event, saw, sees=False)):
            found[feeds.user(user)] = told


def open_topics(table: str, condition: ClaimCondition) -> dict[str, ClaimCondition]:
    """Return topics that together reach every connection which meets the condition, each with the condition that is
    left."""
    if isinstance(condition, bool):
        return {table: True} if condition else {}
    kind, *parts = condition
    if kind == "is":
        return {claim_topic(*parts): True}
    if kind == "all":
        return {topic: both(rest, *parts[1:]) for topic, rest in open_topics(table, parts[0]).items()}
    found: dict[str, ClaimCondition] = {}
    for part in parts:
        for topic, rest in open_topics(table, part).items():
            found[topic] = either(found.get(topic, False), rest)
    return found


def events_of(event: str, saw: ClaimCondition, sees: ClaimCondition) -> list[tuple[str, ClaimCondition]]:
    """Return the events of a change for readers who saw and see the item under these conditions.

    An item that becomes visible is an ENTER, one that becomes invisible a LEAVE.
    """
    if saw is True and sees is True:
        return [(event, True)]
    if event == "INSERT":
        told = [(event, sees)]
    elif event == "REMOVE":
        told = [(event, saw)]
    else:
        told = [
            (event, both(saw, sees)),
            ("ENTER", both(sees, unless(saw))),
            ("LEAVE", both(saw, unless(sees))),
        ]
    return [one for one in told if one[1] is not False]


def single_events(told: Events) -> Iterator[tuple[str, bool, ClaimCondition]]:
    for event, asks in told:
        yield event, False, asks


class TransactionEvents:
    """The events of a transaction's changes, with `more` on all but the last frame that a connection receives.

    Which frame is the last one may depend on the connection's claims. The feed then gets two entries, under conditions
    of which each connection meets one.
    """

    def __init__(self, changes: Sequence[EventsByFeed]) -> None:
        self._later: list[dict[Destination, list[ClaimCondition]]] = []
        """For each change, feed and event: which connections receive a later frame of the transaction."""
        after: dict[Destination, ClaimCondition] = {}
        for events_by_destination in reversed(changes):
            here: dict[Destination, list[ClaimCondition]] = {}
            for feed, told in events_by_destination.items():
                conditions: list[ClaimCondition] = []
                for event, asks in reversed(told):
                    later = after.get(feed, False)
                    conditions.append(later)
                    if event not in PLAIN_TYPES:
                        after[feed] = asks if later is False else either(asks, later)
                here[feed] = conditions[::-1]
            self._later.append(here)
        self._later.reverse()

    def __call__(self, number: int, feed: Destination, told: Events) -> Iterator[tuple[str, bool, ClaimCondition]]:
        """Return the entries of a feed for the change with that number, as (event, `more`, condition)."""
        for (event, asks), later in zip(told, self._later[number][feed], strict=True):
            if event in PLAIN_TYPES:
                yield event, False, asks
                continue
            for more, some in ((True, both(asks, later)), (False, both(asks, unless(later)))):
                if some is not False:
                    yield event, more, some
