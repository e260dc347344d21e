"""Writes: what a `put`, `update`, `delete` or `transact` does to a view of the partition. No I/O.

Each function checks the rights of the author, the condition and the schema, and then has the view write the item. It
raises a RequestError, after which nothing that the request did counts.
"""

from __future__ import annotations

from typing import Any

from tidewire.app import CONNECTIONS, Table
from tidewire.errors import BadRequest, PermissionDenied
from tidewire.model.protocol import Check, Delete, Put, Send, Transact, Update, parse_operations, within_operation
from tidewire.model.records import Item
from tidewire.model.values import ItemKey

from .appending import append_change
from .facts import ItemFact
from .rights import Rights
from .updates import apply_update, check_values, touched
from .view import Author, Gaps, View, same


def write(view: View, author: Author, rights: Rights, request: Put | Update | Delete) -> dict[str, Any]:
    """Do one write, and return its result."""
    table = view.app[request.table]
    match request:
        case Put():
            return put(view, author, rights, table, request)
        case Update():
            return update(view, author, rights, table, request)
        case Delete():
            return delete(view, author, rights, table, request)


def put(view: View, author: Author, rights: Rights, table: Table, request: Put) -> dict[str, Any]:
    """Replace an item. Its hidden attributes stay, unless a service key replaces it."""
    key = table.key_of(request.item)
    old = view.item(table, key)
    rights.keep_hidden(table, request.item)
    new = dict(request.item)
    if old and not rights.all:
        # A client does not see hidden attributes, so it cannot send them back.
        new = {name: value for name, value in old.items() if name in table.hidden} | new
    rights.may_write(table, old, new)
    rights.check(table, key, request.condition)
    new = table.validate(new)
    return _written(view, author, table, key, new)


def update(view: View, author: Author, rights: Rights, table: Table, request: Update) -> dict[str, Any]:
    """Change parts of an item. The result has the item if the author may read it."""
    key = table.parse_key(request.key)
    old = rights.readable(table, key)
    rights.keep_hidden(table, touched(request))
    new = apply_update(old, request)
    check_values(request)
    if table.key_of(new) != key:
        raise BadRequest(f"update: the key of an item cannot change: {_differing(table, new, key)}")
    rights.may_write(table, old, new)
    rights.check(table, key, request.condition)
    new = table.validate(new)
    result = _written(view, author, table, key, new)
    if rights.may_read(table, new):
        result["item"] = table.visible(new, "service" if rights.all else "client")
    return result


def delete(view: View, author: Author, rights: Rights, table: Table, request: Delete) -> dict[str, Any]:
    """Delete an item."""
    key = table.parse_key(request.key)
    old = rights.readable(table, key)
    rights.may_write(table, old, None)
    rights.check(table, key, request.condition)
    return _written(view, author, table, key, None)


def _written(view: View, author: Author, table: Table, key: ItemKey, new: Item | None) -> dict[str, Any]:
    version, position = append_change(view, author, table, key, new)
    return {"key": table.key_object(key), "version": version, "position": position}


def transact(view: View, author: Author, rights: Rights, request: Transact) -> dict[str, Any]:
    """Do all operations or none. Each sees the effects of those before it. An error names its operation."""
    operations = parse_operations(request)
    keys: list[ItemKey] = []
    for number, operation in enumerate(operations):
        with within_operation(number):
            keys.append(_key_of(view, operation))
    for number, key in enumerate(keys):
        if keys.index(key) != number:
            raise BadRequest(f"transact: operations {keys.index(key)} and {number} are about the same item")
        if not same(key.partition, keys[0].partition):
            raise BadRequest(
                f"transact: operations 0 and {number} have the partition keys {keys[0].partition!r} and "
                f"{key.partition!r}; all must have the same"
            )
    view.need(ItemFact(key) for key in keys)
    gaps = Gaps()
    for number, (operation, key) in enumerate(zip(operations, keys, strict=True)):
        # Checks come first, before images are built. No other operation is about the same item, so a condition that
        # fails now fails in any order. The condition of a write comes after the right to write, which needs the images.
        if isinstance(operation, Check):
            with gaps, within_operation(number):
                rights.check_if_readable(view.app[operation.table], key, operation.condition)
    gaps.close()
    results = []
    for number, (operation, key) in enumerate(zip(operations, keys, strict=True)):
        with gaps, within_operation(number):
            view.account.check()
            if isinstance(operation, Check):
                results.append(_checked(view, rights, operation, key))
            else:
                results.append(write(view, author, rights, operation))
    gaps.close()
    return {"results": results}


def _checked(view: View, rights: Rights, request: Check, key: ItemKey) -> dict[str, Any]:
    table = view.app[request.table]
    item, condition = view.item(table, key), request.condition
    if not (rights.all or condition.absent or (item is not None and rights.may_read(table, item))):
        rights.readable(table, key)
    if condition.absent and not rights.all and (item is None or not rights.may_read(table, item)):
        # An author who may not read the item learns whether it exists only if it may be written.
        rights.may_write(table, item, None)
    rights.check(table, key, condition)
    record = view.record(key)
    version = record.version if record and record.item is not None else 0
    return {"key": table.key_object(key), "version": version, "position": view.position(view.last_id)}


def _key_of(view: View, request: Put | Update | Delete | Check) -> ItemKey:
    table = view.app[request.table]
    if table.name == CONNECTIONS:
        raise PermissionDenied("only gateways write the table connections")
    return table.key_of(request.item) if isinstance(request, Put) else table.parse_key(request.key)


def _differing(table: Table, item: Item, key: ItemKey) -> str:
    """Name the first key attribute whose value differs in the item."""
    return next(repr(name) for name, value in table.key_object(key).items() if not same(item[name], value))


def grows(request: object) -> bool:
    """Whether a request makes Redis hold more. Deletes do not, and the gateways' items of connections are exempt."""
    match request:
        case Put(table=table) | Update(table=table):
            return table != CONNECTIONS
        case Transact(operations=operations):
            return any(operation.get("action") in ("put", "update") for operation in operations)
        case Send():
            return True
    return False
