"""Commands on many items, which only services give: the sweep of a dead gateway, and the parcels of an import.

No I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tidewire.app import CONNECTIONS
from tidewire.errors import Overloaded, PermissionDenied, RequestError
from tidewire.model.records import Command, Item
from tidewire.model.values import ItemKey

from .appending import append_change, forget_connection
from .facts import ConnectedFact, ItemFact
from .rights import Rights
from .view import Author, Gaps, View

SWEEP = "sweep"
"""Action of a gateway: delete the connections of a dead gateway."""
LOAD = "load"
"""Action of an import: write many items of one partition."""


def sweep(view: View, command: Command) -> int:
    """Delete connections of a dead gateway. Returns how many there were in this round."""
    service_only(command)
    gateway, table = command.body["gateway"], view.app[CONNECTIONS]
    connected: list[tuple[str, str]] = view.know(ConnectedFact(gateway))
    keys = [ItemKey(CONNECTIONS, user, connection) for user, connection in connected]
    view.need(ItemFact(key) for key in keys)
    gaps = Gaps()
    for key in keys:
        with gaps:
            if view.item(table, key):
                append_change(view, Author(command.user), table, key, None)
            else:
                forget_connection(view, gateway, key)
    gaps.close()
    return len(connected)


def load(view: View, command: Command) -> int:
    """Write many items of this partition, all or none, and return how many. Each is checked like any write.

    `items` is a list of [table, item]. The details of an error have the number of the item.
    """
    service_only(command)
    if view.situation.full:
        raise Overloaded(view.situation.full)
    author, rights, keys = Author(command.user), Rights(view, command), []
    rows: list[tuple[str, Item]] = command.body["items"]
    for number, (name, item) in enumerate(rows):
        with _place(number):
            if name == CONNECTIONS:
                raise PermissionDenied("only gateways write the table connections")
            keys.append(view.app[name].key_of(item))
    view.need(ItemFact(key) for key in keys)
    view.open_items = False  # else each of a thousand memberships would carry the same items
    gaps = Gaps()
    try:
        for number, ((name, item), key) in enumerate(zip(rows, keys, strict=True)):
            with gaps, _place(number):
                table = view.app[name]
                rights.may_write(table, None, item)
                append_change(view, author, table, key, table.validate(item))
    finally:
        view.open_items = True
    gaps.close()
    return len(rows)


def service_only(command: Command) -> None:
    """Raise PermissionDenied unless the command has the rights of a service key."""
    if command.role != "service":
        raise PermissionDenied(f"{command.action} is for service keys only")


@contextmanager
def _place(number: int) -> Iterator[None]:
    """Add the number of an item to the details of the errors that the block raises."""
    try:
        yield
    except RequestError as error:
        error.details = error.details | {"item": number}
        raise
