"""What the connections, the HTTP routes and the tasks of one gateway share: where requests go, and who is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from tidewire.app import CONNECTIONS, App
from tidewire.errors import PermissionDenied, TooLarge
from tidewire.model.protocol import (
    STORE_ACTIONS,
    WRITES,
    Get,
    Put,
    Query,
    Send,
    Transact,
    encode_json,
    parse_operations,
    within_operation,
)
from tidewire.model.records import Command, Principal
from tidewire.model.values import Scalar
from tidewire.process.bus import Bus
from tidewire.process.lifecycle import Service

from .budget import AnswerBudget, Room, max_bytes
from .direct import Direct
from .feeds import Feeds
from .gatekeeper import Gatekeeper
from .topics import Topics


class Core:
    """One gateway's way to the store, the authorizers and the feeds."""

    def __init__(self, service: Service, app: App) -> None:
        self.service = service
        self.registry = service.registry
        self.app = app
        self.settings = service.settings
        self.backend = service.backend
        self.bus = Bus(
            self.backend,
            lambda: self.id,
            timeout_s=self.settings.request_timeout_s,
            max_queued=self.settings.commands_max,
            max_queued_bytes=self.settings.commands_bytes,
        )
        self.gatekeeper = Gatekeeper(self.backend, self.bus, lambda: self.id, self.now_ms, self.settings.auth_cache_s)
        self.feeds = Feeds(self.backend, self.settings.resume_window_s)
        self.topics = Topics(app, self._may_follow)
        self.direct = Direct(self.backend, self.bus, self.registry)
        self.answers = AnswerBudget(self.settings.limit_answer_bytes)

    @property
    def id(self) -> str:
        """The gateway's id: another one after it was counted dead."""
        return self.registry.id

    def now_ms(self) -> int:
        return self.registry.now_ms()

    async def room(
        self, connection: str | None, principal: Principal, request: Any, gone: Callable[[], bool] = lambda: False
    ) -> Room:
        """Room for the request's answer. Raises Overloaded when there is none for a while."""
        user = principal.user if principal.role != "service" else None
        return await self.answers.room(connection, user, max_bytes(request, self.settings.limit_item_bytes), gone)

    def begin(
        self, principal: Principal, connection: str | None, frame: dict[str, Any], request: Any
    ) -> Awaitable[Any]:
        """Start on a request; what is awaited is its result. Raises RequestError when it cannot be started."""
        if isinstance(request, Send):
            return self.send(principal, connection, frame, request)
        if request.action in STORE_ACTIONS:
            return self.store(principal, connection, frame, request)
        return self._here(principal, connection, request.action)

    async def _here(self, principal: Principal, connection: str | None, action: str) -> dict[str, Any]:
        if action == "ping":
            return {}
        return {"user": principal.user, "connection": connection, "claims": principal.claims}

    async def send(self, principal: Principal, connection: str | None, frame: dict[str, Any], request: Send) -> Any:
        """A message: to a user by store and feed, to a connection at once, wherever it is."""
        if principal.role != "service":
            raise PermissionDenied("send is for service keys alone")
        if request.connection is None:
            return await self.store(principal, connection, frame, request)
        message = {"type": "message", "from": principal.user, "body": request.body, "at": self.now_ms()}
        await self.direct.send(request.connection, message)
        return {"delivered": True, "connections": 1}

    def store(
        self, principal: Principal, connection: str | None, frame: dict[str, Any], request: Any
    ) -> asyncio.Future[Any]:
        """Pass a request on to the store. Raises BadRequest for what can be seen to be wrong from here."""
        body = {name: value for name, value in frame.items() if name not in ("id", "request", "traceparent")}
        partition_key = self._partition_key(request)
        keys = self.backend.keys
        id_: str | None = request.request if request.action in WRITES else None
        ttl_ms = int(1000 * self.settings.request_window_s)
        deadline = self.now_ms() + int(self.settings.request_timeout_s * 1000)

        def record(number: int) -> Command:
            return Command(
                request.action,
                body,
                principal.user,
                principal.role,
                principal.claims,
                connection,
                id_,
                ttl_ms,
                deadline,
                self.id,
                number,
                request.traceparent,
            )

        return self.bus.request(keys.commands(keys.partition_of(partition_key)), record)

    def _partition_key(self, request: Any) -> Scalar:
        """The partition-key value that a request is about. Raises BadRequest or TooLarge for what is wrong with it."""
        if isinstance(request, Send):
            return str(request.user)
        if isinstance(request, Transact):
            # That all operations have the same one is for the store to see.
            found = []
            for number, operation in enumerate(parse_operations(request)):
                with within_operation(number):
                    found.append(self._partition_key(operation))
            return found[0]
        table = self.app[request.table]
        if table.name == CONNECTIONS and not isinstance(request, Get | Query):
            raise PermissionDenied("connections are written by the gateways alone")
        if isinstance(request, Put):
            self._check_size(request.item)
            return table.key_of(request.item).partition
        if not isinstance(request, Query):
            return table.parse_key(request.key).partition
        if request.index is not None:
            return table.parse_index_key(request.index, request.key)
        return table.parse_partition_key(request.key)

    async def command(
        self,
        action: str,
        body: dict[str, Any],
        key: Scalar | None = None,
        *,
        partition: int | None = None,
        user: str = "tidewire:gateway",
    ) -> Any:
        """A command of the gateway itself, to the partition of a key or to a given one."""
        keys = self.backend.keys
        to = keys.partition_of(cast(Scalar, key)) if partition is None else partition
        return await self._ask_store(to, action, body, Principal(user, "service", {}, "", None))

    async def _may_follow(self, principal: Principal, topic: str) -> None:
        await self._ask_store(self.backend.keys.partition_of(topic), "follow", {"topic": topic}, principal)

    async def _ask_store(self, partition: int, action: str, body: dict[str, Any], principal: Principal) -> Any:
        deadline = self.now_ms() + int(self.settings.request_timeout_s * 1000)
        reply_to = self.id

        def record(number: int) -> Command:
            frame = {"action": action, **body}
            who = (principal.user, principal.role, principal.claims)
            return Command(action, frame, *who, None, None, 0, deadline, reply_to, number)

        return await self.bus.request(self.backend.keys.commands(partition), record)

    def _check_size(self, item: dict[str, Any]) -> None:
        limit = self.settings.limit_item_bytes
        size = len(encode_json(item)) if limit else 0
        if size > limit:
            raise TooLarge(f"the item has {size} bytes as JSON; at most {limit} are allowed", limit=limit, size=size)
