"""The state of an import: the rows read, the rows under way, and the line up to which all are done. Pure.

Rows go to the stores in parcels, one at a time to each partition. So the later of two lines about one item wins, even
if a parcel is sent again.
"""

from __future__ import annotations

import codecs
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from tidewire.app import CONNECTIONS, Table
from tidewire.errors import BadRequest
from tidewire.model.protocol import fault_in, float_of
from tidewire.model.records import Item
from tidewire.redis.keys import Keys

PARCEL_ITEMS = 250
PARCEL_BYTES = 1 << 18
LARGEST_LINE = 64 << 20


class Line(msgspec.Struct):
    """The fields that a line must have. Others, such as those an export adds, are ignored."""

    table: str
    item: dict[str, Any]


class Row(NamedTuple):
    line: int  # line number in the file, from 1
    table: str
    item: Item
    size_bytes: int


class Fault(NamedTuple):
    line: int
    what: str


class Ledger:
    """The lines of one file, without the first `skip`."""

    def __init__(self, tables: Mapping[str, Table], keys: Keys, skip: int = 0) -> None:
        self.read = 0
        self.items = 0  # lines that are done
        self.read_bytes = 0
        self.waiting_bytes = 0
        self.fault: Fault | None = None
        self._tables = tables
        self._keys = keys
        self._skip = skip
        self._rows: dict[int, deque[Row]] = defaultdict(deque)  # by partition, in the order of the lines
        self._decoder = msgspec.json.Decoder(Line, float_hook=float_of)

    @property
    def done(self) -> int:
        """How many lines at the start of the file are certainly done."""
        first = min((rows[0].line for rows in self._rows.values() if rows), default=self.read + 1)
        return (min(first, self.fault.line) if self.fault else first) - 1

    @property
    def done_bytes(self) -> int:
        return self.read_bytes - self.waiting_bytes

    def take(self, raw: bytes) -> int | None:
        """Take the next line, and return the partition that gained a row.

        None if the line is skipped, blank or faulty.
        """
        self.read += 1
        self.read_bytes += len(raw) + 1
        if self.read == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)  # editors and spreadsheets on Windows write a byte-order mark
        if self.read <= self._skip or not raw.strip():
            return None
        if len(raw) > LARGEST_LINE:
            self.refuse(self.read, f"the line has more than {LARGEST_LINE:,} bytes")
            return None
        try:
            line = self._decoder.decode(raw)
            partition = self._partition_of(line)
        except (msgspec.ValidationError, BadRequest) as error:
            self.refuse(self.read, str(error))
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.refuse(self.read, f"the line is not JSON: {error}")
            return None
        self._rows[partition].append(Row(self.read, line.table, line.item, len(raw)))
        self.waiting_bytes += len(raw)
        return partition

    def _partition_of(self, line: Line) -> int:
        if line.table == CONNECTIONS:
            raise BadRequest("only gateways write the table connections")
        table = self._tables.get(line.table)
        if table is None:
            raise BadRequest(f"there is no table {line.table!r}: there are {', '.join(self._tables) or 'none'}")
        if fault := fault_in(line.item):
            raise BadRequest(f"the item has {fault}")
        return self._keys.partition_of(table.key_of(line.item).partition)

    def parcel(self, partition: int) -> list[Row]:
        """Return the next rows for a partition. They stay the same until they are marked done, or one is refused."""
        rows, size = list[Row](), 0
        for row in self._rows.get(partition, ()):
            size += row.size_bytes
            if rows and (len(rows) == PARCEL_ITEMS or size > PARCEL_BYTES):
                break
            rows.append(row)
        return rows

    def tell_done(self, partition: int, parcel: list[Row]) -> None:
        rows, last = self._rows[partition], parcel[-1].line
        while rows and rows[0].line <= last:
            self.waiting_bytes -= rows.popleft().size_bytes
        self.items += len(parcel)

    def refuse(self, line: int, what: str) -> None:
        """End the import before this line, unless it ends before an earlier one. The lines before it are still sent."""
        if self.fault and self.fault.line <= line:
            return
        self.fault = Fault(line, what)
        for rows in self._rows.values():
            while rows and rows[-1].line >= line:
                self.waiting_bytes -= rows.pop().size_bytes
