"""The members of groups, as the broadcaster of one partition knows them: bounded caches over Redis.

The cache of a group of this partition follows the changes that pass, and nothing else changes it. A group of another
partition is cached with its version, generation and id of its last change, which the store writes in the same commit.
The broadcaster reads the versions once for each batch, and a group's items only if the version differs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from tidewire.app import BY_MEMBER, App
from tidewire.model.records import ItemRecord, pack, unpack
from tidewire.model.values import Scalar
from tidewire.redis.backend import Backend
from tidewire.redis.functions import Arg

from .decide import Group, GroupMembers, GroupsOf

MAX_MEMBERS_CACHED = 50_000
"""Maximum members, over all groups, in each cache of a partition. Beyond it, the least recently used group is evicted.

The weight of a group is its number of members, or the size of their items in KiB if that is more. There are two caches:
one for groups of the partition itself, and one for groups of others."""
SAMPLE = 16
"""Members of a group whose items are measured to estimate the size of all."""

Need = Group | GroupsOf


class Snapshot(NamedTuple):
    """A group of another partition, with its version."""

    version: bytes
    members: GroupMembers


V = TypeVar("V")


def weight_of(members: GroupMembers) -> int:
    """Return the number of members, or the estimated KiB of their items if that is more."""
    if not members:
        return 0
    sample = list(islice(members.values(), 0, None, -(-len(members) // SAMPLE)))
    size_bytes = sum(len(pack(item)) for item in sample)
    return max(len(members), len(members) * size_bytes // (1024 * len(sample)))


class GroupCache(Mapping[Group, V], Generic[V]):
    """A cache of groups by last use. `weight` returns the weight of a group, as `weight_of` does."""

    def __init__(self, weight: Callable[[V], int], most: int = MAX_MEMBERS_CACHED) -> None:
        self._weight = weight
        self._most = most
        self._groups: OrderedDict[Group, V] = OrderedDict()
        self._weights: dict[Group, int] = {}
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
        """Cache a group. The newest one stays, whatever its size."""
        self.drop(group)
        self._groups[group] = value
        self._weights[group] = 1 + self._weight(value)
        self.held += self._weights[group]
        while self.held > self._most and len(self._groups) > 1:
            self.drop(next(iter(self._groups)))

    def drop(self, group: Group) -> None:
        if self._groups.pop(group, None) is not None:
            self.held -= self._weights.pop(group)

    def clear(self) -> None:
        self._groups.clear()
        self._weights.clear()
        self.held = 0


class KnownGroups(Mapping[Need, Any]):
    """The groups that one decision knows: those fetched for it, over the cached ones."""

    def __init__(self, cached: Mapping[Group, GroupMembers]) -> None:
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
    """The known groups of a partition's broadcaster, from one batch to the next."""

    def __init__(self, app: App, backend: Backend, partition: int) -> None:
        self._app = app
        self._backend = backend
        self._partition = partition
        self._own: GroupCache[GroupMembers] = GroupCache(weight_of)
        self._others: GroupCache[Snapshot] = GroupCache(lambda snapshot: weight_of(snapshot.members))

    def begin(self) -> KnownGroups:
        """Return what the next decision knows without fetching."""
        return KnownGroups(self._own)

    def keep(self, known: KnownGroups, changed: Mapping[Group, GroupMembers]) -> None:
        """After a commit, cache the groups that were fetched for the decision, and those that it changed."""
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
        """Fetch what a decision lacks, in one round trip, and a second one for changed groups of other partitions.

        `versioned` says that every store notes the versions of groups. Otherwise no group of another partition is
        cached.
        """
        wanted = list(needs)
        # Looked up before the first answer is cached, which may evict one of these.
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
        """Return the commands for a need. `fetch` reads their answers in this order."""
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
        # The version is read before the items. If it is older than they are, the group is read once more. A newer one
        # would leave the cache stale.
        return [version] if need in self._others else [version, self._items(need)]

    def _items(self, group: Group) -> tuple[Arg, ...]:
        """Return the command for a group's items.

        The members that the other broadcaster has passed would be older: a user who receives a membership may query at
        once, and must then receive every change.
        """
        return "HGETALL", self._backend.keys.items(group.membership, group.group)

    def _snapshot(self, group: Group, version: bytes | None, raw: Any) -> GroupMembers:
        table = self._app[group.membership]
        items = [ItemRecord(*unpack(record)).item for _, record in _pairs(raw)]
        members: GroupMembers = {item[table.key[1]]: item for item in items if item is not None}
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
    """Iterate over a hash in the form of RESP3 or RESP2."""
    return raw.items() if isinstance(raw, Mapping) else zip(raw[::2], raw[1::2], strict=True)
