"""Proxies in front of the gateway: which are trusted to report a client's address."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from tidewire.errors import ConfigurationError


class TrustedProxies:
    """The proxies of `--trusted-proxies`: addresses and networks.

    Raises:
        ConfigurationError: an entry is neither.
    """

    def __init__(self, setting: str) -> None:
        self._networks: list[IPv4Network | IPv6Network] = []
        for entry in filter(None, map(str.strip, setting.split(","))):
            try:
                self._networks.append(ip_network(entry, strict=False))
            except ValueError:
                raise ConfigurationError(
                    f"--trusted-proxies {entry!r} is neither an address nor a network: write 10.0.0.7 or 10.0.0.0/8"
                ) from None

    def source(self, peer: str, forwarded: Iterable[str]) -> str:
        """Return the address of a client.

        Args:
            peer: the address of the socket's other end.
            forwarded: the values of all headers X-Forwarded-For. Each proxy has added the address of its peer at the
                end, so what stands to the left of the last address that is no trusted proxy's may be forged.
        """
        found = peer
        for hop in reversed([hop.strip() for value in forwarded for hop in value.split(",")]):
            address = _address(hop)
            if address is None or not self._trusts(found):
                break
            found = str(address)
        return found

    def _trusts(self, text: str) -> bool:
        address = _address(text)
        return address is not None and any(address in network for network in self._networks)


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address, perhaps with brackets and a port. One that maps an IPv4 address is that address."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
