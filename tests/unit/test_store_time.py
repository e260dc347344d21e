"""What time brings to a partition: items that expire, versions that are forgotten, changes that are trimmed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from tidewire.app import App
from tidewire.audiences import everyone
from tidewire.model.records import Item
from tidewire.process.bus import Answers
from tidewire.process.settings import Settings
from tidewire.redis.functions import Fence, Owned
from tidewire.services.store.chores import UNREAD_FACTOR, kept_by_bytes
from tidewire.services.store.decide import Decision
from tidewire.services.store.facts import NEVER, Stream
from tidewire.services.store.service import StoreTenure

from .world import KEYS, NOW, World

SOON_S = NOW / 1000 + 10


def make_app(*, expires: str | None = "until") -> App:
    app = App("test")
    app.table("notes", key="id", readers=everyone, writers=everyone, expires=expires)
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone, expires=expires)
    return app


@pytest.fixture
def world() -> World:
    return World(make_app())


def events_of(world: World) -> list[tuple[str, str, int]]:
    return [(change.event, change.by, change.version) for _, change in world.changes]


class TestExpiry:
    @pytest.fixture
    def world(self) -> World:
        world = World(make_app())
        world.do("alice", "put", table="lines", item={"page": "p", "n": 1, "until": SOON_S})
        world.do("alice", "put", table="lines", item={"page": "p", "n": 2, "until": SOON_S + 100})
        world.do("alice", "put", table="lines", item={"page": "p", "n": 3})
        return world

    def ns(self, world: World) -> list[Any]:
        return [entry["item"]["n"] for entry in world.do("bob", "query", table="lines", key="p")["items"]]

    def test_an_item_is_there_until_its_time_and_not_from_then_on(self, world: World) -> None:
        key = {"page": "p", "n": 1}
        world.now = int(SOON_S * 1000) - 1
        assert world.do("bob", "get", table="lines", key=key)["version"] == 1
        assert self.ns(world) == [1, 2, 3]
        world.now += 1
        for action in ("get", "update", "delete"):
            assert world.code("bob", action, table="lines", key=key) == "not_found"
        assert self.ns(world) == [2, 3]
        put: dict[str, Any] = {"table": "lines", "item": {**key, "x": 1}}
        for condition in ({"present": True}, {"version": 1}, {"equals": {"n": 1}}):
            assert world.code("bob", "put", **put, if_=condition) == "conflict"

    def test_the_sweep_removes_expired_items_and_names_expiry_as_author(self, world: World) -> None:
        world.now = int(SOON_S * 1000)
        world.changes.clear()
        assert not world.chore(expire=True).more_to_expire
        ((_, change),) = world.changes
        assert (change.event, change.by, change.version) == ("REMOVE", "tidewire:expiry", 2)
        assert (change.key, change.new) == ({"page": "p", "n": 1}, None)
        assert change.old == {"page": "p", "n": 1, "until": SOON_S}
        world.chore(expire=True)
        assert len(world.changes) == 1, "once"
        assert self.ns(world) == [2, 3]

    @pytest.mark.parametrize("together", [True, False])
    def test_a_write_over_an_expired_item_removes_it_in_the_same_commit(self, world: World, together: bool) -> None:
        world.now = int(SOON_S * 1000)
        world.changes.clear()
        before = world.batches
        put = world.command("bob", "put", table="lines", item={"page": "p", "n": 1}, if_={"absent": True})
        (reply,) = world.run(put, expire=together)
        assert world.batches == before + 1
        assert reply.result["version"] == 3
        assert events_of(world) == [("REMOVE", "tidewire:expiry", 2), ("INSERT", "bob", 3)]
        assert reply.result["position"] == world.changes[-1][0]
        world.chore(expire=True)
        assert len(world.changes) == 2
        assert self.ns(world) == [1, 2, 3]

    def test_an_item_that_is_given_more_time_or_none_is_kept(self, world: World) -> None:
        world.do("alice", "update", table="lines", key={"page": "p", "n": 1}, set={"until": SOON_S + 50})
        world.do("alice", "update", table="lines", key={"page": "p", "n": 2}, remove=["until"])
        world.now = int(SOON_S * 1000) + 49_000
        world.chore(expire=True)
        assert self.ns(world) == [1, 2, 3]
        world.now += 200_000
        world.chore(expire=True)
        assert self.ns(world) == [2, 3]
        assert events_of(world)[-1][0] == "REMOVE"

    @pytest.mark.parametrize("until", ["2020-01-01", None, True, [1], {"at": 1}])
    def test_an_expiry_that_is_not_a_number_is_ignored(self, world: World, until: Any) -> None:
        world.do("alice", "put", table="notes", item={"id": 1, "until": until})
        world.now += 10**12
        world.chore(expire=True)
        assert world.do("bob", "get", table="notes", key=1)["version"] == 1

    def test_more_than_is_done_at_once_is_done_in_several_commits(self) -> None:
        world = World(make_app())
        puts = [world.command("alice", "put", table="notes", item={"id": n, "until": SOON_S}) for n in range(3)]
        world.run(*puts)
        world.now = int(SOON_S * 1000)
        world.changes.clear()
        rounds = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tidewire.services.store.chores.CHORE_BATCH", 2)
            patch.setattr("tests.unit.world.CHORE_BATCH", 2)
            while world.chore(expire=True).more_to_expire:
                rounds += 1
                assert rounds < 5
        assert rounds == 1
        assert len(world.changes) == 3

    def test_an_item_whose_expiry_was_taken_away_stays(self) -> None:
        world = World(make_app())
        world.do("alice", "put", table="notes", item={"id": 1, "until": SOON_S})
        world.app = make_app(expires=None)
        world.now = int(SOON_S * 1000)
        world.chore(expire=True)
        assert world.do("bob", "get", table="notes", key=1)["version"] == 1
        assert not world.scores[KEYS.expiries(0)]

    def test_an_item_due_by_a_former_attribute_is_noted_by_the_present_one(self) -> None:
        world = World(make_app())
        world.do("alice", "put", table="notes", item={"id": 1, "until": SOON_S, "ends": SOON_S + 100})
        world.app = make_app(expires="ends")
        world.now = int(SOON_S * 1000)
        world.chore(expire=True)
        assert [float(at) for at in world.scores[KEYS.expiries(0)].values()] == [SOON_S + 100]
        world.now += 100_000
        world.chore(expire=True)
        assert events_of(world)[-1] == ("REMOVE", "tidewire:expiry", 2)

    # Of the second, (now / 1000) * 1000 is more than now.
    @pytest.mark.parametrize("now", [NOW, 2_150_000_000_004])
    def test_an_item_is_removed_when_its_time_has_come(self, now: int) -> None:
        world = World(make_app())
        world.do("alice", "put", table="notes", item={"id": 1, "until": now / 1000})
        world.now = now
        world.chore(expire=True)
        assert events_of(world)[-1] == ("REMOVE", "tidewire:expiry", 2)


class TestVersions:
    """Versions of deleted items are remembered for as long as changes are kept, and never go back."""

    def purge(self, world: World, keep_s: int = 0) -> Decision:
        return world.chore(keep_since=(world.now - 1000 * keep_s, 0))

    def remembered(self, world: World) -> int:
        return sum(len(fields) for fields in world.hashes.values())

    @pytest.fixture
    def world(self) -> World:
        world = World(make_app())
        for x in range(5):
            world.do("alice", "put", table="notes", item={"id": "n", "x": x})
        world.do("alice", "put", table="notes", item={"id": "live"})
        world.do("alice", "delete", table="notes", key="n")
        world.stream = Stream(7, (NOW, 0), NEVER, {})
        world.now += 10_000
        return world

    def test_a_version_is_forgotten_when_its_changes_are(self, world: World) -> None:
        self.purge(world, keep_s=60)
        assert self.remembered(world) == 2
        assert self.purge(world).floor == 6
        assert self.remembered(world) == 1, "the live one"
        assert not world.scores[KEYS.tombstones(0)]
        assert world.orders[KEYS.values(0, "notes")] == {b"slive"}

    def test_no_version_comes_again_after_it_was_forgotten(self, world: World) -> None:
        self.purge(world)
        assert world.do("alice", "put", table="notes", item={"id": "n"})["version"] > 6
        assert world.do("alice", "put", table="notes", item={"id": "other"})["version"] > 6
        assert world.do("alice", "put", table="notes", item={"id": "live", "x": 1})["version"] == 2

    def test_connections_are_forgotten_at_once_and_without_a_trace(self, world: World) -> None:
        """Many come and go, and an id of one is never that of another."""
        key = {"user": "alice", "connection": "c1"}
        world.do("alice", "put", table="connections", item={**key, "gateway": "g"}, role="service")
        world.do("alice", "delete", table="connections", key=key, role="service")
        assert self.purge(world, keep_s=60).floor == 0
        assert not world.hashes[KEYS.items("connections", "alice")]
        assert not world.orders[KEYS.values(0, "connections")]
        assert self.remembered(world) == 2, "the others stay"

    def test_changes_that_a_group_has_not_read_are_kept(self, world: World) -> None:
        world.stream = Stream(7, (NOW, 0), (NOW, 0), {"broadcaster": 7})
        assert self.purge(world).floor == 0
        assert self.remembered(world) == 2

    def test_an_item_that_is_written_in_the_same_batch_is_not_forgotten(self, world: World) -> None:
        put = world.command("alice", "put", table="notes", item={"id": "n"})
        (reply,) = world.run(put, keep_since=(world.now, 0))
        assert reply.result["version"] == 7
        self.purge(world)
        assert world.do("bob", "get", table="notes", key="n")["version"] == 7


class TestTrimming:
    def trims(self, world: World, stream: Stream, **chores: Any) -> list[tuple[Any, ...]]:
        world.stream = stream
        world.chore(**chores)
        return world.trims

    def test_nothing_is_trimmed_that_is_younger_than_the_time_to_keep(self, world: World) -> None:
        stream = Stream(10, (100, 0), NEVER, {})
        assert self.trims(world, stream, keep_since=(50, 0)) == []
        assert self.trims(world, stream, keep_since=(500, 0)) == [("MINID", "=", "500-0")]

    def test_nothing_is_trimmed_that_a_group_has_not_read(self, world: World) -> None:
        stream = Stream(10, (100, 0), (300, 4), {"broadcaster": 3, "indexer": 0})
        assert self.trims(world, stream, keep_since=(500, 0)) == [("MINID", "=", "300-4")]

    def test_beyond_the_hard_limit_all_is_trimmed_and_losses_are_counted(self, world: World) -> None:
        world.stream = Stream(10, (100, 0), (100, 0), {"broadcaster": 9, "indexer": 4})
        decision = world.chore(keep_since=(50, 0), keep_changes=4)
        assert world.trims == [("MAXLEN", "=", 4)]
        assert decision.lost == {"broadcaster": 5}

    @pytest.mark.parametrize(("length", "limit"), [(4, 4), (10, 0)])
    def test_within_the_hard_limit_and_without_one_nothing_is_lost(self, world: World, length: int, limit: int) -> None:
        world.stream = Stream(length, (100, 0), (100, 0), {"broadcaster": length})
        decision = world.chore(keep_since=(50, 0), keep_changes=limit)
        assert world.trims == []
        assert decision.lost == {}

    def test_beyond_the_bound_in_bytes_read_changes_are_trimmed_in_steps(self, world: World) -> None:
        world.stream = Stream(100, (100, 0), (900, 0), {"broadcaster": 5}, size_bytes=2000)
        decision = world.chore(keep_since=(50, 0), keep_bytes=1000)
        assert decision.more_to_trim, "the memory is looked at again"
        assert decision.lost == {}
        assert world.trims == [("MAXLEN", "=", 100 - 50 // 4)]

    @pytest.mark.parametrize("stream", [(100, 5, 1000), (100, 100, 2000), (100, 100, 4000)])
    def test_within_the_bound_or_unread_below_four_times_of_it_nothing_is_trimmed(
        self, world: World, stream: tuple[int, int, int]
    ) -> None:
        length, unread, size_bytes = stream
        world.stream = Stream(length, (100, 0), (100, 0), {"broadcaster": unread}, size_bytes=size_bytes)
        decision = world.chore(keep_since=(50, 0), keep_bytes=1000)
        assert (world.trims, decision.lost, decision.more_to_trim) == ([], {}, False)

    def test_unread_entries_beyond_four_times_the_bound_in_bytes_are_trimmed_and_counted(self, world: World) -> None:
        world.stream = Stream(100, (100, 0), (100, 0), {"broadcaster": 100, "indexer": 10}, size_bytes=8000)
        decision = world.chore(keep_since=(50, 0), keep_bytes=1000)
        (trim,) = world.trims
        assert isinstance(trim[2], int)
        assert 50 <= trim[2] < 100
        assert decision.lost == {"broadcaster": 100 - trim[2]}

    def test_without_a_count_of_unread_changes_none_counts_as_read(self, world: World) -> None:
        world.stream = Stream(100, (100, 0), (100, 0), {"broadcaster": 0}, size_bytes=3000, counted=False)
        assert world.chore(keep_since=(50, 0), keep_bytes=1000).lost == {}
        assert world.trims == []

    def test_a_trim_by_bytes_spares_changes_of_the_same_commit(self, world: World) -> None:
        world.stream = Stream(100, (100, 0), (900, 0), {"broadcaster": 0}, size_bytes=2000)
        world.run(world.command("alice", "put", table="notes", item={"id": "n"}), keep_since=(50, 0), keep_bytes=1000)
        assert world.trims == [("MAXLEN", "=", 100 - 50 // 4 + 1)]

    @given(
        sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=300),
        unread=st.integers(0, 300),
        max_bytes=st.integers(1, 50_000),
    )
    def test_trims_by_bytes_end_within_the_bounds(self, sizes: list[int], unread: int, max_bytes: int) -> None:
        """Entries of any sizes: step by step, until the stream fits or all that is left is unread."""
        unread = min(unread, len(sizes))
        for _ in range(400):
            stream = Stream(len(sizes), (1, 0), (1, 0), {"broadcaster": unread}, sum(sizes))
            if stream.size_bytes <= max_bytes:
                break
            keep = kept_by_bytes(stream, max_bytes)
            assert 0 <= keep <= len(sizes)
            assert keep >= unread or stream.size_bytes > UNREAD_FACTOR * max_bytes
            if keep == len(sizes):
                assert unread == len(sizes)
                assert stream.size_bytes <= UNREAD_FACTOR * max_bytes
                break
            sizes = sizes[len(sizes) - keep :]
            unread = min(unread, keep)
        else:
            raise AssertionError("the trims do not end")

    def test_versions_of_items_deleted_before_the_oldest_change_are_forgotten(self, world: World) -> None:
        """Whichever bound has trimmed the changes before it."""
        world.do("alice", "put", table="notes", item={"id": "n"})
        world.do("alice", "delete", table="notes", key="n")
        world.now += 1000
        world.stream = Stream(9, (world.now - 1, 0), NEVER, {})
        world.chore(keep_since=(0, 0))
        assert not world.hashes[KEYS.items("notes", "n")]
        assert world.do("alice", "put", table="notes", item={"id": "n"})["version"] == 3

    async def test_lost_changes_are_counted_and_logged(self) -> None:
        backend: Any = None
        owned = Owned(b"lease", KEYS.home(0), b"stream", "store", Fence(1, 1))
        tenure = StoreTenure(make_app(), backend, Settings(), Answers(backend), 3, owned)
        tenure._decision = Decision(lost={"broadcaster": 5})

        def lost() -> float:
            return REGISTRY.get_sample_value("tidewire_store_changes_lost_total", {"group": "broadcaster"}) or 0

        before = lost()
        with capture_logs() as logs:
            await tenure.committed(confirmed=True)
        assert lost() == before + 5
        (entry,) = logs
        assert entry["log_level"] == "error"
        assert {"partition": 3, "group": "broadcaster", "count": 5}.items() <= entry.items()


class Inner(msgspec.Struct):
    city: str


class Order(msgspec.Struct):
    id: str
    owner: str
    to: Inner | None = None
    lines: list[int] = []


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    id: str


def must_be_short(item: Item) -> None:
    item["seen"] = True  # what a rule does to its copy is of no account
    if len(item.get("text", "")) > 5:
        raise ValueError("text is longer than 5")


def must_be(item: Item) -> None:
    if item.get("text") == "wrong":
        raise AssertionError


class TestSchemas:
    @pytest.fixture
    def world(self) -> World:
        app = App("test")
        open_to_all: dict[str, Any] = {"key": "id", "readers": everyone, "writers": everyone}
        for name, schema in (("orders", Order), ("strict", Strict), ("short", must_be_short), ("asserted", must_be)):
            app.table(name, schema=schema, **open_to_all)
        return World(app)

    @pytest.mark.parametrize(
        ("table", "item", "place"),
        [
            ("orders", {"id": "o", "owner": 5}, "$.owner"),
            ("orders", {"id": "o"}, "`owner`"),
            ("orders", {"id": "o", "owner": "a", "to": {"city": None}}, "$.to.city"),
            ("orders", {"id": "o", "owner": "a", "lines": [1, "two"]}, "$.lines[1]"),
            ("strict", {"id": "s", "other": 1}, "`other`"),
            ("short", {"id": "s", "text": "too long"}, "text is longer than 5"),
            ("asserted", {"id": "s", "text": "wrong"}, "AssertionError"),
        ],
    )
    def test_an_item_that_does_not_fit_is_refused_with_the_place(
        self, world: World, table: str, item: Item, place: str
    ) -> None:
        error = world.refused("alice", "put", table=table, item=item)
        assert error["code"] == "bad_request"
        assert place in error["message"]
        assert repr(table) in error["message"]
        assert world.code("job", "put", table=table, item=item, role="service") == "bad_request"
        error = world.refused("alice", "transact", operations=[{"action": "put", "table": table, "item": item}])
        assert place in error["message"]

    def test_an_update_must_fit_the_schema_and_is_stored_unchanged(self, world: World) -> None:
        item = {"id": "o", "owner": "alice", "note": "what the schema does not name"}
        world.do("alice", "put", table="orders", item=item)
        assert world.do("alice", "get", table="orders", key="o")["item"] == item
        error = world.refused("alice", "update", table="orders", key="o", set={"to.city": 5})
        assert "$.to.city" in error["message"]
        world.do("alice", "put", table="short", item={"id": "s", "text": "short"})
        assert world.do("alice", "get", table="short", key="s")["item"] == {"id": "s", "text": "short"}

    def test_a_client_that_may_not_write_learns_nothing_of_the_schema(self, world: World) -> None:
        world.app.table("closed", key="id", schema=Order)
        assert world.code("alice", "put", table="closed", item={"id": 5}) == "forbidden"


def with_default(item: Item) -> Item:
    return {"id": item["id"], "state": item.get("state", "new")}


class TestSchemasThatNormalize:
    @pytest.mark.parametrize("schema", [with_default, Order])
    def test_the_store_keeps_what_the_schema_returns(self, schema: Any) -> None:
        app = App("test")
        app.table("orders", key="id", readers=everyone, writers=everyone, schema=schema, normalize=True)
        world = World(app)
        world.do("alice", "put", table="orders", item={"id": "o", "owner": "alice", "stranger": 1})
        kept = world.do("alice", "get", table="orders", key="o")["item"]
        filled: dict[str, Any] = {"id": "o", "owner": "alice", "to": None, "lines": []}
        assert kept == (filled if schema is Order else {"id": "o", "state": "new"})

    @pytest.mark.parametrize(
        ("schema", "problem"),
        [
            (lambda item: None, "the schema returned a NoneType, not a dict"),
            (lambda item: item | {"at": float("inf")}, "the schema returned a number that is not finite at $.at"),
            (lambda item: item | {"id": "other"}, "the schema changed the key"),
        ],
    )
    def test_a_wrong_result_of_a_schema_is_refused(self, schema: Any, problem: str) -> None:
        app = App("test")
        app.table("orders", key="id", readers=everyone, writers=everyone, schema=schema, normalize=True)
        error = World(app).refused("alice", "put", table="orders", item={"id": "o"})
        assert error["code"] == "bad_request"
        assert problem in error["message"]


def test_an_expiry_in_milliseconds_is_kept_and_warned_of_once_for_each_table() -> None:
    world = World(make_app())
    with capture_logs() as logs:
        for number in range(2):
            world.do("alice", "put", table="notes", item={"id": f"n{number}", "until": NOW})
    warnings = [log for log in logs if log["event"] == "expiry_looks_like_ms"]
    assert [(log["table"], log["attribute"], log["value"]) for log in warnings] == [("notes", "until", NOW)]
    assert world.do("alice", "get", table="notes", key="n1")["item"]["until"] == NOW


# ── all of it together ──────────────────────────────────────────────────────────────────────────────────────────────

IDS = st.sampled_from(["a", "b"])
UNTIL = st.sampled_from([None, -1, 0, 1, 3])  # seconds from now
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), IDS, UNTIL),
        st.tuples(st.just("delete"), IDS),
        st.tuples(st.just("wait"), st.integers(0, 2500)),
        st.tuples(st.just("chores"), st.booleans(), st.booleans()),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_versions_rise_and_expired_items_are_gone(steps: list[tuple[Any, ...]]) -> None:
    world = World(make_app())
    world.stream = Stream(1, (0, 1), NEVER, {})
    held: dict[str, Item] = {}
    for number, (step, *given_) in enumerate(steps):
        if step == "put":
            id_, until = given_
            held[id_] = {"id": id_, "x": number} | ({} if until is None else {"until": world.now / 1000 + until})
            world.do("alice", "put", table="notes", item=held[id_])
        elif step == "delete":
            world.run(world.command("alice", "delete", table="notes", key=given_[0]))
            held.pop(given_[0], None)
        elif step == "wait":
            world.now += given_[0]
        else:
            expire, trim = given_
            world.chore(expire=expire, keep_since=(world.now, 0) if trim else None)
        held = {id_: item for id_, item in held.items() if item.get("until", 9e9) > world.now / 1000}
        for id_ in ("a", "b"):
            found = [entry["item"] for entry in world.do("bob", "query", table="notes", key=id_)["items"]]
            assert found == ([held[id_]] if id_ in held else [])
    world.chore(expire=True)
    assert len(world.scores[KEYS.expiries(0)]) == sum("until" in item for item in held.values())
    for id_ in ("a", "b"):
        changes = [change for _, change in world.changes if change.key == {"id": id_}]
        versions = [change.version for change in changes]
        assert versions == sorted(set(versions)), "never back, never twice"
        there = [change.event != "REMOVE" for change in changes]
        assert [change.event == "INSERT" for change in changes] == [
            now and not before for before, now in zip([False, *there], there, strict=False)
        ], "after a REMOVE comes an INSERT"
        assert (changes[-1].new if changes else None) == held.get(id_)
