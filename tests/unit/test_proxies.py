"""Whose word about a client's address counts."""

from __future__ import annotations

import pytest

from tidewire.errors import ConfigurationError
from tidewire.services.gateway.proxies import TrustedProxies


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "source"),
    [
        ("", "10.0.0.7", ["1.2.3.4"], "10.0.0.7"),
        ("", "127.0.0.1", ["1.2.3.4"], "127.0.0.1"),
        ("10.0.0.7", "10.0.0.7", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.7", "10.0.0.8", ["1.2.3.4"], "10.0.0.8"),
        ("10.0.0.0/8", "10.0.0.7", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.7", ["1.2.3.4, 10.9.9.9"], "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.7", ["6.6.6.6", "1.2.3.4", "10.9.9.9"], "1.2.3.4"),
        ("10.0.0.0/8", "10.0.0.7", ["10.1.1.1"], "10.1.1.1"),
        ("10.0.0.0/8", "10.0.0.7", [], "10.0.0.7"),
        ("10.0.0.0/8", "10.0.0.7", ["", "1.2.3.4, nonsense"], "10.0.0.7"),
        ("10.0.0.0/8", "10.0.0.7", ["1.2.3.4:5555"], "1.2.3.4"),
        ("::1", "::1", ["[2001:db8::1]:80"], "2001:db8::1"),
        ("10.0.0.7", "::ffff:10.0.0.7", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.7, 10.0.0.8", "10.0.0.8", ["1.2.3.4, 10.0.0.7"], "1.2.3.4"),
    ],
)
def test_the_source_is_the_last_address_that_no_trusted_proxy_has(
    trusted: str, peer: str, forwarded: list[str], source: str
) -> None:
    assert TrustedProxies(trusted).source(peer, forwarded) == source


@pytest.mark.parametrize("setting", ["nginx", "10.0.0.0/99", "10.0.0.7,,x"])
def test_an_entry_that_is_no_network_is_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match="neither an address nor a network"):
        TrustedProxies(setting)
