"""Members of groups, as the broadcaster of one partition knows them: bounded caches over what Redis holds.

A group of this partition is cached as its changes have passed; nobody else changes it. A group of another partition is
cached together with its version, the id of its last change, which the store writes in the same commit. The broadcaster
asks for the versions once a batch, and reads a group's items again only when its version is another one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from tidewire.app import BY_MEMBER, App
from tidewire.model.records import ItemRecord, unpack
from tidewire.model.values import Scalar
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Arg

from .decide import Group, GroupsOf, Members

MAX_MEMBERS_CACHED = 50_000
"""Members, over all groups, that the owner of a partition keeps in memory. Beyond, it evicts the group unused longest.

Each of the two caches has this bound: one for groups of the partition itself, one for groups of others."""

Need = Group | GroupsOf


class Snapshot(NamedTuple):
    """A group of another partition, as of a version."""

    version: bytes
    members: Members


V = TypeVar("V")


class GroupCache(Mapping[Group, V], Generic[V]):
    """Groups by last use. Costs nothing for groups that nobody asks for. `size` counts what a group takes."""

    def __init__(self, size: Callable[[V], int], most: int = MAX_MEMBERS_CACHED) -> None:
        self._size = size
        self._most = most
        self._groups: OrderedDict[Group, V] = OrderedDict()
        self.held = 0

    def __getitem__(self, group: Group) -> V:
        found = self._groups[group]
        self._groups.move_to_end(group)
        return found

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def put(self, group: Group, value: V) -> None:
        """Keep the group as it is now. The newest one stays, however large it is."""
        self.drop(group)
        self._groups[group] = value
        self.held += self._cost(value)
        while self.held > self._most and len(self._groups) > 1:
            self.drop(next(iter(self._groups)))

    def drop(self, group: Group) -> None:
        before = self._groups.pop(group, None)
        if before is not None:
            self.held -= self._cost(before)

    def clear(self) -> None:
        self._groups.clear()
        self.held = 0

    def _cost(self, value: V) -> int:
        return 1 + self._size(value)


class Known(Mapping[Need, Any]):
    """What one decision knows: what was fetched for it, over the cached groups."""

    def __init__(self, cached: Mapping[Group, Members]) -> None:
        self.fetched: dict[Need, Any] = {}
        self._cached = cached

    def __getitem__(self, need: Need) -> Any:
        if need in self.fetched:
            return self.fetched[need]
        if isinstance(need, Group):
            return self._cached[need]
        raise KeyError(need)

    def __iter__(self) -> Iterator[Need]:
        yield from self.fetched
        yield from (group for group in self._cached if group not in self.fetched)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Groups:
    """What one partition's broadcaster knows of groups, from one batch to the next."""

    def __init__(self, app: App, backend: Backend, partition: int) -> None:
        self._app = app
        self._backend = backend
        self._partition = partition
        self._own: GroupCache[Members] = GroupCache(len)
        self._others: GroupCache[Snapshot] = GroupCache(lambda snapshot: len(snapshot.members))

    def begin(self) -> Known:
        """What the next decision may know without asking."""
        return Known(self._own)

    def keep(self, known: Known, changed: Mapping[Group, Members]) -> None:
        """After a commit: keep what was fetched for the decision, and the groups that it changed."""
        for need, value in known.fetched.items():
            if isinstance(need, Group) and self._is_here(need):
                self._own.put(need, value)
        for group, members in changed.items():
            self._own.put(group, members)

    def forget(self) -> None:
        self._own.clear()

    def _is_here(self, group: Group) -> bool:
        return self._backend.keys.partition_of(group.group) == self._partition

    async def fetch(self, needs: Iterable[Need], *, versioned: bool) -> dict[Need, Any]:
        """What a decision lacks, in one round trip, and one more where groups of other partitions have changed.

        `versioned` says that every store notes the versions of groups. If not, no group of another partition is cached.
        """
        wanted = list(needs)
        # Looked up before the first answer is kept: that may evict another one of these.
        cached = {need: self._others.get(need) for need in wanted if isinstance(need, Group)}
        calls = [call for need in wanted for call in self._calls(need, versioned=versioned)]
        answers = iter(await self._backend.calls(calls))
        found: dict[Need, Any] = {}
        changed: dict[Group, bytes | None] = {}
        for need in wanted:
            if isinstance(need, GroupsOf):
                found[need] = self._groups_of(need, next(answers))
            elif self._is_here(need):
                found[need] = {unpack(user): unpack(item) for user, item in _pairs(next(answers))}
            else:
                version, snapshot = next(answers) if versioned else None, cached[need]
                if not versioned or snapshot is None:
                    found[need] = self._snapshot(need, version, next(answers))
                elif version == snapshot.version:
                    found[need] = snapshot.members
                else:
                    changed[need] = version
        reads = await self._backend.calls([self._items(group) for group in changed]) if changed else ()
        for (group, version), items in zip(changed.items(), reads, strict=True):
            found[group] = self._snapshot(group, version, items)
        return found

    def _calls(self, need: Need, *, versioned: bool) -> list[tuple[Arg, ...]]:
        """Commands whose answers `fetch` reads in this order."""
        keys = self._backend.keys
        if isinstance(need, GroupsOf):
            table = self._app[need.membership]
            items, _ = keys.index(table.name, table.index(BY_MEMBER), need.user)
            return [("HVALS", items)]
        if self._is_here(need):
            return [("HGETALL", keys.members(need.membership, need.group))]
        if not versioned:
            return [self._items(need)]
        versions = keys.group_versions(keys.partition_of(need.group))
        version: tuple[Arg, ...] = ("HGET", versions, keys.group_field(need.membership, need.group))
        # The version first: with newer items it costs another read. A version that is newer than the items would leave
        # the cache stale.
        return [version] if need in self._others else [version, self._items(need)]

    def _items(self, group: Group) -> tuple[Arg, ...]:
        """Items, not what the other broadcaster has passed: who is told of a membership may query at once, and must
        then hear of every change, though that broadcaster has yet to commit."""
        return "HGETALL", self._backend.keys.items(group.membership, group.group)

    def _snapshot(self, group: Group, version: bytes | None, raw: Any) -> Members:
        table = self._app[group.membership]
        items = [ItemRecord(*unpack(record)).item for _, record in _pairs(raw)]
        members: Members = {item[table.key[1]]: item for item in items if item is not None}
        if version is None:
            self._others.drop(group)
        else:
            self._others.put(group, Snapshot(version, members))
        return members

    def _groups_of(self, need: GroupsOf, raw: Iterable[bytes]) -> list[Scalar]:
        table = self._app[need.membership]
        records = [ItemRecord(*unpack(one)) for one in raw]
        return [table.key_of(record.item).partition for record in records if record.item is not None]


def _pairs(raw: Any) -> Iterable[tuple[bytes, bytes]]:
    """A hash as RESP3 or RESP2 gives it."""
    return raw.items() if isinstance(raw, Mapping) else zip(raw[::2], raw[1::2], strict=True)
