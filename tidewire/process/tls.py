"""TLS of the ports that clients connect to: a certificate that is loaded again when its files change."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import structlog

from tidewire.errors import ConfigurationError

log = structlog.get_logger(__name__)

LOOK_S = 5.0
"""Seconds between two looks whether the files have changed."""

_State = list[tuple[int, int, int]]


class Certificate:
    """A certificate chain and its key, in PEM files.

    Raises:
        ConfigurationError: a file cannot be read, or is not what it should be.
    """

    def __init__(self, chain: str, key: str) -> None:
        self._chain, self._key = Path(chain), Path(key)
        try:
            self.context = self._loaded()
            self._state = self._look()
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"--tls-cert {chain} --tls-key {key}: {_why(error)}: a certificate chain and its key are needed, as "
                "PEM files that this process can read"
            ) from None

    async def run(self) -> None:
        """Load the certificate again whenever its files change, until cancelled. Open connections keep the old one."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.reload()

    def reload(self) -> None:
        """Load the certificate again if its files have changed. One that cannot be loaded leaves the old one."""
        try:
            state = self._look()
            if state == self._state:
                return
            self._loaded()  # tried on a context of its own: half of a new pair must not replace the old one
            self.context.load_cert_chain(self._chain, self._key)
        except (OSError, ssl.SSLError) as error:
            log.warning("certificate_not_loaded", chain=str(self._chain), error=_why(error))
            return
        self._state = state
        log.info("certificate_loaded", chain=str(self._chain))

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._chain, self._key)
        return context

    def _look(self) -> _State:
        """Return what changes with the files, also when a link points to other ones."""
        found = [path.stat() for path in (self._chain, self._key)]
        return [(one.st_mtime_ns, one.st_ino, one.st_size) for one in found]


def certificate(chain: str, key: str) -> Certificate | None:
    """Return the certificate that the settings name; None if they name none. Raises ConfigurationError."""
    if bool(chain) != bool(key):
        given, missing = ("--tls-cert", "--tls-key") if chain else ("--tls-key", "--tls-cert")
        raise ConfigurationError(f"{given} needs {missing}")
    return Certificate(chain, key) if chain else None


def _why(error: OSError) -> str:
    return error.strerror or str(error)
