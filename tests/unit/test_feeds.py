"""Cursors: resumed with exactly what was missed, or a reset that says why not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.model.feeds import Announcement, Cursor, FeedEntry, FeedState, Reset, chained, follow_on, head_of, resume

EPOCH = "1795409459002"
START = "0"
POSITIONS = st.lists(st.integers(0, 9).map(lambda n: f"{n}-0-{n}-0"), max_size=12)


def chain(positions: list[str]) -> tuple[list[Cursor], list[FeedEntry], FeedState]:
    """The cursors that a reader of all entries has had, the entries, and the state after them."""
    cursors, entries = [Cursor(EPOCH, 0, START)], list[FeedEntry]()
    for seq, position in enumerate(positions, 1):
        tag = chained(cursors[-1].tag, position)
        entries.append(FeedEntry(seq, tag, position, b"body"))
        cursors.append(Cursor(EPOCH, seq, tag))
    return cursors, entries, FeedState(EPOCH, len(entries), cursors[-1].tag)


@given(POSITIONS)
def test_each_cursor_of_a_chain_resumes_with_exactly_what_it_missed(positions: list[str]) -> None:
    cursors, entries, state = chain(positions)
    for cursor in cursors:
        missed = entries[cursor.seq :]
        assert resume(cursor, state, missed) is None
        at = cursor
        for entry in missed:
            following = follow_on(at, entry)
            assert following
            at = following
        assert at == head_of(state)


@given(POSITIONS.filter(bool), st.data())
def test_an_entry_left_out_or_swapped_does_not_pass(positions: list[str], data: st.DataObject) -> None:
    cursors, entries, state = chain(positions)
    gone = data.draw(st.integers(0, len(entries) - 1))
    kept = entries[:gone] + entries[gone + 1 :]
    if gone < len(entries) - 1:
        assert resume(cursors[0], state, kept) is not None
    wrong = entries[gone]._replace(position="99-9-9-9")
    assert resume(cursors[0], state, [*entries[:gone], wrong, *entries[gone + 1 :]]) is not None


@given(POSITIONS, st.data())
def test_a_cursor_with_another_tag_is_unknown(positions: list[str], data: st.DataObject) -> None:
    cursors, entries, state = chain(positions)
    cursor = data.draw(st.sampled_from(cursors))._replace(tag="ffff")
    assert resume(cursor, state, entries[cursor.seq :]) == Reset("cursor_unknown", head_of(state))


@given(POSITIONS, st.data())
def test_a_cursor_of_another_epoch_is_expired(positions: list[str], data: st.DataObject) -> None:
    cursors, entries, state = chain(positions)
    cursor = data.draw(st.sampled_from(cursors))._replace(epoch="7")
    assert resume(cursor, state, entries[cursor.seq :]) == Reset("cursor_expired", head_of(state))


@given(POSITIONS, st.integers(1, 10**9))
def test_a_cursor_ahead_of_the_feed_is_unknown(positions: list[str], ahead: int) -> None:
    _, _, state = chain(positions)
    cursor = Cursor(EPOCH, state.seq + ahead, state.tag)
    assert resume(cursor, state, []) == Reset("cursor_unknown", head_of(state))


@given(POSITIONS.filter(lambda positions: len(positions) > 1), st.data())
def test_a_cursor_before_trimmed_entries_is_too_old(positions: list[str], data: st.DataObject) -> None:
    cursors, entries, state = chain(positions)
    trimmed = data.draw(st.integers(1, len(entries)))
    cursor = cursors[data.draw(st.integers(0, trimmed - 1))]
    assert resume(cursor, state, entries[trimmed:]) == Reset("feed_trimmed", head_of(state))


@given(POSITIONS, st.data())
def test_a_bounded_read_is_in_order_as_far_as_it_goes(positions: list[str], data: st.DataObject) -> None:
    cursors, entries, state = chain(positions)
    cursor = data.draw(st.sampled_from(cursors))
    if cursor.seq < state.seq:
        some = entries[cursor.seq : data.draw(st.integers(cursor.seq + 1, state.seq))]
        assert resume(cursor, state, some) is None


@given(POSITIONS)
def test_a_cursor_is_read_back_from_its_text(positions: list[str]) -> None:
    for cursor in chain(positions)[0]:
        assert Cursor.parse(str(cursor)) == cursor


@given(st.text(max_size=100))
def test_any_text_is_a_cursor_or_none(text: str) -> None:
    cursor = Cursor.parse(text)
    assert cursor is None or cursor.seq >= 0


@pytest.mark.parametrize("text", ["", "garbage", "1.2", "1.2.", "1..a", ".1.a", "a.1.b", "1.-1.a", "1.²5.a", "1.1.a.b"])
def test_a_malformed_cursor_is_none(text: str) -> None:
    assert Cursor.parse(text) is None


def test_an_entry_that_is_not_the_very_next_does_not_follow() -> None:
    cursors, entries, _ = chain(["a", "b", "c"])
    assert follow_on(cursors[0], entries[0]) == cursors[1]
    assert follow_on(cursors[0], entries[1]) is None
    assert follow_on(cursors[1], entries[0]) is None


def test_an_announcement_carries_the_entry_with_any_body() -> None:
    entry = FeedEntry(3, "abc", "1-0-5-0", b"two\nlines \x00")
    assert Announcement.parse(b"7-2 abc 1-0-5-0 99\ntwo\nlines \x00") == Announcement("7", entry)
