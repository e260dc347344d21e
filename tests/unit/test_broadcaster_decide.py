"""The readers of a change, and their frames: each reader's feed, decided from changes only."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidewire.app import App
from tidewire.audiences import Audience, claim, everyone, topic, user
from tidewire.model.claims import holds
from tidewire.model.records import Change, FeedBody, Id, Item, unpack
from tidewire.redis.functions import WHOLE, Append, Unit, feed_number, referred
from tidewire.redis.keys import Home, Keys
from tidewire.services.broadcaster.decide import (
    MAX_BATCH_APPENDS,
    MAX_BATCH_BYTES,
    Group,
    GroupFacts,
    GroupsOf,
    Routing,
    deciding,
    whole,
)
from tidewire.services.broadcaster.route import (
    MAX_CALL_APPENDS,
    MAX_CALL_BYTES,
    AppendUnits,
    DestinationCache,
    LinkCall,
    StoreBodies,
)
from tidewire.visibility import visibility

KEYS = Keys("dev", 4)
PARTITION, GENERATION, NOW = 2, 1, 1_795_409_459_002
USERS = ["alice", "bob", "carol", "dave"]
TABLES = ["members", "messages", "mail", "news", "mixed", "faulty", "keys_only", "new_image", "old_image", "hiding"]
Frame = dict[str, Any]


def broken_for_some(item: Item) -> Audience:
    if item.get("fault"):
        raise RuntimeError("a mistake of the application")
    return user("to")


def public_or_to(item: Item) -> Audience:
    return everyone if item.get("public") else user("to")


def make_app() -> App:
    app = App("test")
    rooms = app.membership("members", group="room", member="user")
    app.table("messages", key=("room", "id"), readers=rooms.of("room"))
    app.table("mail", key="id", readers=user("to"))
    app.table("news", key="id", readers=everyone | user("to"))
    app.table("mixed", key="id", readers=public_or_to)
    app.table("faulty", key="id", readers=broken_for_some)
    app.table("keys_only", key="id", readers=user("to"), stream_view="KEYS_ONLY")
    app.table("new_image", key="id", readers=user("to"), stream_view="NEW_IMAGE")
    app.table("old_image", key="id", readers=user("to"), stream_view="OLD_IMAGE")
    app.table("hiding", key="id", readers=user("to") | everyone, hidden=("secret",))
    app.check()
    return app


def units_of(calls: Sequence[LinkCall]) -> list[Unit]:
    return [unit for call in calls if isinstance(call, AppendUnits) for unit in call.units]


def bodies_of(calls: Sequence[LinkCall]) -> dict[bytes, bytes]:
    return dict(body for call in calls if isinstance(call, StoreBodies) for body in call.bodies)


def appends_of(decision: Routing) -> list[Append]:
    return [append for calls in decision.links.values() for unit in units_of(calls) for append in unit.appends]


def decide(
    app: App, keys: Keys, known: GroupFacts, partition: int, changes: Sequence[tuple[Id, Change | None]]
) -> Routing | set[Group | GroupsOf]:
    """Do all steps at once."""
    steps = deciding(app, keys, known, partition, changes)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Routing | set[Group | GroupsOf] = end.value
            return result


class World:
    """What readers have, after batches of changes."""

    def __init__(self) -> None:
        self.app = make_app()
        self.groups: dict[Group, dict[str, Item]] = {}
        self.feeds: dict[bytes, list[tuple[FeedBody, Frame]]] = defaultdict(list)
        self.names = {KEYS.user_feed(name): name for name in USERS}
        self.names |= {KEYS.topic_feed(name): f"topic {name}" for name in TABLES}
        self.failed = 0
        self._seq = 0

    def change(self, table: str, old: Item | None, new: Item | None, version: int = 1) -> Change:
        event = "INSERT" if old is None else "REMOVE" if new is None else "MODIFY"
        image = new or old
        assert image
        key = {name: image[name] for name in self.app[table].key}
        return Change(event, table, key, version, new, old, NOW, "alice", "c1", None, generation=GENERATION)

    def tell(self, *changes: Change | None) -> Routing:
        numbered = []
        for change in changes:
            self._seq += 1
            numbered.append(((NOW, self._seq), change))
        known: dict[Group | GroupsOf, Any] = {}
        while isinstance(found := decide(self.app, KEYS, known, PARTITION, numbered), set):
            assert not found & known.keys(), "what was given is not asked for again"
            for need in found:
                known[need] = (
                    dict(self.groups.get(need, {}))
                    if isinstance(need, Group)
                    else [group.group for group, members in self.groups.items() if need.user in members]
                )
        self.apply(found)
        if found.consumed < len(changes):  # the batch ended early: its rest comes with the next
            self._seq -= len(changes) - found.consumed
            self.tell(*changes[found.consumed :])
        return found

    def apply(self, decision: Routing) -> None:
        self.failed += decision.failed
        self.groups |= decision.groups
        for to, calls in decision.links.items():
            units, bodies = units_of(calls), bodies_of(calls)
            order = [(unit.position, unit.upto) for unit in units]
            assert order == sorted(order), "a destination takes nothing that is before what it has taken"
            for append in (append for unit in units for append in unit.appends):
                name = referred(append.body)
                self.append(to, append if name is None else append._replace(body=bodies[name]))

    def append(self, to: Home, append: Append) -> None:
        body = FeedBody(*unpack(append.body))
        for entries in append.feeds:
            name = self.names[entries]
            assert KEYS.home_of(entries) == to, "a feed's own partition"
            assert entries in (KEYS.user_feed(name), KEYS.topic_feed(name.removeprefix("topic ")))
            self.feeds[entries].append((body, json.loads(body.rest)))

    def frames_of(self, name: str, kind: str = "change", claims: Item | None = None) -> list[Frame]:
        """What a connection with these claims gets."""
        key = KEYS.topic_feed(name.removeprefix("topic ")) if name.startswith("topic ") else KEYS.user_feed(name)
        return [frame for body, frame in self.feeds[key] if body.type == kind and holds(body.asks, claims or {})]

    def events(self) -> dict[str, list[str]]:
        """Return the events by reader, for all readers with any."""
        by_reader = {name: [frame["event"] for frame in self.frames_of(name)] for name in self.names.values()}
        return {name: events for name, events in by_reader.items() if events}


@pytest.fixture
def world() -> World:
    return World()


def mail(to: Any, **more: Any) -> Item:
    return {"id": "m", "to": to, **more}


class TestEvents:
    @pytest.mark.parametrize(
        ("old", "new", "events"),
        [
            (None, ["alice", "bob"], {"alice": ["INSERT"], "bob": ["INSERT"]}),
            (["alice", "bob"], None, {"alice": ["REMOVE"], "bob": ["REMOVE"]}),
            (["alice", "bob"], ["alice", "bob"], {"alice": ["MODIFY"], "bob": ["MODIFY"]}),
            (["alice", "bob"], ["bob", "carol"], {"alice": ["LEAVE"], "bob": ["MODIFY"], "carol": ["ENTER"]}),
            (None, [], {}),
            ([], None, {}),
            ([], ["alice"], {"alice": ["ENTER"]}),
            (["alice"], [], {"alice": ["LEAVE"]}),
        ],
    )
    def test_each_reader_gets_the_event_from_its_own_view(self, world: World, old: Any, new: Any, events: Any) -> None:
        before = None if old is None else mail(old, x=1)
        after = None if new is None else mail(new, x=2)
        world.tell(world.change("mail", before, after))
        assert world.events() == events

    def test_a_frame_is_as_in_the_contract(self, world: World) -> None:
        world.tell(world.change("mail", None, mail("alice")))
        assert world.frames_of("alice") == [
            {
                "position": f"{PARTITION}-{GENERATION}-{NOW}-1",
                "event": "INSERT",
                "table": "mail",
                "key": {"id": "m"},
                "version": 1,
                "new": mail("alice"),
                "old": None,
                "at": NOW,
                "by": "alice",
            }
        ]

    def test_an_entering_reader_gets_the_new_image_and_a_leaving_one_the_key(self, world: World) -> None:
        world.tell(world.change("mail", mail("alice", pin=1), mail("bob", pin=2), 5))
        (left,), (entered,) = world.frames_of("alice"), world.frames_of("bob")
        assert left.keys() == {"position", "event", "table", "key", "version", "at", "by"}
        assert entered["new"] == mail("bob", pin=2)
        assert not entered.get("old")
        assert left["position"] == entered["position"]

    @pytest.mark.parametrize(
        ("table", "images"),
        [("keys_only", set()), ("new_image", {"new"}), ("old_image", {"old"}), ("mail", {"new", "old"})],
    )
    def test_images_are_there_as_the_stream_view_says(self, world: World, table: str, images: set[str]) -> None:
        one, two = mail("alice", x=1), mail("alice", x=2)
        world.tell(world.change(table, None, one), world.change(table, one, two, 2), world.change(table, two, None, 3))
        frames = world.frames_of("alice")
        assert [frame["event"] for frame in frames] == ["INSERT", "MODIFY", "REMOVE"]
        for frame, old, new in zip(frames, (None, one, two), (one, two, None), strict=True):
            assert frame.keys() & {"new", "old"} == images
            assert frame.get("new") == (new if "new" in images else None)
            assert frame.get("old") == (old if "old" in images else None)

    def test_hidden_attributes_are_in_no_frame(self, world: World) -> None:
        one, two = mail("alice", secret="s3cret"), mail("bob", secret="t3cret")
        decision = world.tell(
            world.change("hiding", None, one), world.change("hiding", one, two), world.change("hiding", two, None)
        )
        assert world.frames_of("topic hiding")
        assert b"3cret" not in b"".join(append.body for append in appends_of(decision))

    def test_a_change_of_an_undeclared_table_is_counted_and_has_no_readers(self, world: World) -> None:
        gone = world.change("mail", None, mail("alice"))._replace(table="gone")
        world.tell(gone, None, world.change("mail", None, mail("bob")))
        assert world.failed == 1
        assert world.events() == {"bob": ["INSERT"]}


class TestEveryone:
    def test_a_change_for_everyone_goes_to_its_topic_once(self, world: World) -> None:
        world.tell(world.change("news", None, mail("alice")))
        assert world.events() == {"topic news": ["INSERT"]}

    def test_a_public_item_enters_the_topic_and_a_private_one_leaves_it(self, world: World) -> None:
        private, public = mail("alice", public=False), mail("alice", public=True)
        world.tell(world.change("mixed", private, public))
        assert [frame["event"] for frame in world.frames_of("topic mixed")] == ["ENTER"]
        world.tell(world.change("mixed", public, private))
        assert [frame["event"] for frame in world.frames_of("topic mixed")] == ["ENTER", "LEAVE"]
        assert not world.frames_of("topic mixed")[-1].keys() & {"new", "old"}
        assert "bob" not in world.events()


class TestMemberships:
    def join(self, world: World, name: str, **more: Any) -> Change:
        return world.change("members", None, {"room": "r", "user": name, **more})

    def leave(self, world: World, name: str) -> Change:
        return world.change("members", {"room": "r", "user": name}, None, 2)

    def say(self, world: World, id_: int) -> Change:
        return world.change("messages", None, {"room": "r", "id": id_})

    @pytest.mark.parametrize("batches", ["one", "many"])
    def test_members_hear_from_their_joining_to_their_leaving(self, world: World, batches: str) -> None:
        changes = [
            self.join(world, "alice"),
            self.say(world, 1),
            self.join(world, "bob"),
            self.say(world, 2),
            self.leave(world, "bob"),
            self.say(world, 3),
        ]
        if batches == "one":
            world.tell(*changes)
        else:
            for change in changes:
                world.tell(change)
        received = {
            name: [(f["table"], f["event"], f["key"].get("id") or f["key"].get("user")) for f in world.frames_of(name)]
            for name in ("alice", "bob")
        }
        assert received["bob"] == [
            ("members", "INSERT", "bob"),
            ("messages", "INSERT", 2),
            ("members", "REMOVE", "bob"),
            ("members", "LEAVE", None),
            ("messages", "LEAVE", None),
        ]
        assert received["alice"] == [
            ("members", "INSERT", "alice"),
            ("messages", "INSERT", 1),
            ("members", "INSERT", "bob"),
            ("messages", "INSERT", 2),
            ("members", "REMOVE", "bob"),
            ("messages", "INSERT", 3),
        ]

    def test_the_members_are_kept_as_operations_of_the_same_commit(self, world: World) -> None:
        decision = world.tell(self.join(world, "alice"), self.join(world, "bob"), self.leave(world, "alice"))
        key = KEYS.members("members", "r")
        assert [(op.command, op.key, unpack(op.args[0])) for op in decision.operations] == [  # type: ignore[arg-type]
            ("HSET", key, "alice"),
            ("HSET", key, "bob"),
            ("HDEL", key, "alice"),
        ]
        assert world.groups == {Group("members", "r"): {"bob": {"room": "r", "user": "bob"}}}

    def test_a_member_that_is_a_number_does_not_stop_the_partition(self, world: World) -> None:
        numbered = world.change("members", None, {"room": "r", "user": 5})
        world.tell(self.join(world, "alice"), numbered, self.say(world, 1))
        assert [frame["table"] for frame in world.frames_of("alice")][-1] == "messages"


class TestMistakes:
    def test_readers_that_raise_are_counted_and_give_no_audience(self, world: World) -> None:
        world.tell(world.change("faulty", None, mail("alice", fault=1)), world.change("faulty", None, mail("bob")))
        assert world.failed == 1
        assert world.events() == {"bob": ["INSERT"]}

    def test_earlier_readers_see_an_item_leave_when_its_readers_raise(self, world: World) -> None:
        world.tell(world.change("faulty", mail("alice"), mail("alice", fault=1)))
        assert world.events() == {"alice": ["LEAVE"]}


class TestTransactions:
    """A feed has of a transaction what its reader sees, one after another, all but the last with `more`."""

    def transaction(self, world: World, *changes: Change, name: str = "t1") -> list[Change]:
        last = len(changes) - 1
        return [change._replace(transaction=name, more=number < last) for number, change in enumerate(changes)]

    def mails(self, world: World, *readers: Any) -> list[Change]:
        return [world.change("mail", None, {"id": f"m{n}", "to": to}) for n, to in enumerate(readers)]

    def frames_of(self, world: World, name: str) -> list[tuple[str, str | None, bool | None]]:
        return [(frame["key"]["id"], frame.get("transaction"), frame.get("more")) for frame in world.frames_of(name)]

    def test_each_reader_has_more_until_the_last_that_he_sees(self, world: World) -> None:
        world.tell(
            *self.transaction(
                world, *self.mails(world, ["alice", "bob"], ["alice"], ["carol", "bob"], ["alice"], ["carol"])
            )
        )
        assert self.frames_of(world, "alice") == [("m0", "t1", True), ("m1", "t1", True), ("m3", "t1", None)]
        assert self.frames_of(world, "bob") == [("m0", "t1", True), ("m2", "t1", None)]
        assert self.frames_of(world, "carol") == [("m2", "t1", True), ("m4", "t1", None)]
        assert self.frames_of(world, "dave") == []

    def test_a_reader_of_one_change_of_a_transaction_gets_no_other(self, world: World) -> None:
        world.tell(*self.transaction(world, *self.mails(world, ["bob"], ["alice"], ["bob"])))
        assert self.frames_of(world, "alice") == [("m1", "t1", None)]

    def test_entering_leaving_and_topic_frames_count_too(self, world: World) -> None:
        mine, others = mail("alice", public=False), mail("bob", public=True)
        world.tell(
            *self.transaction(
                world,
                world.change("mixed", mine, others, 2),
                world.change("news", None, {"id": "n"}),
                world.change("mail", mail("bob"), mail("alice"), 2),
            )
        )
        by_reader = {
            name: [(frame["event"], frame.get("more")) for frame in world.frames_of(name)]
            for name in ("alice", "bob", "topic mixed", "topic news")
        }
        assert by_reader == {
            "alice": [("MODIFY", True), ("ENTER", None)],
            "bob": [("LEAVE", None)],
            "topic mixed": [("ENTER", None)],
            "topic news": [("INSERT", None)],
        }

    def test_a_user_who_joins_in_a_transaction_gets_the_changes_after_it(self, world: World) -> None:
        members = [world.change("members", None, {"room": "r", "user": name}) for name in ("alice", "bob")]
        says = [world.change("messages", None, {"room": "r", "id": n}) for n in (1, 2)]
        world.tell(*self.transaction(world, members[0], says[0], members[1], says[1]))
        alice, bob = ([(f["table"], f.get("more")) for f in world.frames_of(name)] for name in ("alice", "bob"))
        assert alice == [("members", True), ("messages", True), ("members", True), ("messages", None)]
        assert bob == [("members", True), ("messages", None)]

    def test_changes_beside_a_transaction_do_not_belong_to_it(self, world: World) -> None:
        before, first, second, third, fourth, after = self.mails(world, *[["alice"]] * 6)
        one = self.transaction(world, first, second)
        other = self.transaction(world, third, fourth, name="t2")
        world.tell(before, *one, *other, after)
        assert [frame[1:] for frame in self.frames_of(world, "alice")] == [
            (None, None),
            ("t1", True),
            ("t1", None),
            ("t2", True),
            ("t2", None),
            (None, None),
        ]

    def test_the_rest_of_a_trimmed_transaction_is_still_sent(self, world: World) -> None:
        first, second, third, other = self.mails(world, *[["alice"]] * 4)
        changes = self.transaction(world, first, second, third)
        world.tell(None, changes[1], None, other)
        assert self.frames_of(world, "alice") == [("m1", "t1", None), ("m3", None, None)]

    def test_a_batch_ends_before_a_transaction_that_is_not_whole(self, world: World) -> None:
        one, *changes, other = self.mails(world, *[["alice"]] * 5)
        numbered = [((NOW, n), c) for n, c in enumerate([one, *self.transaction(world, *changes), other])]
        assert [whole(numbered[:count]) for count in range(1, 6)] == [1, 1, 1, 4, 5]
        assert whole(numbered[1:3]) == 0, "a batch without a whole transaction must be extended"

    def test_each_feed_gets_all_of_it_in_one_call_and_calls_are_bounded(self) -> None:
        names = [f"u{n}" for n in range(3000)]
        world = World()
        items = [{"id": f"m{n}", "to": names[n % 3 :: 3], "text": "x" * 2_000} for n in range(9)]
        plain = [world.change("mail", None, {"id": f"p{n}", "to": names[:1999]}) for n in range(2)]
        changes = [*plain, *self.transaction(world, *(world.change("mail", None, item) for item in items)), plain[0]]
        numbered = [((NOW, number), change) for number, change in enumerate(changes)]
        found = decide(world.app, KEYS, {}, PARTITION, numbered)
        assert isinstance(found, Routing)
        assert len(found.links) == KEYS.partitions
        seqs = range(2, 2 + len(items))
        for calls in found.links.values():
            order = [(unit.position, unit.upto) for unit in units_of(calls)]
            assert order == sorted(order)
            pieces: dict[bytes, set[int]] = defaultdict(set)
            for number, call in enumerate(calls):
                if not isinstance(call, AppendUnits):
                    continue
                appends = [append for unit in call.units for append in unit.appends]
                assert sum(len(append.feeds) for append in appends) <= MAX_CALL_APPENDS
                assert sum(len(append.feeds) * len(append.body) for append in appends) <= MAX_CALL_BYTES
                for append in appends:
                    if append.position.seq in seqs:
                        for feed in append.feeds:
                            pieces[feed].add(number)
            assert all(len(numbers) == 1 for numbers in pieces.values()), "no reader sees a part of it"
            assert len({number for numbers in pieces.values() for number in numbers}) > 1, "it is cut by feeds"

    def test_it_is_counted_by_its_last_change_at_each_destination(self) -> None:
        # A new owner may find a reader for a change that had none before: the destination must know it as the same.
        world = World()
        changes = self.transaction(world, *self.mails(world, ["alice"], ["bob"], []))
        found = decide(world.app, KEYS, {}, PARTITION, [((NOW, n), change) for n, change in enumerate(changes)])
        assert isinstance(found, Routing)
        assert {unit.position.seq for calls in found.links.values() for unit in units_of(calls)} == {2}


class TestBounds:
    """A batch ends by what it comes to, not by the number of its changes."""

    def numbered(self, world: World, *items: Item) -> list[tuple[tuple[int, int], Change]]:
        return [((NOW, n), world.change("mail", None, item)) for n, item in enumerate(items)]

    def test_a_batch_ends_when_it_has_many_recipients(self) -> None:
        world, names = World(), [f"u{n}" for n in range(5000)]
        changes = self.numbered(world, *({"id": f"m{n}", "to": names} for n in range(20)))
        found = decide(world.app, KEYS, {}, PARTITION, changes)
        assert isinstance(found, Routing)
        assert found.consumed == MAX_BATCH_APPENDS // 5000
        assert sum(len(append.feeds) for append in appends_of(found)) == MAX_BATCH_APPENDS

    def test_a_batch_ends_when_it_has_many_bytes(self) -> None:
        world = World()
        items = ({"id": f"m{n}", "to": USERS, "text": f"{n}" * 250_000} for n in range(100))
        found = decide(world.app, KEYS, {}, PARTITION, self.numbered(world, *items))
        assert isinstance(found, Routing)
        assert 0 < found.consumed < 100
        sent = sum(len(body) for calls in found.links.values() for body in bodies_of(calls).values())
        assert MAX_BATCH_BYTES <= sent < MAX_BATCH_BYTES + (1 << 20) * KEYS.partitions

    def test_a_batch_ends_when_its_time_is_up(self) -> None:
        world, names = World(), [f"u{n}" for n in range(3000)]
        changes = self.numbered(world, *({"id": f"m{n}", "to": names} for n in range(5)))
        steps = deciding(world.app, KEYS, {}, PARTITION, changes)
        next(steps)
        found: Any = None
        while found is None:
            try:
                steps.send(True)
            except StopIteration as end:
                found = end.value
        assert found.consumed == 1

    def test_a_large_decision_is_made_in_small_steps(self) -> None:
        world, names = World(), [f"u{n}" for n in range(10_000)]
        steps = deciding(world.app, KEYS, {}, PARTITION, self.numbered(world, {"id": "m", "to": names}))
        assert len(list(steps)) >= 20, "at least one for a thousand feeds, in each of two passes"

    def test_a_missing_fact_of_a_later_change_does_not_repeat_an_expensive_one(self) -> None:
        world, names = World(), [f"u{n}" for n in range(5000)]
        expensive = world.change("mail", None, {"id": "m", "to": names})
        other = world.change("messages", None, {"room": "r", "id": 1})
        found = decide(world.app, KEYS, {}, PARTITION, [((NOW, 1), expensive), ((NOW, 2), other)])
        assert isinstance(found, Routing)
        assert found.consumed == 1
        assert decide(world.app, KEYS, {}, PARTITION, [((NOW, 2), other)]) == {Group("members", "r")}

    def test_all_that_is_missing_is_named_at_once(self) -> None:
        world = World()
        changes = [((NOW, n), world.change("messages", None, {"room": f"r{n}", "id": 1})) for n in range(50)]
        assert decide(world.app, KEYS, {}, PARTITION, changes) == {Group("members", f"r{n}") for n in range(50)}

    def test_all_groups_of_a_user_with_peers_are_named_at_once(self) -> None:
        app = App("peers")
        rooms = app.membership("members", group="room", member="user")
        app.table("faces", key="user", readers=rooms.peers("user"))
        app.check()
        change = Change("INSERT", "faces", {"user": "u"}, 1, {"user": "u"}, None, NOW, "u", None, None)
        known: dict[Group | GroupsOf, Any] = {}
        rounds = 0
        while isinstance(needs := decide(app, KEYS, known, PARTITION, [((NOW, 1), change)]), set):
            rounds += 1
            for need in needs:
                known[need] = [f"r{n}" for n in range(1000)] if isinstance(need, GroupsOf) else {"v": {}}
        assert rounds == 2, "the groups of the user, and their members"

    def test_a_large_body_is_stored_once_for_many_feeds_and_a_small_one_copied(self) -> None:
        world, names = World(), [f"u{n}" for n in range(40)]
        for size, is_stored in ((500, False), (100_000, True)):
            item = {"id": "m", "to": names, "text": "x" * size}
            found = decide(world.app, KEYS, {}, PARTITION, self.numbered(world, item))
            assert isinstance(found, Routing)
            for calls in found.links.values():
                assert bool(bodies_of(calls)) == is_stored
                for unit in units_of(calls):
                    for append in unit.appends:
                        assert append.size_bytes > size, "feeds count the bytes of a body that is stored once, too"
                        assert (len(append.body) < 100) == is_stored


class TestClaims:
    """Connections of one user, or of one topic, get different frames: each what its claims let it see."""

    def app(self, **readers: Any) -> World:
        world = World()
        world.app = App("claims")
        rooms = world.app.membership("members", group="room", member="user")
        for name, audience in {"notes": rooms.of("room") & claim("tenant"), "open": claim("tenant"), **readers}.items():
            world.app.table(name, key=("room", "id"), readers=audience)
        world.app.check()
        world.names |= {KEYS.topic_feed(f'claim:tenant:"{t}"'): f'topic claim:tenant:"{t}"' for t in ("t1", "t2")}
        world.names |= {KEYS.topic_feed(name): f"topic {name}" for name in ("open", "cell:1", "cell:2")}
        world.tell(world.change("members", None, {"room": "r", "user": "alice"}))
        return world

    def note(self, tenant: str, text: str, **more: Any) -> Item:
        return {"room": "r", "id": "n", "tenant": tenant, "text": text, **more}

    def test_a_narrowing_is_asked_of_each_connection(self) -> None:
        world = self.app()
        world.tell(world.change("notes", None, self.note("t1", "a")))
        assert [frame["event"] for frame in world.frames_of("alice", claims={"tenant": "t1"})][1:] == ["INSERT"]
        assert [frame["event"] for frame in world.frames_of("alice", claims={"tenant": "t2"})][1:] == []
        assert [frame["event"] for frame in world.frames_of("alice")][1:] == []

    def test_an_item_that_moves_to_another_tenant_leaves_some_connections_and_enters_others(self) -> None:
        world = self.app()
        world.tell(world.change("notes", self.note("t1", "a"), self.note("t2", "b"), 2))
        (left,) = world.frames_of("alice", claims={"tenant": "t1"})[1:]
        (entered,) = world.frames_of("alice", claims={"tenant": "t2"})[1:]
        assert (left["event"], left.keys() & {"new", "old"}) == ("LEAVE", set())
        assert (entered["event"], entered.get("old"), entered["new"]["text"]) == ("ENTER", None, "b")
        assert world.frames_of("alice")[1:] == []

    def test_a_claim_alone_is_a_topic_for_each_value(self) -> None:
        world = self.app()
        world.tell(world.change("open", self.note("t1", "a"), self.note("t2", "b"), 2))
        by_reader = {n: events for n, events in world.events().items() if n.startswith("topic")}
        assert by_reader == {'topic claim:tenant:"t1"': ["LEAVE"], 'topic claim:tenant:"t2"': ["ENTER"]}

    def test_the_last_frame_that_a_connection_sees_of_a_transaction_has_no_more(self) -> None:
        world = self.app()
        tenants = ["t1", "t2", "t1", "t2", "t2"]
        changes = [
            world.change("notes", None, self.note(t, "x") | {"id": f"n{n}"})._replace(
                transaction="t", more=n < len(tenants) - 1
            )
            for n, t in enumerate(tenants)
        ]
        world.tell(*changes)
        for tenant in ("t1", "t2"):
            frames = world.frames_of("alice", claims={"tenant": tenant})[1:]
            assert [frame["key"]["id"] for frame in frames] == [f"n{n}" for n, t in enumerate(tenants) if t == tenant]
            assert [frame.get("more", False) for frame in frames] == [True] * (len(frames) - 1) + [False]

    def test_an_item_goes_from_one_topic_to_another(self) -> None:
        cells = topic("cell:{id}", followers=everyone)
        world = self.app(tiles=cells.of("cell"))
        world.tell(
            world.change("tiles", None, self.note("t1", "a", cell=1)),
            world.change("tiles", self.note("t1", "a", cell=1), self.note("t1", "a", cell="2"), 2),
        )
        by_reader = {n: events for n, events in world.events().items() if "cell" in n}
        assert by_reader == {"topic cell:1": ["INSERT", "LEAVE"], "topic cell:2": ["ENTER"]}


class TestSight:
    """A member receives the items that a membership opens and closes."""

    def world(self, readers: Any = None) -> World:
        world = World()
        world.app = App("sight")
        self.rooms = world.app.membership("members", group="room", member="user")
        world.app.table("messages", key=("room", "id"), readers=readers or self.rooms.of("room"))
        world.app.table("elsewhere", key="id", readers=self.rooms.of("room"))
        world.app.check()
        return world

    def join(self, world: World, old: Item | None, new: Item | None, *items: Item, whole: bool = True) -> None:
        image = new or old
        assert image
        records = [[1, NOW - 5, "carol", item] for item in items]
        change = world.change("members", old, new)
        seen = visibility(world.app, self.rooms, old, new)
        opens = [[table.name, records if table.name == "messages" else [], whole] for table in seen.compare]
        world.tell(change._replace(opens=opens or None))

    def test_a_new_member_gets_the_items_that_are_there(self) -> None:
        world = self.world()
        self.join(world, None, {"room": "r", "user": "alice"}, {"room": "r", "id": 2}, {"room": "r", "id": 1})
        own, *entered = world.frames_of("alice")
        assert own["event"] == "INSERT"
        assert [(f["event"], f["table"], f["key"], f["new"], f["at"], f["by"]) for f in entered] == [
            ("ENTER", "messages", {"room": "r", "id": n}, {"room": "r", "id": n}, NOW - 5, "carol") for n in (2, 1)
        ]
        assert {frame["position"] for frame in entered} == {own["position"]}
        assert world.frames_of("alice", "reset") == [{"reason": "too_many", "table": "elsewhere"}]

    def test_too_many_items_are_replaced_by_a_reset(self) -> None:
        world = self.world()
        self.join(world, None, {"room": "r", "user": "alice"}, {"room": "r", "id": 2}, whole=False)
        assert [frame["event"] for frame in world.frames_of("alice")] == ["INSERT", "ENTER"]
        assert {"reason": "too_many", "table": "messages", "key": {"room": "r"}} in world.frames_of("alice", "reset")

    def test_a_member_who_leaves_gets_one_leave_for_the_whole_group(self) -> None:
        world = self.world()
        self.join(world, None, {"room": "r", "user": "alice"})
        self.join(world, {"room": "r", "user": "alice"}, None)
        left = [(f["table"], f["event"], f["key"]) for f in world.frames_of("alice")[1:]]
        assert left == [
            ("members", "REMOVE", {"room": "r", "user": "alice"}),
            ("members", "LEAVE", {"room": "r"}),
            ("messages", "LEAVE", {"room": "r"}),
        ]

    def test_a_role_that_is_given_and_taken_opens_and_closes(self) -> None:
        rooms = App("x").membership("members", group="room", member="user")
        world = self.world(rooms.of("room", role="mod") | user("author"))
        guest, mod = ({"room": "r", "user": "alice", "role": role} for role in ("guest", "mod"))
        items = [{"room": "r", "id": 1, "author": "bob"}, {"room": "r", "id": 2, "author": "alice"}]
        self.join(world, None, guest, *items)
        assert [frame["event"] for frame in world.frames_of("alice")] == ["INSERT"]
        self.join(world, guest, mod, *items)
        assert [(f["event"], f["key"].get("id")) for f in world.frames_of("alice")[1:]] == [
            ("MODIFY", None),
            ("ENTER", 1),
        ]
        self.join(world, mod, guest, *items)
        assert [(f["event"], f["key"].get("id")) for f in world.frames_of("alice")[3:]] == [
            ("MODIFY", None),
            ("LEAVE", 1),
        ]

    def test_peers_get_a_reset_when_a_member_joins(self) -> None:
        world = self.world()
        rooms = self.rooms
        world.app.connections(readers=rooms.peers("user"))
        self.join(world, None, {"room": "r", "user": "alice"})
        world.feeds.clear()
        self.join(world, None, {"room": "r", "user": "bob"})
        for name in ("alice", "bob"):
            assert {"reason": "too_many", "table": "connections"} in world.frames_of(name, "reset")
        world.tell(world.change("connections", None, {"user": "alice", "connection": "c1"}))
        assert [frame["table"] for frame in world.frames_of("bob")][-1] == "connections"

    def test_a_changed_membership_is_checked_against_followed_topics(self) -> None:
        world = self.world()
        world.app.topic("room:{room}", followers=self.rooms.of("room"))
        self.join(world, None, {"room": "r", "user": "alice"})
        assert not world.frames_of("alice", "recheck")
        self.join(world, {"room": "r", "user": "alice"}, None)
        assert world.frames_of("alice", "recheck") == [{}]


def test_a_message_goes_to_its_user_alone(world: World) -> None:
    world.tell(Change("SEND", "", {"user": "bob"}, 0, {"body": [1, "x"]}, None, NOW, "admin", None, None))
    assert world.frames_of("bob", "message") == [{"from": "admin", "body": [1, "x"], "at": NOW}]
    assert world.events() == {}


def test_a_body_is_one_for_many_feeds_and_calls_are_bounded() -> None:
    app = make_app()
    names = [f"u{n}" for n in range(5000)]
    item = {"id": "m", "to": names}
    change = Change("INSERT", "mail", {"id": "m"}, 1, item, None, NOW, "alice", None, None)
    found = decide(app, Keys("dev", 1), {}, 0, [((NOW, 0), change)])
    assert isinstance(found, Routing)
    (calls,) = found.links.values()
    units = units_of(calls)
    assert all(sum(len(append.feeds) for append in unit.appends) <= MAX_CALL_APPENDS for unit in units)
    ends = [unit.upto for unit in units]
    numbers = [[feed_number(feed) for append in unit.appends for feed in append.feeds] for unit in units]
    assert ends == [*(max(some) for some in numbers[:-1]), WHOLE], "up to the last feed of each call"
    assert ends == sorted(ends)
    assert all(min(some) > end for some, end in zip(numbers[1:], ends, strict=False)), "none is in two calls"
    assert len({feed for unit in units for append in unit.appends for feed in append.feeds}) == 5000


def test_feeds_are_forgotten_as_a_whole_so_that_a_batch_under_way_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tidewire.services.broadcaster.route.MAX_FEEDS_CACHED", 1)
    cache = DestinationCache(KEYS)
    feeds = cache.begin()
    alice = feeds.user("alice")
    feeds.topic("alice")
    assert len(feeds) == 2
    assert cache.begin() is not feeds, "beyond the bound, the next batch begins with none"
    assert feeds.user("alice") is alice, "while this one goes on with the same objects"


SOME = st.lists(st.sampled_from(USERS), max_size=3, unique=True)
IMAGES = st.none() | st.builds(lambda to, public: mail(to, public=public), SOME, st.booleans())
PAIRS = st.tuples(st.sampled_from(["mail", "mixed", "news"]), IMAGES, IMAGES).filter(lambda t: bool(t[1] or t[2]))


@settings(deadline=None)
@given(st.lists(PAIRS, max_size=10))
def test_a_destination_gets_its_appends_in_order_and_once(
    pairs: list[tuple[str, Item | None, Item | None]],
) -> None:
    world = World()
    world.tell(*(world.change(*pair) for pair in pairs))
    for frames in world.feeds.values():
        positions = [frame["position"] for _, frame in frames]
        assert len(positions) == len(set(positions)), "once per feed"


@settings(deadline=None)
@given(st.lists(PAIRS, max_size=8), st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_batches_make_no_difference(pairs: list[tuple[str, Item | None, Item | None]], sizes: list[int]) -> None:
    one, many = World(), World()
    changes = [one.change(*pair) for pair in pairs]
    one.tell(*changes)
    for size in sizes:
        many.tell(*changes[:size])
        changes = changes[size:]
    many.tell(*changes)
    assert one.feeds == many.feeds


@settings(deadline=None)
@given(PAIRS)
def test_no_reader_gets_an_image_that_is_not_for_him(pair: tuple[str, Item | None, Item | None]) -> None:
    table, old, new = pair
    world = World()
    world.tell(world.change(table, old, new))
    for name in USERS:
        for frame in world.frames_of(name):
            for image, item in (("old", old), ("new", new)):
                if frame.get(image) is not None:
                    assert item
                    assert name in item["to"] or (table == "mixed" and item["public"])
