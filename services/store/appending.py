"""Appends changes to a view: an item's new record, its change, and everything that is kept beside it. No I/O."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from tidewire.app import CONNECTIONS, Membership, Table
from tidewire.errors import BadRequest, item_too_large
from tidewire.model.records import Change, Item, ItemRecord, Opened, pack
from tidewire.model.values import ItemKey, Scalar, name_of
from tidewire.redis.functions import RedisCommand
from tidewire.visibility import visibility

from .facts import KindFact, Page, PageFact
from .view import Author, Gaps, View, same

log = structlog.get_logger(__name__)

MAX_PLAUSIBLE_EXPIRY_S = 10**11
"""Largest plausible expiry, in seconds since 1970: the year 5138. Present times in milliseconds are above it."""
_warned_of_ms: set[str] = set()
"""Tables for which this process has warned of a larger expiry."""
OPENED_ITEMS = 100
OPENED_BYTES = 65536
"""Maximum items, and bytes of them, that a membership's change carries for the broadcaster to compare."""
EXPIRY = Author("tidewire:expiry")
"""The author of the REMOVE of an expired item."""


def append_change(view: View, author: Author, table: Table, key: ItemKey, new: Item | None) -> tuple[int, str]:
    """Append one item's change, with everything kept beside the item, and return (version, position).

    An equal item makes no change. An expired item gets its REMOVE first.

    Raises:
        TooLarge: the item exceeds the limit.
        BadRequest: the sort key is of another kind than those of the table.
    """
    record = view.record(key)
    if record and record.item is not None and author is not EXPIRY and view.alive(table, record) is None:
        append_change(view, EXPIRY, table, key, None)
        record = view.record(key)
    old = record.item if record else None
    version = record.version if record else view.situation.floor
    if (new is None and old is None) or (new is not None and old is not None and same(old, new)):
        return version, view.position(view.last_id)
    if new is not None:
        _check_size(view, new)
        if old is None and key.sort is not None:
            _check_kind(view, table, key.sort)
    version += 1
    event = "REMOVE" if new is None else "INSERT" if old is None else "MODIFY"
    id_ = _append(
        view,
        author,
        event=event,
        table=table.name,
        key=table.key_object(key),
        version=version,
        new=new,
        old=old,
        opens=_opens(view, table, key, old, new) if isinstance(table, Membership) else None,
    )
    written = ItemRecord(version, view.situation.now, author.user, new)
    packed = pack(written)
    view.account.add_bytes(len(packed))
    view.effects.items[key] = written
    view.effects.operations.append(RedisCommand("HSET", view.keys.items(key.table, key.partition), (key.field, packed)))
    if isinstance(table, Membership):
        _keep_group(view, table, key, old, new, id_)
    if event != "MODIFY":
        _keep_order(view, table, key, record, id_, live=new is not None)
    if table.expires:
        _keep_expiry(view, table, key, old, new)
    if table.name == CONNECTIONS:
        _keep_connection(view, key, old, new)
    return version, view.position(id_)


def append_message(view: View, author: Author, user: str, body: Any) -> None:
    """Append a message to a user: a change without a table, whose audience is that user."""
    _append(view, author, event="SEND", table="", key={"user": user}, version=0, new={"body": body}, old=None)


def _append(view: View, author: Author, **of_the_change: Any) -> tuple[int, int]:
    """Append a change with these fields, and those that tell when, by whom and after which change. Returns its id."""
    id_ = view.next_id()
    change = Change(
        **of_the_change,
        at=view.situation.now,
        by=author.user,
        connection=author.connection,
        request=author.request,
        trace=author.trace,
        generation=view.situation.generation,
        previous=view.last_id,
    )
    view.effects.changes.append((id_, change))
    return id_


def _opens(view: View, membership: Membership, key: ItemKey, old: Item | None, new: Item | None) -> list[Opened] | None:
    """Return the items whose visibility to the member may change, as they are now."""
    found: list[Opened] = []
    gaps = Gaps()
    for table in visibility(view.app, membership, old, new).compare:
        with gaps:
            found.append(_opened(view, table, key))
    gaps.close()
    return found or None


def _opened(view: View, table: Table, membership: ItemKey) -> Opened:
    group = membership.partition
    if not view.open_items:
        return Opened(table.name, [], whole=False)
    records: dict[ItemKey, ItemRecord | None] = {}
    more = False
    if table.sorted:
        order, items = view.keys.order(table.name, group), view.keys.items(table.name, group)
        page: Page = view.know(PageFact(order, items, b"-", b"+", OPENED_ITEMS, reverse=True, size_bytes=OPENED_BYTES))
        records = {table.key_of(record.item): record for record in page.records if record.item is not None}
        more = page.more
        for written in (view.written, view.effects.items):
            records |= {
                key: record for key, record in written.items() if (key.table, key.partition) == (table.name, group)
            }
    else:
        only = ItemKey(table.name, group, None)
        records = {only: view.record(only)}
    records.pop(membership, None)
    alive = [(key, record) for key, record in records.items() if record and view.alive(table, record) is not None]
    alive.sort(key=lambda one: one[0].field, reverse=True)
    kept: list[ItemRecord] = []
    size_bytes = 0
    for _, record in alive:
        size_bytes += len(pack(record))
        if len(kept) == OPENED_ITEMS or size_bytes > OPENED_BYTES:
            more = True
            break
        kept.append(record)
    return Opened(table.name, kept, whole=not more)


def _keep_order(
    view: View, table: Table, key: ItemKey, record: ItemRecord | None, id_: tuple[int, int], *, live: bool
) -> None:
    """Keep the order of items, the list of partition-key values, and the remembered versions."""
    operations, partition = view.effects.operations, view.situation.partition
    if table.sorted:
        order = view.keys.order(key.table, key.partition)
        operations.append(
            RedisCommand("ZADD", order, ("0", key.field)) if live else RedisCommand("ZREM", order, (key.field,))
        )
    if not live:
        # The id of a connection is never used again, so its version need not be remembered.
        since = 0 if table.name == CONNECTIONS else id_[0]
        operations.append(RedisCommand("ZADD", view.keys.tombstones(partition), (since, member_of(key))))
    elif record is None:
        operations.append(RedisCommand("ZADD", view.keys.values(partition, table.name), ("0", name_of(key.partition))))
    else:
        operations.append(RedisCommand("ZREM", view.keys.tombstones(partition), (member_of(key),)))


def _keep_group(
    view: View, table: Membership, key: ItemKey, old: Item | None, new: Item | None, id_: tuple[int, int]
) -> None:
    """Note the group's version. If the member may lose topics, have its gateways recheck at once."""
    situation, keys = view.situation, view.keys
    version = b"%d-%d-%d" % (situation.generation, *id_)
    field = keys.group_field(table.name, key.partition)
    view.effects.operations.append(RedisCommand("HSET", keys.group_versions(situation.partition), (field, version)))
    if visibility(view.app, table, old, new).topics:
        channel = keys.rechecks(situation.partition)
        view.effects.operations.append(RedisCommand("SPUBLISH", channel, (str(key.sort),)))


def _keep_expiry(view: View, table: Table, key: ItemKey, old: Item | None, new: Item | None) -> None:
    before, after = (expiry_of(table, image) for image in (old, new))
    if before == after:
        return
    view.effects.operations.append(keep_expiry(view.keys.expiries(view.situation.partition), key, after))


def _keep_connection(view: View, key: ItemKey, old: Item | None, new: Item | None) -> None:
    """Keep the connection in the set of its gateway, for the sweep if that dies."""
    if old is not None:
        forget_connection(view, str(old.get("gateway")), key)
    if new is not None:
        connected = view.keys.connected(view.situation.partition, str(new.get("gateway")))
        view.effects.operations.append(RedisCommand("SADD", connected, (pack((key.partition, key.sort)),)))


def forget_connection(view: View, gateway: str, key: ItemKey) -> None:
    connected = view.keys.connected(view.situation.partition, gateway)
    view.effects.operations.append(RedisCommand("SREM", connected, (pack((key.partition, key.sort)),)))


def _check_size(view: View, item: Item) -> None:
    limit = view.situation.item_bytes
    size = len(msgspec.json.encode(item)) if limit else 0
    if size > limit:
        raise item_too_large(size, limit)


def _check_kind(view: View, table: Table, sort: Scalar) -> None:
    """Check that the sort key is of the kind of the table, which the application declares or its first item decides."""
    kind = "s" if isinstance(sort, str) else "n"
    names = {"s": "string", "n": "number"}
    if table.sort not in (None, names[kind]):
        raise BadRequest(
            f"key attribute {table.key[1]!r} of table {table.name!r} must be a {table.sort}, as the application "
            f"declares; this one is a {names[kind]}"
        )
    known: str | None = (
        view.effects.kinds.get(table.name)
        or view.settled.get(table.name)
        or view.situation.kinds.get(table.name)
        or view.know(KindFact(table.name))
    )
    if known is None:
        known = view.effects.kinds[table.name] = kind
    if known != kind:
        raise BadRequest(
            f"key attribute {table.key[1]!r} of table {table.name!r} must be a {names[known]}, "
            f"as that of its first item; this one is a {names[kind]}"
        )


def member_of(key: ItemKey) -> bytes:
    """Return the member for an item in the sets of a partition."""
    return pack([key.table, key.partition, key.sort])


def keep_expiry(expiries: bytes, key: ItemKey, at: float | None) -> RedisCommand:
    """Return the command that notes when an item expires."""
    member = member_of(key)
    return (
        RedisCommand("ZREM", expiries, (member,)) if at is None else RedisCommand("ZADD", expiries, (repr(at), member))
    )


def expiry_of(table: Table, item: Item | None) -> float | None:
    """Return when an item expires, in seconds since 1970; None for never."""
    at = item.get(table.expires) if item and table.expires else None
    if not isinstance(at, int | float) or isinstance(at, bool):
        return None
    if at > MAX_PLAUSIBLE_EXPIRY_S and table.name not in _warned_of_ms:
        _warned_of_ms.add(table.name)
        log.warning(
            "expiry_looks_like_ms",
            table=table.name,
            attribute=table.expires,
            value=at,
            advice="the attribute counts seconds since 1970: divide milliseconds by 1000",
        )
    return at
