"""Reads, step by step. No I/O.

A step handles a few records, so that a read can be interrupted. It raises Missing with all facts that the current page
lacks. When these are known, the step is repeated for the records that lacked one.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from tidewire.app import Table, index_field
from tidewire.errors import BadRequest, TooLarge
from tidewire.model.protocol import Edge, Get, Query
from tidewire.model.records import Item, ItemRecord
from tidewire.model.values import ItemKey, prefix_bytes, sort_bytes, tuple_bytes

from .facts import PAGE_BYTES, Fact, Page, PageFact
from .rights import Rights
from .view import Missing, View, same

MAX_SCANNED = 10_000
"""Maximum items that a query skips because its caller may not read them."""
SCAN_BATCH = 1000
"""Items that a query reads in one call once it has skipped a page."""
MAX_SERIAL_RECORDS = 128
MAX_SERIAL_BYTES = 1 << 17
"""Maximum records and bytes of a query in the order of the partition's commands. A larger one is detached."""
STEP_BATCH = 32
"""Records that one step handles."""
MAX_ROUND_FACTS = 4096
"""Maximum facts that a page asks for in one round."""


class NextBatch(Exception):
    """The command must be decided after everything before it is committed."""


class TooFar(TooLarge):
    """A query has skipped too many items."""


class Reading(Protocol):
    """A read in progress. It writes nothing, and can be repeated."""

    @property
    def done(self) -> bool:
        """Whether the result is complete."""

    @property
    def turning(self) -> bool:
        """Whether the next step begins a page.

        Facts about rights must then be fetched anew, so none is older than the page.
        """

    def step(self, view: View, rights: Rights) -> None:
        """Handle some records. Raises Missing, or the RequestError that ends the read."""

    def result(self, view: View) -> dict[str, Any]:
        """Return the answer of a read that is done."""


def reading_of(request: Get | Query, view: View, rights: Rights, *, serial: bool) -> Reading:
    """Begin a read. With `serial`, it raises Missing as `expensive` once it needs more than one small page.

    Raises:
        RequestError: the request is wrong in itself.
    """
    return Lookup(request, view) if isinstance(request, Get) else Scan(request, view, rights, serial=serial)


class Lookup:
    """A `get`."""

    def __init__(self, request: Get, view: View) -> None:
        self._table = view.app[request.table]
        self._key = self._table.parse_key(request.key)
        self._answer: dict[str, Any] | None = None
        self.turning = True

    @property
    def done(self) -> bool:
        return self._answer is not None

    def step(self, view: View, rights: Rights) -> None:
        record = view.record(self._key)
        self.turning = False
        item = rights.readable(self._table, self._key)
        assert record
        self._answer = shown(rights, self._table, item, record)

    def result(self, view: View) -> dict[str, Any]:
        assert self._answer is not None
        return self._answer | {"position": view.position(view.last)}


class Scan:
    """A `query`, page by page."""

    def __init__(self, request: Query, view: View, rights: Rights, *, serial: bool) -> None:
        self._request = request
        self._serial = serial
        self._table = table = view.app[request.table]
        self._attributes: tuple[str, str] | None = None
        self._only: ItemKey | None = None
        if request.index is None:
            partition = table.parse_partition_key(request.key)
            self._partition: Item = {table.key[0]: partition}
            self._order, self._items = view.keys.order(table.name, partition), view.keys.items(table.name, partition)
            if not table.sorted:
                self._only = ItemKey(table.name, partition, None)
        else:
            self._attributes = table.index(request.index)
            rights.keep_hidden(table, self._attributes)
            value = table.parse_index_key(request.index, request.key)
            self._order, self._items = view.keys.index(table.name, self._attributes, value)[::-1]
        self._bounds = _Bounds(request, table, self._attributes)
        self._limit, self._scanned = request.limit + 1, 0
        self._page: Page | None = None
        self._show_next = 0
        self._left: list[int] = []  # records of the page whose readers are not evaluated yet
        self._unresolved: list[int] = []  # records whose readers could not be evaluated for want of a fact
        self._missing: set[Fact] = set()
        self._readable: list[bool] = []
        self._shown: list[dict[str, Any]] = []
        self._size_bytes = 0
        self._last: Item | None = None
        self._following: Any = None
        self._carried: bool | None = None  # whether the caller's connections receive the changes of these items
        self.done = False

    @property
    def turning(self) -> bool:
        return self._page is None

    def step(self, view: View, rights: Rights) -> None:
        if self._page is None:
            self._begin_page(view, rights)
        elif self._left:
            self._judge(view, rights)
        elif self._show_next < len(self._page.records):
            self._show(rights)
        else:
            self._turn()

    def result(self, view: View) -> dict[str, Any]:
        # An index is eventually consistent with its table, so its page claims no position.
        position = view.position(view.last if self._attributes is None else (0, 0))
        result = {"items": self._shown, "next": self._following, "position": position, "key": list(self._table.key)}
        return result if self._carried else result | {"carried": False}

    def _begin_page(self, view: View, rights: Rights) -> None:
        if self._only is not None:
            record = view.record(self._only)
            page = Page([record] if record else [], more=False)
        else:
            low, high = self._bounds.range()
            limit, size_bytes = self._limit, PAGE_BYTES
            if self._serial:
                limit, size_bytes = min(limit, MAX_SERIAL_RECORDS), MAX_SERIAL_BYTES
            page = view.know(PageFact(self._order, self._items, low, high, limit, self._request.reverse, size_bytes))
            if self._serial and page.more and len(page.records) < self._limit:
                raise Missing((), expensive=True)
        if self._carried is None:
            self._carried = self._attributes is not None or self._carries(view, rights, page)
        self._page = page
        self._left, self._show_next = list(range(len(page.records))), 0
        self._readable = [False] * len(page.records)

    def _carries(self, view: View, rights: Rights, page: Page) -> bool:
        """Judge by the first item.

        Without one, by the partition key alone, which names the group or user in most tables.
        """
        items = (view.alive(self._table, record) for record in page.records)
        return rights.carries(self._table, next((item for item in items if item is not None), self._partition))

    def _judge(self, view: View, rights: Rights) -> None:
        """Evaluate which records the user may read. All missing facts of the page are asked for at once."""
        assert self._page
        batch, self._left = self._left[:STEP_BATCH], self._left[STEP_BATCH:]
        for number in batch:
            item = view.alive(self._table, self._page.records[number])
            try:
                self._readable[number] = item is not None and rights.may_read(self._table, item)
            except Missing as need:
                self._missing |= need.facts
                self._unresolved.append(number)
        if self._missing and (not self._left or len(self._missing) > MAX_ROUND_FACTS):
            self._left = self._unresolved + self._left
            missing, self._missing, self._unresolved = self._missing, set(), []
            raise Missing(missing)

    def _show(self, rights: Rights) -> None:
        assert self._page
        for record in self._page.records[self._show_next : self._show_next + STEP_BATCH]:
            number, self._show_next = self._show_next, self._show_next + 1
            item = record.item
            if item is None or not self._readable[number]:
                continue
            entry = shown(rights, self._table, item, record)
            self._size_bytes += len(msgspec.json.encode(entry))
            if self._last is not None and (len(self._shown) == self._request.limit or self._size_bytes > PAGE_BYTES):
                # `next` is made of items that are shown, so it tells of no item that the user may not read.
                self._following = _next(self._table, self._attributes, self._last, item)
                self.done = True
                return
            self._shown.append(entry)
            self._last = item

    def _turn(self) -> None:
        """Continue behind the page."""
        assert self._page
        page, self._page = self._page, None
        self._scanned += len(page.records)
        if not page.more:
            self.done = True
        elif self._scanned > MAX_SCANNED:
            if self._last is None:
                raise TooFar(
                    f"more than {MAX_SCANNED} items lie before the first one that you may read: narrow the query by "
                    "its bounds"
                )
            self._following = _next(self._table, self._attributes, self._last, self._last)
            self.done = True
        elif self._serial:
            raise Missing((), expensive=True)
        else:
            self._bounds.continue_after(page.records[-1])
            self._limit = SCAN_BATCH


def shown(rights: Rights, table: Table, item: Item, record: ItemRecord) -> dict[str, Any]:
    """Return an item as the user of `rights` sees it."""
    visible = table.visible(item, "service" if rights.all else "client")
    return {"item": visible, "version": record.version, "at": record.at, "by": record.by}


class _Bounds:
    """The range of a query, in the bytes of the table's order or of an index. It shrinks page by page."""

    def __init__(self, request: Query, table: Table, attributes: tuple[str, str] | None) -> None:
        """Raise BadRequest for a bound that the table cannot have."""
        self.request = request
        self._table = table
        self._attributes = attributes
        after, before = ((name, getattr(request, name)) for name in ("after", "before"))
        low = [] if after[1] is None else [b"(" + self._edge(*after, past=True)]
        high = [] if before[1] is None else [b"(" + self._edge(*before, past=False)]
        if request.prefix:
            start = sort_bytes(request.prefix) if attributes is None else prefix_bytes(request.prefix)
            low.append(b"[" + start)
            high.append(b"(" + start + b"\xff")  # beyond all of UTF-8
        self._low = max(low, key=lambda bound: bound[1:], default=b"-")
        self._high = min(high, key=lambda bound: bound[1:], default=b"+")

    def range(self) -> tuple[bytes, bytes]:
        """The range as ZRANGEBYLEX takes it."""
        return self._low, self._high

    def continue_after(self, record: ItemRecord) -> None:
        assert record.item is not None, "a tombstone is in no order"
        key = self._table.key_of(record.item)
        edge = b"(" + (key.field if self._attributes is None else index_field(key, record.item, self._attributes))
        if self.request.reverse:
            self._high = edge
        else:
            self._low = edge

    def _edge(self, name: str, edge: Edge, *, past: bool) -> bytes:
        if isinstance(edge, list):
            if self._attributes is None:
                raise BadRequest(f"query: {name} is a sort-key value, not a list")
            parts = (self._attributes[1], *self._table.key)
            if len(edge) != len(parts):
                raise BadRequest(f"query: {name} as a list has the values of {', '.join(map(repr, parts))}")
            return tuple_bytes(*edge)
        assert edge is not None
        if self._attributes is None:
            return sort_bytes(edge)
        return tuple_bytes(edge) + (b"\xff" if past else b"")  # past all entries of that value


def _next(table: Table, attributes: tuple[str, str] | None, last: Item, following: Item) -> Any:
    """Return the sort value at which a page ends. If an index continues with the same value, add the item's key."""
    if attributes is None:
        return last[table.key[1]]
    attribute = attributes[1]
    if not same(last[attribute], following[attribute]):
        return last[attribute]
    return [last[attribute], *(last[name] for name in table.key)]


def read_serially(view: View, rights: Rights, request: Get | Query) -> dict[str, Any]:
    """Read in the order of the partition's commands. Raises NextBatch, Missing or RequestError."""
    reading = reading_of(request, view, rights, serial=True)
    if isinstance(request, Query) and request.index is None:
        table = view.app[request.table]
        group = (table.name, table.parse_partition_key(request.key))
        if table.sorted and any((key.table, key.partition) == group for key in view.written):
            raise NextBatch  # a page is read as it was committed, and must contain the writes before it
    while not reading.done:
        reading.step(view, rights)
    return reading.result(view)
