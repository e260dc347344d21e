"""The rights of a command: reading, writing, following, and what a condition may reveal. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from tidewire.app import Table, Write
from tidewire.audiences import Audience, Reader, resolve
from tidewire.errors import BadRequest, Conflict, NotFound, PermissionDenied, told
from tidewire.model.claims import holds
from tidewire.model.protocol import Condition
from tidewire.model.records import Command, Item
from tidewire.model.values import ItemKey

from .view import Missing, View, same

log = structlog.get_logger(__name__)


class Rights:
    """The rights of the user of one command."""

    def __init__(self, view: View, command: Command) -> None:
        self._view = view
        self._reader = Reader(command.user, command.claims)
        self.all = command.role == "service"

    def may_read(self, table: Table, item: Item) -> bool:
        if self.all:
            return True
        self._view.account.evaluate()
        try:
            audience = resolve(table.readers, item)
        except Exception as error:  # a fault of the application: without an audience, no user reads the item
            log.warning("readers_failed", table=table.name, error=told(error))
            return False
        return audience.admits(item, self._reader, self._view)

    def carries(self, table: Table, item: Item) -> bool:
        """Whether a change of the item reaches the user without following a topic: by the own feed, or to everyone.

        For a service key, the item counts as for any other credential of the user: its role reads, and receives
        nothing.
        """
        if not self.all:
            return table.in_own_feeds
        try:
            recipients = resolve(table.readers, item).recipients(item, self._view, self._reader.user)
        except Missing:
            raise
        except Exception as error:
            log.warning("readers_failed", table=table.name, error=told(error))
            return False
        return holds(recipients.user(self._reader.user), self._reader.claims)

    def may_follow(self, name: str) -> None:
        """Check that the user may follow a topic. Raises NotFound or PermissionDenied."""
        families = self._view.app.families(name)
        if not families:
            raise NotFound(f"there is no topic {name[:200]!r}")
        if not self.all and not all(topic.followers.admits(item, self._reader, self._view) for topic, item in families):
            raise PermissionDenied(f"you may not follow the topic {name[:200]!r}")

    def readable(self, table: Table, key: ItemKey) -> Item:
        """Return a live item. Raises NotFound if there is none, or if the user may not read it."""
        item = self._view.item(table, key)
        if item is None or not self.may_read(table, item):
            raise NotFound(f"there is no such item in table {table.name!r}")
        return item

    def may_write(self, table: Table, old: Item | None, new: Item | None) -> None:
        """Check that the user is among the writers of the old item and of the new one. Raises PermissionDenied."""
        if new is not None:
            _check_readers(table, new)
        if self.all:
            return
        self._view.account.evaluate()
        audience: Audience | bool
        try:
            if isinstance(table.writers, Audience):
                audience = table.writers
            else:
                audience = table.writers(Write(old, new, self._reader.user, dict(self._reader.claims)))
                if not isinstance(audience, bool | Audience):
                    raise TypeError(f"a writers function returns an audience or a bool, not {audience!r}")
        except Exception as error:
            log.warning("writers_failed", table=table.name, error=told(error))
            raise _rules_failed(table) from None
        images = [image for image in (old, new) if image is not None]
        allowed = (
            audience
            if isinstance(audience, bool)
            else all(audience.admits(image, self._reader, self._view) for image in images)
        )
        if not allowed:
            raise PermissionDenied(f"you may not write this item of table {table.name!r}")

    def keep_hidden(self, table: Table, names: Iterable[str]) -> None:
        """Check that a client names no hidden attribute: the answer would reveal its value. Raises PermissionDenied."""
        if not self.all and (hidden := table.hidden.intersection(names)):
            raise PermissionDenied(f"attribute {min(hidden)!r} of table {table.name!r} is for service keys only")

    def check_if_readable(self, table: Table, key: ItemKey, condition: Condition) -> None:
        """Check a condition on an item that the user may read, or that does not exist. On others, check nothing.

        So the answer reveals nothing that `get` would not reveal.
        """
        item = self._view.item(table, key)
        if item is None and not condition.absent and not self.all:
            self.readable(table, key)
        elif self.all or (item is not None and self.may_read(table, item)):
            self.check(table, key, condition)

    def check(self, table: Table, key: ItemKey, condition: Condition | None) -> None:
        """Check a condition. Raises Conflict, with the version of the item if the user may read it."""
        if condition is None:
            return
        record = self._view.record(key)
        item = self._view.alive(table, record)
        if condition.equals is not None:
            self.keep_hidden(table, condition.equals)
        may_know = record is not None and item is not None and self.may_read(table, item)
        if item is not None and not may_know and (condition.version is not None or condition.equals is not None):
            holds = False  # a user who may write, but not read, must not find out the item by guessing
        elif condition.version is not None:
            holds = record is not None and item is not None and record.version == condition.version
        elif condition.equals is not None:
            holds = item is not None and all(
                name in item and same(item[name], value) for name, value in condition.equals.items()
            )
        else:
            holds = (item is None) == bool(condition.absent)
        if not holds:
            details = {"version": record.version} if may_know and record else {}
            raise Conflict("the item is not as `if` says it must be", **details)


def _check_readers(table: Table, new: Item) -> None:
    try:
        resolve(table.readers, new)
    except Exception as error:
        log.warning("readers_failed", table=table.name, error=told(error))
        raise _rules_failed(table) from None


def _rules_failed(table: Table) -> BadRequest:
    return BadRequest(
        f"the rules of table {table.name!r} cannot be applied to this item: a function of the application failed; "
        "the store's log says where"
    )
