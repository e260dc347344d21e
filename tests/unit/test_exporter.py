"""Where an export goes on in a file that was left in the middle."""

from __future__ import annotations

import io

import pytest

from tidewire.app import App
from tidewire.errors import ConfigurationError
from tidewire.model.values import ItemKey, name_of
from tidewire.redis.keys import Keys
from tidewire.services.cli.exporter import BLOCK_BYTES, last_whole_line, mark_of

KEYS = Keys("dev", 8)


@pytest.mark.parametrize(
    ("text", "end", "last"),
    [
        (b"", 0, None),
        (b"half", 0, None),
        (b"one\n", 4, b"one\n"),
        (b"one\ntwo\nhal", 8, b"two\n"),
        (b"one\n" + b"x" * 3 * BLOCK_BYTES + b"\n" + b"y" * 2 * BLOCK_BYTES, 5 + 3 * BLOCK_BYTES, None),
    ],
)
def test_text_after_the_last_newline_is_not_a_line(text: bytes, end: int, last: bytes | None) -> None:
    found_end, found = last_whole_line(io.BytesIO(text))
    assert found_end == end
    assert found == (last or (text[4:end] if end else None))


def test_the_mark_is_the_place_of_the_last_item() -> None:
    app = App("notes")
    lines = app.table("lines", key=("page", "n"))
    mark = mark_of(b'{"table":"lines","item":{"page":"p","n":3}}\n', app.tables, KEYS, "out.jsonl")
    assert mark == (KEYS.partition_of("p"), "lines", (name_of("p"), ItemKey("lines", "p", 3).field))
    assert lines.key_of({"page": "p", "n": 3}).field == mark.place.field


@pytest.mark.parametrize("line", [b"{\n", b"3\n", b'{"table":"nix","item":{}}\n', b'{"table":"lines","item":{}}\n'])
def test_a_file_of_another_kind_is_refused(line: bytes) -> None:
    app = App("notes")
    app.table("lines", key=("page", "n"))
    with pytest.raises(ConfigurationError, match=r"--resume: the last line of out\.jsonl"):
        mark_of(line, app.tables, KEYS, "out.jsonl")
