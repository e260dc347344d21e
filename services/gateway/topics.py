"""Which topics each connection follows, and which others a user may follow."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tidewire.app import App
from tidewire.audiences import Audience, Claim, Everyone, Intersection, Union, claim_topic
from tidewire.errors import NotFound
from tidewire.model.records import Principal

ANY_CLAIM = "*"
"""Stands for any claim: `readers` is a function, which may return an audience of any claim."""


class Topics:
    """The topics of an application. `ask` asks the store whether a principal may follow a topic."""

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

    def granted(self, principal: Principal) -> set[str]:
        """Topics that the principal's connections follow without asking.

        Those of tables that everyone may be able to read, and those of its claims.
        """
        return self._tables | {
            claim_topic(name, value)
            for name, value in principal.claims.items()
            if (name in self._claims or ANY_CLAIM in self._claims) and isinstance(value, str | int | float)
        }

    def open_to_all(self, topic: str) -> bool:
        """Whether every user may follow the topic. False if there is no such topic."""
        families = self._app.families(topic)
        return bool(families) and all(isinstance(family.followers, Everyone) for family, _ in families)

    async def check(self, principal: Principal, topic: str) -> None:
        """Check that the principal may follow a topic.

        Raises:
            NotFound: there is no such topic.
            PermissionDenied: the principal may not follow it.
        """
        if topic in self.granted(principal):
            return
        if not self._app.families(topic):
            raise NotFound(f"there is no topic {topic[:200]!r}")
        if not self.open_to_all(topic):
            await self._ask(principal, topic)


def _open_to(readers: Any) -> tuple[bool, set[str]]:
    """Whether `readers` can let every user read an item, and the claims whose holders it can let read one."""
    if not isinstance(readers, Audience):
        return True, {ANY_CLAIM}
    if isinstance(readers, Union | Intersection):
        (left, left_claims), (right, right_claims) = _open_to(readers.left), _open_to(readers.right)
        if isinstance(readers, Union):
            return left or right, left_claims | right_claims
        if not (left or left_claims) or not (right or right_claims):
            return False, set()
        return left and right, left_claims | right_claims
    return isinstance(readers, Everyone), {readers.name} if isinstance(readers, Claim) else set()
