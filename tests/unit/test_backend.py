"""Addresses of Redis: their parts, their errors, and that no message shows a password."""

import pytest

from tidewire.errors import ConfigurationError
from tidewire.redis.addresses import ClusterAddress, SentinelsAddress, redacted
from tidewire.redis.connect import backend_at
from tidewire.redis.keys import Keys


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis+cluster://a", ClusterAddress([("a", 6379)], None, None)),
        ("redis+cluster://a:7000,b:7001/", ClusterAddress([("a", 7000), ("b", 7001)], None, None)),
        ("redis+cluster://a,b:7001", ClusterAddress([("a", 6379), ("b", 7001)], None, None)),
        ("redis+cluster://:secret@a:1", ClusterAddress([("a", 1)], None, "secret")),
        ("redis+cluster://me:s%40c%2Fr:t@a:1,b", ClusterAddress([("a", 1), ("b", 6379)], "me", "s@c/r:t")),
        ("redis+cluster://10.0.0.1:1,[::1]:2,[fe80::1]", ClusterAddress(
            [("10.0.0.1", 1), ("::1", 2), ("fe80::1", 6379)], None, None
        )),
    ],
)  # fmt: skip
def test_an_address_of_a_cluster_names_nodes_and_perhaps_a_user(url: str, expected: ClusterAddress) -> None:
    assert ClusterAddress.parse(url) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis+sentinel://a/main", SentinelsAddress([("a", 26379)], "main", None, None, {})),
        ("redis+sentinel://a:1,[::1]:2/my%20service/", SentinelsAddress(
            [("a", 1), ("::1", 2)], "my service", None, None, {}
        )),
        ("redis+sentinel://me:s%40c@a/main", SentinelsAddress([("a", 26379)], "main", "me", "s@c", {})),
        ("redis+sentinel://:one@a/main?sentinel_username=you&sentinel_password=t%26o", SentinelsAddress(
            [("a", 26379)], "main", None, "one", {"username": "you", "password": "t&o"}
        )),
    ],
)  # fmt: skip
def test_an_address_of_sentinels_names_a_service_and_perhaps_two_logins(url: str, expected: SentinelsAddress) -> None:
    assert SentinelsAddress.parse(url) == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+cluster://", "host:port,host:port"),
        ("redis+cluster:", "redis+cluster://"),
        ("redis+cluster://a,,b", "host:port,host:port"),
        ("redis+cluster://a:x", "host:port,host:port"),
        ("redis+cluster://a:0", "host:port,host:port"),
        ("redis+cluster://a:65536", "host:port,host:port"),
        ("redis+cluster://::1:7000", "host:port,host:port"),
        ("redis+cluster://[::1", "host:port,host:port"),
        ("redis+cluster://a b", "host:port,host:port"),
        ("redis+cluster://a/3", "no numbered databases"),
        ("redis+cluster://a?db=3", "no numbered databases"),
        ("redis+sentinel://a", "host:port,host:port/service"),
        ("redis+sentinel://a/", "host:port,host:port/service"),
        ("redis+sentinel:///main", "host:port,host:port/service"),
        ("redis+sentinel://a:x/main", "host:port,host:port/service"),
        ("redis+sentinel://a/main/0", "host:port,host:port/service"),
        ("redis+sentinel://a/main?db=3", "sentinel_password"),
        ("http://a", "redis+cluster://host:6379"),
        ("redis://a:port", "redis://a:port"),
    ],
)
def test_a_wrong_address_is_refused_with_an_example(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match="--redis") as refusal:
        backend_at(url, Keys("dev", 8))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://a:6379/0", "redis://a:6379/0"),
        ("redis://:secret@a:6379/0", "redis://:…@a:6379/0"),
        ("redis://me:secret@a", "redis://me:…@a"),
        ("redis://me@a:6379", "redis://me@a:6379"),
        ("redis+cluster://me:secret@a:1,b:2", "redis+cluster://me:…@a:1,b:2"),
        ("redis+cluster://:sec:r/e@t@a:1,b:2", "redis+cluster://:…@a:1,b:2"),
        ("redis+sentinel://:secret@a,b/main", "redis+sentinel://:…@a,b/main"),
        ("redis+sentinel://a/main?sentinel_password=secret", "redis+sentinel://a/main?sentinel_password=…"),
        ("unix://me:secret@/run/redis.sock?db=1", "unix://me:…@/run/redis.sock?db=1"),
        ("redis://a?password=secret&db=1", "redis://a?password=…&db=1"),
    ],
)
def test_no_address_is_shown_with_its_password(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_refusal_shows_no_password() -> None:
    for url in (
        "http://:secret@a",
        "redis://:secret@a:port",
        "redis+cluster://:secret@a:x",
        "redis+sentinel://:secret@a",
    ):
        with pytest.raises(ConfigurationError) as refusal:
            backend_at(url, Keys("dev", 8))
        assert "secret" not in str(refusal.value)
