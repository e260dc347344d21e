"""The contract between the Lua functions and their Python wrappers."""

import re

import pytest

from tidewire.redis.functions import SOURCE, STRIDES, WHOLE
from tidewire.redis.keys import LeaseField, PartitionField


def test_both_sides_agree_on_the_fields_of_each_record() -> None:
    names: list[str] = []
    numbers: list[int] = []
    for left, right in re.findall(r"^local ((?:[A-Z]+_FIELDS(?:, )?)+) = ([\d, ]+)$", SOURCE, re.MULTILINE):
        names += [name.removesuffix("_FIELDS") for name in left.split(", ")]
        numbers += map(int, right.split(", "))
    assert dict(zip(names, numbers, strict=True)) == STRIDES


def test_both_sides_agree_on_the_number_above_all_feeds() -> None:
    assert "WHOLE = -1, 2 ^ 52" in SOURCE
    assert WHOLE == 2**52


def test_every_field_of_a_partition_that_lua_uses_is_documented() -> None:
    calls = re.findall(r"'H(?:GET|MGET|SET|DEL)', (?:partition|keys\[1\])((?:, [^()]+?)+)\)", SOURCE)
    used = {name for arguments in calls for name in re.findall(r"'([a-z]+)'", arguments)}
    assert used == {"generation", "server", "fell", "alone", "feeds", "newest"}
    assert used <= set(PartitionField)


def test_every_field_of_a_lease_that_lua_uses_is_documented() -> None:
    calls = re.findall(r"'H(?:GET|MGET|SET|DEL)', (?:lease|keys\[3\])((?:, [^()]+?(?:\([^()]*\))?)+)\)", SOURCE)
    used = {name for arguments in calls for name in re.findall(r"'([a-z]+)'", arguments)}
    assert used == set(LeaseField)


@pytest.mark.parametrize(
    "function", re.findall(r"^register\('(\w+)', function\(keys, args\)\n(.*?)^end", SOURCE, re.M | re.S)
)
def test_a_function_reads_its_arguments_by_name(function: tuple[str, str]) -> None:
    name, body = function
    assert not re.search(r"args\[[a-z_]+ \+ \d+\]", body), f"{name}: name the arguments of a record by unpack"


def test_every_function_that_writes_also_runs_at_maxmemory() -> None:
    functions = re.findall(r"^register\('(\w+)', function\(keys, args\)\n(.*?)^end, '([\w-]+)'\)", SOURCE, re.M | re.S)
    assert len(functions) == len(re.findall(r"^register\(", SOURCE, re.M))
    for name, body, flag in functions:
        assert flag in ("allow-oom", "no-writes"), name
        if flag == "no-writes":
            assert not re.search(r"'(?:[HX]?(?:SET|DEL|ADD|ACK|TRIM)|P?EXPIRE\w*|SPUBLISH)'", body), name
