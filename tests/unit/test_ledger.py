"""What an import has read, and up to which line all is done."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.app import App
from tidewire.redis.keys import Keys
from tidewire.services.cli.ledger import PARCEL_BYTES, PARCEL_ITEMS, Ledger

KEYS = Keys("dev", 3)


def ledger(skip: int = 0) -> Ledger:
    app = App("notes")
    app.table("notes", key="id")
    return Ledger(app.tables, KEYS, skip)


def line(id_: Any, **fields: Any) -> bytes:
    return json.dumps({"table": "notes", "item": {"id": id_} | fields}).encode()


@given(st.lists(st.integers(0, 20), max_size=40), st.data())
def test_whatever_is_done_first_no_line_counts_before_it_is_done(ids: list[int], data: st.DataObject) -> None:
    book, done, last = ledger(), set[int](), dict[int, int]()
    for id_ in ids:
        book.take(line(id_))
    while waiting := [partition for partition in range(3) if book.parcel(partition)]:
        partition = data.draw(st.sampled_from(waiting))
        parcel = book.parcel(partition)
        if data.draw(st.booleans()):
            continue  # it was not answered: the same comes again
        if data.draw(st.integers(0, 9)) == 0:
            book.refuse(data.draw(st.sampled_from(parcel)).line, "wrong")
            continue
        for row in parcel:
            assert last.get(row.item["id"], 0) < row.line, "of two lines about one item the later one goes later"
            last[row.item["id"]] = row.line
        book.tell_done(partition, parcel)
        done |= {row.line for row in parcel}
        assert set(range(1, book.done + 1)) <= done
    assert book.done == (book.fault.line - 1 if book.fault else len(ids)), "all before the fault is sent"
    assert book.waiting_bytes == 0


def test_lines_that_are_skipped_and_blank_ones_count() -> None:
    book = ledger(skip=2)
    assert [book.take(raw) is None for raw in (line("a"), b"{", b" ", line("b"))] == [True, True, True, False]
    assert (book.fault, book.done) == (None, 3)


def test_a_parcel_is_not_too_large_and_never_empty() -> None:
    book = ledger()
    for _ in range(PARCEL_ITEMS + 1):
        partition = book.take(line("a"))
    assert partition is not None
    assert len(book.parcel(partition)) == PARCEL_ITEMS
    book.tell_done(partition, book.parcel(partition))
    assert len(book.parcel(partition)) == 1
    for _ in range(2):
        book.take(line("a", text="x" * PARCEL_BYTES))
    assert len(book.parcel(partition)) == 1
    book.tell_done(partition, book.parcel(partition))
    assert len(book.parcel(partition)) == 1, "one that is too large goes alone"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"{", "truncated"),
        (b"\xff", "JSON"),
        (b"[]", "object"),
        (b'{"table":"notes"}', "item"),
        (b'{"table":"notes","item":3}', "object"),
        (b'{"table":"nix","item":{}}', "no table 'nix'"),
        (b'{"table":"notes","item":{}}', "key attribute 'id'"),
        (b'{"table":"notes","item":{"id":true}}', "a string or a number"),
        (b'{"table":"notes","item":{"id":1,"n":1' + b"0" * 30 + b"}}", "64 bits"),
        (b'{"table":"connections","item":{"user":"a","connection":"c"}}', "gateways"),
    ],
)
def test_the_error_of_a_faulty_line_names_the_fault(raw: bytes, what: str) -> None:
    book = ledger()
    book.take(line("a"))
    assert book.take(raw) is None
    assert book.fault
    assert book.fault.line == 2
    assert what in book.fault.what
    assert book.done == 0, "the line before it is not done yet"


def test_of_several_faults_the_first_line_counts() -> None:
    book = ledger()
    for id_ in ("a", "b", "c"):
        book.take(line(id_))
    book.refuse(3, "late")
    book.refuse(2, "early")
    book.refuse(3, "late")
    assert book.fault == (2, "early")


def test_a_byte_order_mark_and_windows_line_ends_are_skipped() -> None:
    book = ledger()
    assert book.take(b"\xef\xbb\xbf" + line("a") + b"\r") is not None
    assert book.take(line("b") + b"\r") is not None
    assert book.take(b"\r") is None
    assert book.fault is None
