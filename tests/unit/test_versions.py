"""Which partitions a worker leaves to another version of the application, and what each version tells of itself."""

from __future__ import annotations

from typing import Any, cast

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire import App, everyone
from tidewire.errors import Declined
from tidewire.process.partition.worker import plan
from tidewire.process.registry import Registration, Registry
from tidewire.process.versions import Versions, dependents
from tidewire.redis.keys import Keys
from tidewire.testing import FakeBackend

KEYS = Keys("dev", 4)
SMALL, OTHER = ["notes"], ["secrets"]


def app(*tables: str) -> App:
    made = App("a")
    for table in tables:
        made.table(table, key="id")
    return made


class Fleet:
    """Live processes of one kind that hear of each other at once."""

    def __init__(self) -> None:
        self.backend = FakeBackend(fakeredis.FakeServer(), KEYS)
        self.versions: dict[str, Versions] = {}
        self.registries: dict[str, Any] = {}

    async def start(self, name: str, *tables: str) -> Versions:
        registry = cast(Registry, _Registry(name))
        made = self.versions[name] = Versions(app(*tables), self.backend, registry)
        self.registries[name] = registry
        await made.publish()
        self.beat()
        return made

    def beat(self) -> None:
        services = {
            name: Registration(name, True, 0, {"kind": "broadcaster"} | versions.describe())
            for name, versions in self.versions.items()
        }
        for registry in self.registries.values():
            registry.services = services

    def kill(self, name: str) -> None:
        del self.versions[name]
        self.beat()


class _Registry:
    kind = "broadcaster"

    def __init__(self, id_: str) -> None:
        self.id = id_
        self.services: dict[str, Registration] = {}

    def live(self, kind: str) -> list[str]:
        return sorted(self.services) if kind == self.kind else []


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


async def meets(fleet: Fleet, versions: Versions, *names: str) -> bool:
    """Whether a worker declines partition 0 for these names."""
    try:
        await versions.leave_to_others("broadcaster", 0, frozenset(names))
    except Declined as declined:
        versions.decline("broadcaster", 0, declined.names)
        fleet.beat()
        return True
    return False


async def test_a_partition_is_declined_only_while_a_live_worker_knows_its_tables(fleet: Fleet) -> None:
    old = await fleet.start("old", *SMALL)
    assert not await meets(fleet, old, "secrets"), "nobody does"
    new = await fleet.start("new", *SMALL, *OTHER)
    assert not await meets(fleet, new), "nothing is unknown"
    assert await meets(fleet, old, "secrets")
    assert old.declined("broadcaster") == {0}
    assert (new.declined("broadcaster"), new.offered("broadcaster")) == (set(), {0})
    assert new.offered("indexer") == set(), "each group by itself"
    another = await fleet.start("old2", *SMALL)
    assert another.declined("broadcaster") == {0}, "it need not find out for itself"
    assert another.offered("broadcaster") == set()
    fleet.kill("new")
    for one in (old, another):
        fleet.beat()
        assert one.declined("broadcaster") == set()
        fleet.beat()


@pytest.mark.parametrize("first", ["a", "b"])
async def test_of_two_that_decline_a_partition_to_each_other_one_takes_it(fleet: Fleet, first: str) -> None:
    a, b = await fleet.start("a", "notes", "one"), await fleet.start("b", "notes", "two")
    unknown = {"a": "two", "b": "one"}
    for versions, name in ((a, unknown["a"]), (b, unknown["b"])):
        versions.decline("broadcaster", 0, frozenset({name}))  # at the same moment: neither has heard of the other
    fleet.beat()
    order = [a, b] if first == "a" else [b, a]
    for versions in order:
        versions.declined("broadcaster")
        fleet.beat()
    assert (0 in a.declined("broadcaster"), 0 in b.declined("broadcaster")) == (False, True)
    assert 0 in a.offered("broadcaster")
    assert not await meets(fleet, a, "two"), "it goes on, and notes what it does not know"


async def test_digests_of_the_dead_are_learnt_again_by_the_living(fleet: Fleet) -> None:
    old = await fleet.start("old", *SMALL)
    new = await fleet.start("new", *SMALL, *OTHER)
    await fleet.backend.commands.hdel(KEYS.applications(), new.digest)  # taken for one that is dead
    assert not await meets(fleet, old, "secrets")
    await new._look()
    assert await meets(fleet, old, "secrets")


async def test_the_stage_tells_what_depends_on_a_membership(fleet: Fleet) -> None:
    made = App("a")
    rooms = made.membership("members", group="room", member="user")
    clubs = made.membership("clubs", group="club", member="user")
    made.table("notes", key=("room", "id"), readers=rooms.of("room") | clubs.peers("by"))
    made.table("free", key="id", readers=everyone)
    made.table("any", key="id", readers=lambda _: everyone)
    made.topic("room:{room}", followers=rooms.of("room"))
    made.table("tiles", key="id", readers=made.topics["room:{room}"].of("room"))
    assert dependents(made) == {
        "connections": [],
        "members": ["members"],
        "clubs": ["clubs"],
        "notes": ["clubs", "members"],
        "free": [],
        "any": ["*"],
        "tiles": ["members"],
        "topic:room:{room}": ["members"],
    }
    await Versions(made, fleet.backend, cast(Registry, _Registry("x"))).publish()
    old = await fleet.start("old", "free")
    assert await old.dependents_of({"members"}) == {"members", "notes", "any", "tiles", "topic:room:{room}"}
    assert await old.dependents_of({"clubs"}) == {"clubs", "notes", "any"}
    assert await old.dependents_of({"others"}) == {"any"}


async def test_a_topic_that_only_others_declare_is_known_by_its_pattern(fleet: Fleet) -> None:
    old, made = await fleet.start("old"), App("a")
    made.topic("room:{room}")
    new = Versions(made, fleet.backend, cast(Registry, _Registry("new")))
    fleet.versions["new"], fleet.registries["new"] = new, new._registry
    await new.publish()
    fleet.beat()
    await old.leave_to_others("broadcaster", 0, frozenset({"nothing"}))  # it looks at who is there
    assert old.unknown_topic("room:1") == {"topic:room:{room}"}
    assert old.unknown_topic("cell:1") == set()


PARTITIONS = st.sets(st.integers(0, 7))


@given(PARTITIONS, st.integers(0, 8), PARTITIONS, PARTITIONS)
def test_a_plan_keeps_what_is_offered_and_takes_nothing_that_is_declined(
    owned: set[int], share: int, declined: set[int], offered: set[int]
) -> None:
    declined, owned = declined - offered, owned - declined
    todo = plan(owned, share, 8, declined, offered)
    assert not offered & set(todo.hand_over), "what others decline is not handed back"
    assert not declined & {*todo.extra, *todo.others}
    assert set(todo.extra) == offered - owned
    assert not owned & {*todo.extra, *todo.others}
    kept = owned - offered - set(todo.hand_over)
    assert len(kept) <= share
    assert len(kept) + todo.room == share or todo.room == 0
    if not offered | declined:
        assert len(todo.hand_over) == max(len(owned) - share, 0)
