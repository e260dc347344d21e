"""What the broadcaster keeps in memory of groups, and when it asks for them again."""

from __future__ import annotations

import time
from typing import Any

import fakeredis
import pytest

from tidewire.app import App
from tidewire.model.records import Change, ItemRecord, pack, unpack
from tidewire.redis.functions import Arg
from tidewire.redis.keys import Keys
from tidewire.services.broadcaster.decide import Group, GroupMembers
from tidewire.services.broadcaster.groups import GroupCache, Groups, weight_of
from tidewire.services.broadcaster.indexed import IndexWait, last_of_peers, peer_memberships
from tidewire.services.broadcaster.repair import members_as_they_are
from tidewire.testing import FakeBackend

KEYS = Keys("dev", 4)


def make_app() -> App:
    app = App("a")
    rooms = app.membership("members", group="room", member="user")
    app.membership("guests", group="room", member="user")
    app.table("faces", key="user", readers=rooms.peers("user"))
    return app


class Counting(FakeBackend):
    """A backend that counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__(fakeredis.FakeServer(), KEYS)
        self.asked: list[str] = []

    async def calls(self, commands: Any) -> list[Any]:
        commands = list[tuple[Arg, ...]](commands)
        self.asked += [str(command[0]) for command in commands]
        return await super().calls(commands)

    def asked_for(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


def group_in(partition: int, n: int = 0) -> Group:
    names = [f"r{i}" for i in range(200) if KEYS.partition_of(f"r{i}") == partition]
    return Group("members", names[n])


async def joins(backend: FakeBackend, group: Group, user: str, version: str | None) -> None:
    item = {"room": group.group, "user": user}
    await backend.commands.hset(KEYS.items("members", group.group), pack(user), pack(ItemRecord(1, 1, "x", item)))
    if version:
        versions = KEYS.group_versions(KEYS.partition_of(group.group))
        await backend.commands.hset(versions, KEYS.group_field("members", group.group), version)


def test_a_cache_is_bounded_by_members_and_evicts_the_least_recently_used() -> None:
    cache: GroupCache[dict[str, Any]] = GroupCache(len, 10)
    a, b, c = (group_in(0, n) for n in range(3))
    cache.put(a, {"1": {}, "2": {}, "3": {}})
    cache.put(b, {"1": {}, "2": {}, "3": {}})
    assert cache[a], "it is used"
    assert cache.held == 8
    cache.put(c, {"1": {}, "2": {}, "3": {}})
    assert list(cache) == [a, c], "b was used longest ago"
    cache.put(c, {str(n): {} for n in range(50)})
    assert (list(cache), cache.held) == ([c], 51), "the newest stays, however large"
    cache.clear()
    assert (len(cache), cache.held) == (0, 0)


def test_a_group_with_large_items_weighs_as_much_as_their_kibibytes() -> None:
    small = {str(number): {"user": str(number)} for number in range(40)}
    large = {user: item | {"about": "x" * 10_240} for user, item in small.items()}
    assert (weight_of({}), weight_of(small)) == (0, 40)
    assert 400 <= weight_of(large) <= 410
    assert 10 <= weight_of({"a": {"about": "x" * 10_240}}) <= 11
    cache: GroupCache[GroupMembers] = GroupCache(weight_of, 500)
    for number in range(3):
        cache.put(group_in(0, number), large)
    assert list(cache) == [group_in(0, 2)]
    cache.drop(group_in(0, 2))
    assert cache.held == 0


def test_a_decision_costs_nothing_for_groups_that_it_does_not_need() -> None:
    """9,900 cached groups were copied for each batch, in 10.8 ms."""
    groups = Groups(make_app(), FakeBackend(fakeredis.FakeServer(), KEYS), 0)
    many: dict[Group, GroupMembers] = {Group("members", n): {str(m): {} for m in range(4)} for n in range(9_900)}
    groups.keep(groups.begin(), many)
    begun = time.process_time()
    for _ in range(100):
        known = groups.begin()
        assert Group("members", 7) in known
        groups.keep(known, {Group("members", 7): {"me": {}}})
    assert (time.process_time() - begun) / 100 < 0.001


async def test_a_group_of_another_partition_is_read_again_only_when_it_has_changed() -> None:
    backend, here, there = Counting(), group_in(0), group_in(1)
    groups = Groups(make_app(), backend, 0)

    async def members() -> set[str]:
        found = await groups.fetch([there], versioned=True)
        return set(found[there])

    await joins(backend, there, "ann", "0-5-0")
    assert await members() == {"ann"}
    assert backend.asked_for() == ["HGET", "HGETALL"], "the version first"
    assert await members() == {"ann"}
    assert backend.asked_for() == ["HGET"]
    await joins(backend, there, "bob", "0-6-0")
    assert await members() == {"ann", "bob"}
    assert backend.asked_for() == ["HGET", "HGETALL"]
    # Of this partition: what has passed, whatever the items are.
    await joins(backend, here, "ann", "0-7-0")
    assert await groups.fetch([here], versioned=True) == {here: {}}


@pytest.mark.parametrize("versioned", [True, False], ids=["no version", "older stores"])
async def test_a_group_without_a_version_is_read_each_time(versioned: bool) -> None:
    """Its last change was written by a store that notes none, and so may be its next one."""
    backend, there = Counting(), group_in(1)
    groups = Groups(make_app(), backend, 0)
    for name in ("ann", "bob"):
        await joins(backend, there, name, None if versioned else "0-1-0")
        found = await groups.fetch([there], versioned=versioned)
        assert name in found[there]


async def test_a_full_cache_does_not_mistake_one_answer_for_another() -> None:
    backend, groups_there = Counting(), [group_in(1, n) for n in range(5)]
    groups = Groups(make_app(), backend, 0)
    groups._others = GroupCache(lambda snapshot: len(snapshot.members), 4)
    for round_ in range(3):
        for n, group in enumerate(groups_there):
            await joins(backend, group, f"u{n}-{round_}", f"0-{round_}-0")
        found = await groups.fetch(groups_there, versioned=True)
        assert [f"u{n}-{round_}" in found[group] for n, group in enumerate(groups_there)] == [True] * 5


def change(table: str, old: Any, new: Any) -> Change:
    return Change("x", table, {}, 1, new, old, 0, "x", None, None)


def test_the_last_change_that_peers_depend_on_is_waited_for() -> None:
    app, member = make_app(), {"room": "r", "user": "u"}
    memberships = peer_memberships(app)
    assert memberships == {"members"}
    joined, left = change("members", None, member), change("members", member, None)
    changes = [((1, 0), joined), ((2, 0), left), ((3, 0), change("members", member, member)), ((4, 0), None)]
    assert last_of_peers(memberships, changes) == (2, 0)
    assert last_of_peers(memberships, [((1, 0), change("guests", None, member))]) is None


async def test_an_indexer_that_is_away_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidewire.services.broadcaster.indexed.INDEX_PATIENCE_S", 0.2)
    backend = FakeBackend(fakeredis.FakeServer(), KEYS)
    looks = 0
    wait = IndexWait(backend, 0)
    position = wait._position

    async def counted() -> tuple[int, int]:
        nonlocal looks
        looks += 1
        return await position()

    monkeypatch.setattr(wait, "_position", counted)
    await wait.until((5, 0))
    assert looks > 1, "it waited"
    for id_ in range(6, 20):
        looks = 0
        await wait.until((id_, 0))
        assert looks == 1, "it looked, and went on"
    await backend.commands.hset(KEYS.partition(0), "indexed", pack(((19, 0), [])))
    await wait.until((19, 0))
    looks = 0
    await wait.until((20, 0))
    assert looks > 1, "it has caught up, and is waited for again"


async def test_members_are_rebuilt_in_small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidewire.services.broadcaster.repair.MEMBERS_BATCH", 10)
    monkeypatch.setattr("tidewire.services.broadcaster.repair.GROUPS_BATCH", 3)
    monkeypatch.setattr("tidewire.services.broadcaster.repair.MAX_COMMIT_BYTES", 100)
    backend, expected = FakeBackend(fakeredis.FakeServer(), KEYS), dict[bytes, set[str]]()
    await backend.open_stage()
    for n in range(8):
        group = group_in(2, n)
        key = KEYS.members("members", group.group)
        await backend.commands.hset(key, pack("gone"), pack({}))
        await backend.commands.zadd(KEYS.values(2, "members"), {b"s" + str(group.group).encode(): 0})
        expected[key] = {f"u{user}" for user in range(n)}
        for user in sorted(expected[key]):
            item = {"room": group.group, "user": user, "note": "x" * 40}
            field = b"s" + user.encode()
            await backend.commands.hset(KEYS.items("members", group.group), field, pack(ItemRecord(1, 1, "x", item)))
            await backend.commands.zadd(KEYS.order("members", group.group), {field: 0})
    pieces = 0
    async for piece in members_as_they_are(make_app(), backend, 2, ["members"]):
        assert 0 < len(piece) <= 3
        pieces += 1
        for command, key, args in piece:
            await backend.calls([(command, key, *args)])
    assert pieces >= 8 / 3 + 28 / 3
    for key, users in expected.items():
        assert {unpack(user) for user in await backend.commands.hkeys(key)} == users
