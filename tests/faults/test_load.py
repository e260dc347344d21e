"""The parts of the load and what they note: plain values, without a system."""

from __future__ import annotations

import random

import pytest

from .app import app
from .app_next import app as app_next
from .check import ReaderLog, Report, check_follower, check_reader
from .expect import EVENTUAL, MEMBERSHIPS, OWNED, SHOWN, TOPICS, expect
from .figures import Outcome
from .images import digest, slim
from .logs import Got
from .pace import ALL, EVERYTHING, LARGE_BYTES, PARTS, is_watched, with_parts
from .readers import half_of_it
from .test_check import BEGIN, change, frame, history
from .watch import Connections, Prober
from .writers import large_text, writes_of

NOT_CHECKED = {"connections", "crowd", "dead_letters", "lists", "mobs", "pages", "papers", "probes", "rants"}
"""Tables without an expectation: those of probes and of the expensive client, and groups without readers."""


def test_the_second_version_adds_to_the_first() -> None:
    assert set(app_next.tables) - set(app.tables) == {"clubs", "minutes", "drafts"}
    assert set(app.tables) <= set(app_next.tables)


def test_the_checker_knows_every_table() -> None:
    known = {*MEMBERSHIPS, *SHOWN, *OWNED, *TOPICS, *EVENTUAL}
    assert set(app_next.tables) - NOT_CHECKED == known - NOT_CHECKED


def test_each_part_can_be_had_alone() -> None:
    assert with_parts(()) == ALL
    for part, rates in PARTS.items():
        assert with_parts([part]).rates == ALL.rates | rates
    assert EVERYTHING.rates.keys() <= writes_of(EVERYTHING).keys() | {"send"}
    with pytest.raises(ValueError, match="no such part of the load: huge"):
        with_parts(["huge"])


def test_large_texts_are_of_all_sizes() -> None:
    sizes = [len(large_text(random.Random(seed))) for seed in range(200)]
    least, most = LARGE_BYTES
    assert least <= min(sizes) < 3 * least
    assert most / 3 < max(sizes) <= most


def test_a_slim_image_has_the_digest_of_the_whole_one() -> None:
    image = {"id": "1", "text": "x" * 100_000, "n": 3}
    assert len(str(slim(image))) < 200
    assert slim(slim(image)) == slim(image)
    assert digest(slim(image)) == digest(image) != digest(image | {"text": "y" + "x" * 99_999})


def test_a_view_of_half_a_transaction_is_noted() -> None:
    whole = {"1": {"w": "a"}, "2": {"w": "a"}}
    assert half_of_it(whole, ("1", "2")) == []
    assert half_of_it({}, ("1", "2")) == []
    assert half_of_it(whole | {"2": {"w": "b"}}, ("1", "2"))
    assert half_of_it(whole, ("1", "2", "3")), "one of them is missing"
    assert half_of_it(whole | {"3": {"w": "b"}}, ("1", "2")) == []


def bulk(*frames: tuple[str, bool]) -> list[str]:
    """The kinds of violations of a log with these (transaction, more)."""
    key = {"room": "r", "user": "ann"}
    changes = [change("members", key, key)]
    rows = [{"room": "r", "id": str(one)} for one in range(len(frames))]
    changes += [change("rows", row, row) for row in rows]
    log = [frame(0, "INSERT", "members", key, key)]
    for number, (row, (transaction, more)) in enumerate(zip(rows, frames, strict=True), 1):
        log.append(frame(number, "INSERT", "rows", row, row)._replace(transaction=transaction or None, more=more))
    report = Report()
    check_reader(expect(history(*changes)), ReaderLog("ann", "ann", log, BEGIN - 1), report, may_fall_back=False)
    return [one.kind for one in report.violations]


def test_a_transaction_comes_in_one_piece() -> None:
    assert bulk(("t", True), ("t", True), ("t", False), ("", False)) == []
    assert bulk(("t", False), ("u", False)) == [], "of each, this reader sees one change"
    assert bulk(("t", True), ("", False), ("t", False)) == ["unit", "unit"]
    assert bulk(("t", False), ("t", False)) == ["unit"]
    assert bulk(("t", True), ("t", True)) == ["unit"]


def flat(user: str) -> dict[str, str]:
    return {"flat": "f0", "user": user}


def test_members_of_a_flat_hear_of_each_other_and_of_faces() -> None:
    ann, bob, face = flat("ann"), flat("bob"), {"user": "bob"}
    quiet = [change("things", {"id": "t"}, {"id": "t", "owner": "x"})] * 20
    all_of_it = history(
        change("flats", ann, ann), change("flats", bob, bob), *quiet, change("faces", face, face), *quiet
    )
    log = [
        frame(0, "INSERT", "flats", ann, ann),
        frame(1, "INSERT", "flats", bob, bob),
        frame(22, "INSERT", "faces", face, face),
    ]

    def kinds(user: str, log: list[Got]) -> list[str]:
        report = Report()
        check_reader(expect(all_of_it), ReaderLog(user, user, log, BEGIN - 1), report, may_fall_back=False)
        return [one.kind for one in report.violations]

    assert kinds("ann", log) == []
    assert kinds("ann", log[:2]) == ["loss"]
    assert "leak" in kinds("eve", log[2:])


def test_a_user_that_left_a_flat_hears_no_more_of_its_topic() -> None:
    ann = flat("ann")
    board = {"id": "b"} | {"flat": "f0"}
    boards = [change("boards", {"id": "b"}, board, board if n else None, version=n + 1) for n in range(10)]
    all_of_it = history(change("flats", ann, ann), boards[0], change("flats", ann, None, ann), *boards[1:])

    def kinds(*numbers: int) -> list[str]:
        log = [frame(n, "MODIFY", "boards", {"id": "b"}, board, board)._replace(topic="flat:f0") for n in numbers]
        report = Report()
        check_follower(expect(all_of_it), ReaderLog("ann", "ann", log, BEGIN - 1), "f0", report)
        return [one.kind for one in report.violations]

    assert kinds(1, 3, 5) == [], "for a lease, it may still come"
    assert kinds(1, 11) == ["leak"]


def test_no_reader_expects_the_frames_of_the_crowd() -> None:
    crowd = [{"hall": "hall", "user": f"c{one:05}"} for one in range(50)]
    ann, talk = {"hall": "hall", "user": "ann"}, {"hall": "hall", "id": "1"}
    expected = expect(history(*(change("crowd", one, one) for one in (*crowd, ann)), change("talks", talk, talk)))
    assert set(expected.feeds) == {("user", "ann")}
    assert [is_watched(user) for user in ("u07", "x1", "c00001", "sprawl")] == [True, True, False, False]


def test_a_prober_counts_a_later_number_for_those_before_it() -> None:
    prober = Prober("ws://nowhere", 3, "p3-0", "key")
    prober._sent = {1: 10.0, 2: 20.0, 3: 30.0}
    prober._note(2, 25.0)
    assert [one.delivered_ms for one in prober.probes()] == [25.0, 25.0, None]
    prober._note(3, 35.0)
    assert [one.delivered_ms for one in prober.probes()] == [25.0, 25.0, 35.0]


def test_a_connection_is_absent_from_the_first_look_to_the_last_without_it() -> None:
    looked = Connections("ws://nowhere", "key", lambda: ())
    one = ("ann", "c1")
    looked._compare({one}, set(), 10.0, 11.0)
    looked._compare({one}, set(), 20.0, 21.0)
    looked._compare({one}, {one}, 30.0, 31.0)
    looked._compare({one}, set(), 40.0, 41.0)
    assert [(absence.since_ms, absence.until_ms) for absence in looked.absences] == [
        (10.0, 11.0),
        (10.0, 21.0),
        (40.0, 41.0),
    ]


def test_two_looks_far_apart_say_nothing_of_the_time_between_them() -> None:
    looked = Connections("ws://nowhere", "key", lambda: ())
    for begun in (10.0, 9_000.0):
        looked._compare({("ann", "c1")}, set(), begun, begun + 1)
    assert [absence.since_ms for absence in looked.absences] == [10.0, 9_000.0]


def test_figures_are_tables_for_the_documentation() -> None:
    outcome = Outcome(7, "embedded", 60.0)
    outcome.faults["kill store"] += 2
    outcome.readers_s = {"kill store": 1.25}
    outcome.report.add("loss", "ann", "a change")
    text = outcome.as_markdown()
    assert "| kill store | 2 | – | 1.2 |" in text
    assert text.endswith("1 violations {'loss': 1}\n  loss: ann: a change")
