"""The services of a stage: how each is built, and what it needs.

`tidewire up`, the service commands and `tidewire.testing` all read this table. A new service is one more row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tidewire.redis.keys import ServiceKind

if TYPE_CHECKING:  # every command reads this table, and must start quickly
    import socket
    from contextlib import AbstractAsyncContextManager

    from tidewire.app import App
    from tidewire.process.lifecycle import Service


class Listener(Protocol):
    """A service that clients connect to."""

    def listening(self, ws: socket.socket, http: socket.socket) -> AbstractAsyncContextManager[Any]:
        """Accept websockets and HTTP on these bound sockets while the block runs."""


class Wiring(NamedTuple):
    """One kind of service."""

    kind: ServiceKind
    help: str
    """The description of its command."""
    build: Callable[[Service, App], Any]
    """Add the service's tasks to a process. Returns a `Listener` when `listens`."""
    listens: bool = False
    """Whether clients connect to it, so that it needs the websocket and HTTP ports."""
    writes: bool = False
    """Whether it confirms writes, so that it needs to know their durability."""


# Each module is imported when its service is built: a process runs one service.


def _store(service: Service, app: App) -> Any:
    from .store.service import build

    return build(service, app)


def _broadcaster(service: Service, app: App) -> Any:
    from .broadcaster.service import build

    return build(service, app)


def _authorizer(service: Service, app: App) -> Any:
    from .authorizer.service import build

    return build(service)


def _gateway(service: Service, app: App) -> Any:
    from .gateway.service import build

    return build(service, app)


WIRING = {
    wiring.kind: wiring
    for wiring in (
        Wiring(ServiceKind.STORE, "Run a store: it appends every change to its stream.", _store, writes=True),
        Wiring(
            ServiceKind.BROADCASTER,
            "Run a broadcaster: it passes changes to the users entitled to them.",
            _broadcaster,
        ),
        Wiring(ServiceKind.AUTHORIZER, "Run an authorizer: it checks credentials.", _authorizer),
        Wiring(ServiceKind.GATEWAY, "Run a gateway: it serves websockets and HTTP.", _gateway, listens=True),
    )
}
"""By kind, in the order in which `tidewire up` starts them."""
