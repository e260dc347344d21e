"""Which topics a connection follows without asking, and which it may follow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tidewire.app import App
from tidewire.audiences import Audience, Claim, Everyone, Intersection, Union, claim_topic
from tidewire.errors import NotFound
from tidewire.model.records import Principal

ANY = "*"
"""In place of a claim's name: a function may return an audience of any."""


class Topics:
    """Of one application. `ask` puts the question whether a principal may follow a topic to the store."""

    def __init__(self, app: App, ask: Callable[[Principal, str], Awaitable[Any]]) -> None:
        self._app = app
        self._ask = ask
        self._tables: set[str] = set()
        self._claims: set[str] = set()
        for name, table in app.tables.items():
            everyone, claims = _open_to(table.readers)
            self._claims |= claims
            if everyone:
                self._tables.add(name)

    def given(self, principal: Principal) -> set[str]:
        """Those that the principal's connections follow without asking."""
        return self._tables | {
            claim_topic(name, value)
            for name, value in principal.claims.items()
            if (name in self._claims or ANY in self._claims) and isinstance(value, str | int | float)
        }

    def open_to_all(self, topic: str) -> bool:
        """Whether everyone may follow the topic. False for one that does not exist."""
        families = self._app.families(topic)
        return bool(families) and all(isinstance(family.followers, Everyone) for family, _ in families)

    async def check(self, principal: Principal, topic: str) -> None:
        """Raises NotFound where there is no such topic, PermissionDenied where the principal may not follow it."""
        if topic in self.given(principal):
            return
        if not self._app.families(topic):
            raise NotFound(f"there is no topic {topic[:200]!r}")
        if not self.open_to_all(topic):
            await self._ask(principal, topic)


def _open_to(readers: Any) -> tuple[bool, set[str]]:
    """Whether items may be everyone's, and the claims to whose holders they may be open."""
    if not isinstance(readers, Audience):
        return True, {ANY}
    if isinstance(readers, Union | Intersection):
        (left, left_claims), (right, right_claims) = _open_to(readers.left), _open_to(readers.right)
        if isinstance(readers, Union):
            return left or right, left_claims | right_claims
        if not (left or left_claims) or not (right or right_claims):
            return False, set()
        return left and right, left_claims | right_claims
    return isinstance(readers, Everyone), {readers.name} if isinstance(readers, Claim) else set()
