"""The addresses of --redis: nodes of a cluster, sentinels with their service, users and passwords."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from tidewire.errors import ConfigurationError


class ClusterAddress(NamedTuple):
    """The address redis+cluster://user:password@host:port,host:port."""

    nodes: list[tuple[str, int]]
    username: str | None
    password: str | None

    @classmethod
    def parse(cls, url: str) -> ClusterAddress:
        """Parse an address. Raises ConfigurationError."""
        user, password, nodes, behind = _parts(url, 6379)
        if nodes is None:
            raise ConfigurationError(
                f"--redis {redacted(url)!r}: list one or more of the cluster's nodes, as redis+cluster://host:port,host:port"
            )
        if behind:
            raise ConfigurationError(
                f"--redis {redacted(url)!r}: write nothing after the nodes: a cluster has no numbered databases"
            )
        return cls(nodes, user, password)


class SentinelsAddress(NamedTuple):
    """The address redis+sentinel://user:password@host:port,host:port/service?sentinel_password=….

    User and password are those of the servers. Those of the sentinels are `sentinel_username` and `sentinel_password`.
    """

    nodes: list[tuple[str, int]]
    service: str
    username: str | None
    password: str | None
    sentinel: dict[str, str]

    @classmethod
    def parse(cls, url: str) -> SentinelsAddress:
        """Parse an address. Raises ConfigurationError."""
        user, password, nodes, behind = _parts(url, 26379)
        path, _, query = behind.partition("?")
        service, options = unquote(path.strip("/")), dict(parse_qsl(query, keep_blank_values=True))
        strangers = options.keys() - {"sentinel_username", "sentinel_password"}
        if nodes is None or not service or "/" in service or strangers:
            raise ConfigurationError(
                f"--redis {redacted(url)!r}: write some of the sentinels and the name of the service, as "
                "redis+sentinel://host:port,host:port/service, and the sentinels' own password, if they have one, as "
                "?sentinel_password=…"
            )
        sentinel = {name.removeprefix("sentinel_"): value for name, value in options.items()}
        return cls(nodes, service, user, password, sentinel)


def _parts(url: str, port: int) -> tuple[str | None, str | None, list[tuple[str, int]] | None, str]:
    """Split an address with several nodes into (user, password, nodes, rest). Nodes are None if they are malformed."""
    # A password may contain anything. The rest contains no @.
    login, _, rest = url.partition("://")[2].rpartition("@")
    hosts, *behind = re.split(r"(?=[/?#])", rest, maxsplit=1)
    user, _, password = login.partition(":")
    found = [re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::(\d{1,5}))?", host) for host in hosts.split(",")]
    nodes = [(one[1].strip("[]"), int(one[2] or port)) for one in found if one]
    sound = len(nodes) == len(found) and all(0 < number < 65536 for _, number in nodes)
    after = "".join(behind)
    return unquote(user) or None, unquote(password) or None, nodes if sound else None, "" if after == "/" else after


def check_login(url: str) -> None:
    """Check that a URL can be split: a password with one of / ? # would end the host part early.

    Raises:
        ConfigurationError: the login must be percent-encoded. The message quotes no part of it.
    """
    login, at, _ = url.partition("://")[2].rpartition("@")
    if url.startswith(("redis://", "rediss://")) and at and re.search(r"[/?#]", login):
        raise ConfigurationError(
            "--redis: the user or password holds one of / ? # @: percent-encode it (%2F, %3F, %23, %40)"
        )


def redacted(url: str) -> str:
    """Return an address without its passwords."""
    url = re.sub(r"^([^:]*://[^:@/]*):.*@", r"\1:…@", url, flags=re.DOTALL)
    return re.sub(r"([?&](?:sentinel_)?password=)[^&]*", r"\1…", url)
