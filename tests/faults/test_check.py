"""The checker itself: it is content with what should come, and names each way in which that can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tidewire.model.records import Change

from .check import ReaderLog, Report, check_connections, check_history, check_reader, check_steps
from .expect import MEMBERSHIPS, Written, expect
from .images import digest
from .logs import Acknowledged, Got
from .schedule import AT, ROLL, schedule

BEGIN = 1_000_000
Log = list[Got]


def change(table: str, key: dict[str, Any], new: Any, old: Any = None, version: int = 1, request: str = "") -> Change:
    event = "REMOVE" if new is None else "INSERT" if old is None else "MODIFY"
    return Change(event, table, key, version, new, old, 0, "somebody", None, request or None)


def history(*changes: Change) -> list[Written]:
    """A second apart, all in partition 3."""
    found = []
    for number, one in enumerate(changes):
        ms = BEGIN + 1000 * number
        found.append(Written(3, (0, ms, 0), one._replace(at=ms)))
    return found


def frame(
    number: int, event: str, table: str, key: dict[str, Any], new: Any = None, old: Any = None, **rest: Any
) -> Got:
    ms = BEGIN + 1000 * number
    position = rest.pop("position", f"3-0-{ms}-0")
    named = tuple(sorted(key.items()))
    return Got(ms + 5.0, "change", None, str(number), position, event, table, named, digest(new), digest(old))


def reset(number: int, table: str | None = None) -> Got:
    return Got(BEGIN + 1000.0 * number, "reset", None, "c", None, None, table, (), None, None)


ROOM = {"room": "r"}
ANN, BOB = ROOM | {"user": "ann"}, ROOM | {"user": "bob"}
ONE, TWO = ROOM | {"id": "1"}, ROOM | {"id": "2"}
FIRST, SECOND = ONE | {"w": "first", "secret": "x"}, ONE | {"w": "second"}
SEEN = ONE | {"w": "first"}
HISTORY = history(
    change("members", ANN, ANN),
    change("messages", ONE, FIRST),
    change("messages", ONE, SECOND, FIRST, version=2),
    change("members", BOB, BOB),
    change("messages", TWO, TWO),
    change("members", BOB, None, BOB),
    change("messages", TWO, None, TWO),
    change("things", {"id": "t"}, {"id": "t", "owner": "ann"}),
    change("things", {"id": "t"}, {"id": "t", "owner": "bob"}, {"id": "t", "owner": "ann"}, version=2),
)


def ann() -> Log:
    return [
        frame(0, "INSERT", "members", ANN, ANN),
        frame(1, "INSERT", "messages", ONE, SEEN),
        frame(2, "MODIFY", "messages", ONE, SECOND, SEEN),
        frame(3, "INSERT", "members", BOB, BOB),
        frame(4, "INSERT", "messages", TWO, TWO),
        frame(5, "REMOVE", "members", BOB, None, BOB),
        frame(6, "REMOVE", "messages", TWO, None, TWO),
        frame(7, "INSERT", "things", {"id": "t"}, {"id": "t", "owner": "ann"}),
        frame(8, "LEAVE", "things", {"id": "t"}),
    ]


def bob() -> Log:
    return [
        frame(3, "INSERT", "members", BOB, BOB),
        frame(3, "ENTER", "members", ANN, ANN),
        frame(3, "ENTER", "messages", ONE, SECOND),
        frame(4, "INSERT", "messages", TWO, TWO),
        frame(5, "REMOVE", "members", BOB, None, BOB),
        frame(5, "LEAVE", "members", ROOM),
        frame(5, "LEAVE", "messages", ROOM),
        frame(5, "LEAVE", "posts", ROOM),
        frame(5, "LEAVE", "files", ROOM),
        frame(5, "LEAVE", "rows", ROOM),
        frame(8, "ENTER", "things", {"id": "t"}, {"id": "t", "owner": "bob"}),
    ]


def violations(user: str, log: Log, *, may_fall_back: bool = False) -> list[str]:
    report = Report()
    check_reader(expect(HISTORY), ReaderLog(user, user, log, BEGIN - 1), report, may_fall_back=may_fall_back)
    return [one.kind for one in report.violations]


def test_expected_frames_pass_the_checker() -> None:
    assert violations("ann", ann()) == []
    assert violations("bob", bob()) == []
    assert violations("carol", []) == []
    assert violations("ann", [ann()[0], reset(1, "notes"), *ann()[1:]]) == []


def without(*numbers: int) -> Callable[[Log], Log]:
    return lambda log: [one for number, one in enumerate(log) if number not in numbers]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (without(0), "loss"),
        (without(3, 4), "loss"),
        (without(8), "loss"),
        (lambda log: [*log[:3], log[2], *log[3:]], "double"),
        (lambda log: [*log, log[1]], "double"),
        (lambda log: [log[0], log[2], log[1], *log[3:]], "disorder"),
        (lambda log: [*log[:3], *log[3:5][::-1], *log[5:]], "disorder"),
        (lambda log: [log[0], log[1]._replace(new=digest(FIRST)), *log[2:]], "leak"),
        (lambda log: [*log[:8], frame(8, "MODIFY", "things", {"id": "t"}, {"id": "t", "owner": "bob"})], "leak"),
        (lambda log: [*log[:8], log[8]._replace(old=digest({"id": "t", "owner": "ann"}))], "leak"),
        (lambda log: [*log, frame(9, "INSERT", "messages", TWO, TWO)], "phantom"),
        (lambda log: [*log[:4], reset(4), *log[4:]], "reset"),
    ],
)
def test_each_violation_has_a_name(spoil: Callable[[Log], Log], kind: str) -> None:
    assert kind in violations("ann", spoil(ann()))


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (without(1), "loss"),
        (without(2), "loss"),
        (without(6), "loss"),
        (lambda log: [*log[:3], log[2], *log[3:]], "double"),
        (lambda log: [ann()[1], *log], "leak"),
        (lambda log: [*log[:10], ann()[6], log[10]], "leak"),
        (lambda log: [*log[:2], log[2]._replace(new=digest(SEEN)), *log[3:]], "leak"),
    ],
)
def test_a_member_sees_the_room_only_between_joining_and_leaving(spoil: Callable[[Log], Log], kind: str) -> None:
    assert kind in violations("bob", spoil(bob()))


def test_a_member_of_another_tenant_sees_no_post_of_the_room() -> None:
    members = [ROOM | {"user": user} for user in ("u00", "u01", "u02")]
    of_a, of_b = ({**ONE, "tenant": tenant} for tenant in ("a", "b"))
    all_of_it = history(
        *(change("members", member, member) for member in members[:2]),
        change("posts", ONE, of_a),
        change("members", members[2], members[2]),
        change("posts", ONE, of_b, of_a, version=2),
    )
    joined = [frame(n, "INSERT", "members", member, member) for n, member in zip((0, 1, 3), members, strict=True)]
    first, enter = frame(2, "INSERT", "posts", ONE, of_a), frame(3, "ENTER", "posts", ONE, of_a)
    others = [frame(3, "ENTER", "members", member, member) for member in members[:2]]
    logs = {
        "u00": [*joined[:2], first, joined[2], frame(4, "LEAVE", "posts", ONE)],
        "u01": [joined[1], frame(1, "ENTER", "members", members[0], members[0]), joined[2],
                frame(4, "ENTER", "posts", ONE, of_b)],
        "u02": [joined[2], *others, enter, frame(4, "LEAVE", "posts", ONE)],
    }  # fmt: skip

    def kinds(user: str, log: Log) -> list[str]:
        report = Report()
        check_reader(expect(all_of_it), ReaderLog(user, user, log, BEGIN - 1), report, may_fall_back=False)
        return [one.kind for one in report.violations]

    for user, log in logs.items():
        assert kinds(user, log) == []
    assert "leak" in kinds("u01", [*logs["u01"][:2], first, *logs["u01"][2:]])
    assert "loss" in kinds("u02", [one for one in logs["u02"] if one is not enter])


def test_a_reset_excuses_earlier_losses_after_a_fallback() -> None:
    lost = frame(9, "INSERT", "messages", TWO, TWO, position="3-0-1009000-7")
    log = [*ann()[:3], lost, reset(5), *ann()[5:]]
    assert violations("ann", log, may_fall_back=True) == []
    assert "loss" in violations("ann", [*log[:6], *log[7:]], may_fall_back=True)
    assert "phantom" in violations("ann", [*log, lost], may_fall_back=True)


def test_silence_long_after_a_reset_is_a_loss() -> None:
    late = history(change("members", ANN, ANN), *(change("messages", ONE, ONE | {"w": str(n)}) for n in range(40)))
    log = [frame(0, "INSERT", "members", ANN, ANN), reset(1)]
    report = Report()
    check_reader(expect(late), ReaderLog("ann", "ann", log, BEGIN - 1), report, may_fall_back=True)
    assert [one.kind for one in report.violations] == ["loss"]


def test_messages_come_once_and_in_order() -> None:
    sent = history(*(
        Change("SEND", "", {"user": "ann"}, 0, {"body": f"hello {number}"}, None, 0, "s", None, None)
        for number in range(3)
    ))  # fmt: skip
    log = [
        Got(BEGIN + 1.0, "message", None, str(number), None, None, None, (), None, None, f"hello {number}")
        for number in range(3)
    ]

    def kinds(log: Log) -> list[str]:
        report = Report()
        check_reader(expect(sent), ReaderLog("ann", "ann", log, BEGIN - 1), report, may_fall_back=False)
        return [one.kind for one in report.violations]

    assert kinds(log) == []
    assert kinds(log[1:]) == ["loss"]
    assert kinds(log[:2]) == ["loss"]
    assert kinds([*log, log[0]]) == ["double"]
    assert "disorder" in kinds([log[0], log[2], log[1]])


NOTE = {"id": "n", "room": "r"}


def test_a_reader_in_another_partition_was_a_member_about_then() -> None:
    changes = [change("members", ANN, ANN), *(change("things", {"id": "t"}, {"id": "t", "owner": "x"}),) * 20]
    note = change("notes", {"id": "n"}, NOTE)
    gone = change("members", ANN, None, ANN)
    frames = [frame(0, "INSERT", "members", ANN, ANN), frame(21, "INSERT", "notes", {"id": "n"}, NOTE)]

    def kinds(after: list[Change], log: Log) -> list[str]:
        report = Report()
        all_of_it = history(*changes, *after)
        check_reader(expect(all_of_it), ReaderLog("ann", "ann", log, BEGIN - 1), report, may_fall_back=False)
        return [one.kind for one in report.violations]

    assert kinds([note], frames) == []
    assert kinds([note], frames[:1]) == ["loss"]
    assert kinds([note], [*frames, frames[1]]) == ["double"]
    left = frame(21, "REMOVE", "members", ANN, None, ANN)
    leaves = [frame(21, "LEAVE", table, ROOM) for table in MEMBERSHIPS["members"].shows]
    others = [change("things", {"id": "u"}, {"id": "u", "owner": "ann"})] * 8
    theirs = [frame(n, "INSERT", "things", {"id": "u"}, {"id": "u", "owner": "ann"}) for n in range(22, 30)]
    late = frame(30, "INSERT", "notes", {"id": "n"}, NOTE)
    assert "leak" in kinds([gone, *others, note], [frames[0], left, *leaves, *theirs, late])


def test_the_store_does_each_write_once_and_keeps_it() -> None:
    def kinds(all_of_it: list[Written], *acknowledged: str) -> list[str]:
        report = Report()
        said = [Acknowledged(request, "put", 0) for request in acknowledged]
        check_history(all_of_it, said, report, may_fall_back=False)
        return [one.kind for one in report.violations]

    first = change("messages", ONE, ONE, request="a")
    assert kinds(history(first, first._replace(version=2, request="b")), "a", "b") == []
    assert kinds(history(first), "a", "b") == ["loss"]
    assert kinds(history(first, first._replace(version=2)), "a") == ["double"]
    assert kinds(history(first, first._replace(request="b")), "a", "b") == ["disorder"]


def test_two_connections_of_a_user_receive_the_same_frames() -> None:
    report = Report()
    check_connections([ReaderLog("ann", "1", ann()), ReaderLog("ann", "2", ann()[3:])], report)
    assert not report.violations
    other = [ann()[4]._replace(cursor="3")]
    check_connections([ReaderLog("ann", "1", ann()), ReaderLog("ann", "2", other)], report)
    assert [one.kind for one in report.violations] == ["disorder"]


def test_a_view_does_not_go_back_unless_it_started_over() -> None:
    all_of_it = history(*(change("messages", ONE, ONE, request=request) for request in "abc"))
    report = Report()
    check_steps(all_of_it, "ann", [("1", "a"), ("1", "c"), (None, ""), ("1", "b")], report)
    assert not report.violations
    check_steps(all_of_it, "ann", [("1", "a"), ("1", "c"), ("1", "b")], report)
    assert [one.kind for one in report.violations] == ["live"]


@pytest.mark.parametrize("topology", sorted(AT))
def test_a_seed_gives_one_schedule(topology: str) -> None:
    faults = schedule(topology, 7, 600)
    assert faults == schedule(topology, 7, 600) != schedule(topology, 8, 600)
    rolls = {("roll_forward", None), ("roll_back", None)}
    assert {(fault.kind, fault.service) for fault in faults} - rolls == set(AT[topology]) - {ROLL}
    assert [fault.kind for fault in faults if "roll" in fault.kind][:2] == ["roll_forward", "roll_back"]
    for earlier, later in pairwise(faults):
        assert earlier.at_s + earlier.lasts_s < later.at_s
    assert faults[-1].at_s + faults[-1].lasts_s < 600
