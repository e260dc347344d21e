"""Keys: the order of sort keys, the partition of a value, and hash tags."""

import re

from hypothesis import given
from hypothesis import strategies as st

from tidewire.model.values import LARGEST_KEY_NUMBER, Scalar, name_of, sort_bytes
from tidewire.redis.keys import Keys

NUMBERS = st.integers(-LARGEST_KEY_NUMBER, LARGEST_KEY_NUMBER) | st.floats(
    -LARGEST_KEY_NUMBER, LARGEST_KEY_NUMBER, allow_nan=False
)
TEXTS = st.text(max_size=20)
KEYS = Keys("dev", 8)


@given(NUMBERS, NUMBERS)
def test_numbers_sort_as_numbers(a: float, b: float) -> None:
    assert (sort_bytes(a) < sort_bytes(b)) == (a < b)
    assert (sort_bytes(a) == sort_bytes(b)) == (a == b)


@given(TEXTS, TEXTS)
def test_strings_sort_by_their_utf8_bytes(a: str, b: str) -> None:
    assert (sort_bytes(a) < sort_bytes(b)) == (a.encode() < b.encode())
    assert (sort_bytes(a) == sort_bytes(b)) == (a == b)


@given(st.lists(NUMBERS, max_size=20))
def test_a_list_of_numbers_comes_out_in_order(numbers: list[float]) -> None:
    assert sorted(numbers, key=sort_bytes) == sorted(numbers)


@given(NUMBERS, TEXTS)
def test_a_number_and_a_string_are_never_one_sort_key(number: float, text: str) -> None:
    assert sort_bytes(number) != sort_bytes(text)


@given(st.integers(-LARGEST_KEY_NUMBER, LARGEST_KEY_NUMBER))
def test_an_integer_and_its_float_are_one_key(number: int) -> None:
    assert KEYS.partition_of(number) == KEYS.partition_of(float(number))
    assert name_of(number) == name_of(float(number))
    assert sort_bytes(number) == sort_bytes(float(number))
    assert KEYS.items("t", number) == KEYS.items("t", float(number))


def test_zero_and_minus_zero_are_one_key() -> None:
    assert sort_bytes(0) == sort_bytes(-0.0)
    assert KEYS.items("t", 0) == KEYS.items("t", -0.0)


@given(st.integers(-1000, 1000))
def test_a_number_and_its_digits_as_a_string_are_two_keys(number: int) -> None:
    assert KEYS.items("t", number) != KEYS.items("t", str(number))


@given(TEXTS | NUMBERS, st.integers(1, 64))
def test_a_partition_number_is_below_their_count(value: Scalar, partitions: int) -> None:
    assert 0 <= Keys("dev", partitions).partition_of(value) < partitions


@given(TEXTS, TEXTS)
def test_every_key_of_a_partition_has_its_hash_tag(value: str, other: str) -> None:
    partition = KEYS.partition_of(value)
    made = [
        KEYS.items("t", value),
        KEYS.order("t", value),
        KEYS.members("m", value),
        KEYS.user_feed(value),
        KEYS.topic_feed(value),
        KEYS.commands(partition),
        KEYS.changes(partition),
        KEYS.links(partition),
        KEYS.lease(partition, "store"),
        KEYS.partition(partition),
        KEYS.request(partition, value, other),
        KEYS.connected(partition, other),
    ]
    for key in made:
        assert key.startswith(b"dev:{p%d}:" % partition)
    assert len(set(made)) == len(made)


def test_braces_in_names_do_not_change_the_hash_tag() -> None:
    key = KEYS.items("t", "}{x}")
    tag = re.search(rb"\{([^}]*)\}", key)
    assert tag
    assert tag[1] == b"p%d" % KEYS.partition_of("}{x}")


def test_stages_share_no_key() -> None:
    other = Keys("prod", 8)
    assert KEYS.items("t", 1) != other.items("t", 1)
    assert KEYS.credentials() != other.credentials()
    assert KEYS.user_feed("alice") != other.user_feed("alice")


def test_a_users_feed_is_not_the_topic_of_the_same_name() -> None:
    assert KEYS.user_feed("scores") != KEYS.topic_feed("scores")
