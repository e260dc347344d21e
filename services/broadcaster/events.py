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
    feeds: Destinations, event: str, table: str, before: Recipients, after: Recipients, events: EventsByFeed
) -> Iterator[None]:
    """Add to `events` the events of each feed. Yields between steps."""
    if before.open is False and after.open is False:
        yield from _of_named_users(feeds, event, before.users, after.users, events)
    else:
        for count, user in enumerate({**before.users, **after.users}, 1):
            if not count % STEP_FEEDS:
                yield
            if of_feed := events_of(event, before.user(user), after.user(user)):
                events[feeds.user(user)] = of_feed
    topics_before, topics_after = (
        {**recipients.topics, **open_topics(table, recipients.open)} for recipients in (before, after)
    )
    for topic in {**topics_before, **topics_after}:
        # The followers of a topic see everything that every user sees.
        saw = before.open is True or topics_before.get(topic, False)
        sees = after.open is True or topics_after.get(topic, False)
        if of_feed := events_of(event, saw, sees):
            events[feeds.topic(topic)] = of_feed


def _of_named_users(
    feeds: Destinations,
    event: str,
    before: Mapping[str, ClaimCondition],
    after: Mapping[str, ClaimCondition],
    events: EventsByFeed,
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
            events[feeds.user(user)] = plain
        elif of_feed := events_of(event, before.get(user, False), sees):
            events[feeds.user(user)] = of_feed
    if always:
        return
    for count, (user, saw) in enumerate(before.items(), 1):
        if not count % STEP_FEEDS:
            yield
        if user not in after and (of_feed := events_of(event, saw, sees=False)):
            events[feeds.user(user)] = of_feed


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
        events = [(event, sees)]
    elif event == "REMOVE":
        events = [(event, saw)]
    else:
        events = [
            (event, both(saw, sees)),
            ("ENTER", both(sees, unless(saw))),
            ("LEAVE", both(saw, unless(sees))),
        ]
    return [(event, asks) for event, asks in events if asks is not False]


def single_events(events: Events) -> Iterator[tuple[str, bool, ClaimCondition]]:
    for event, asks in events:
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
            for feed, events in events_by_destination.items():
                conditions: list[ClaimCondition] = []
                for event, asks in reversed(events):
                    later = after.get(feed, False)
                    conditions.append(later)
                    if event not in PLAIN_TYPES:
                        after[feed] = asks if later is False else either(asks, later)
                here[feed] = conditions[::-1]
            self._later.append(here)
        self._later.reverse()

    def __call__(self, number: int, feed: Destination, events: Events) -> Iterator[tuple[str, bool, ClaimCondition]]:
        """Return the entries of a feed for the change with that number, as (event, `more`, condition)."""
        for (event, asks), later in zip(events, self._later[number][feed], strict=True):
            if event in PLAIN_TYPES:
                yield event, False, asks
                continue
            for more, some in ((True, both(asks, later)), (False, both(asks, unless(later)))):
                if some is not False:
                    yield event, more, some
