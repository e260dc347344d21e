"""What the connections, the HTTP routes and the tasks of one gateway share: access to store, authorizers and feeds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from tidewire.app import CONNECTIONS, App
from tidewire.errors import PermissionDenied, UnsupportedAction, item_too_large
from tidewire.model.protocol import (
    Auth,
    Disconnect,
    Follow,
    Get,
    Operation,
    Ping,
    Put,
    Query,
    Request,
    Send,
    StoreRequest,
    Transact,
    Unfollow,
    Whoami,
    body_of,
    encode_json,
    parse_operations,
    within_operation,
    write_id_of,
)
from tidewire.model.records import JSON, Command, Principal
from tidewire.model.values import Scalar
from tidewire.process.bus import Bus
from tidewire.process.lifecycle import Service
from tidewire.redis.keys import ServiceKind

from .budget import AnswerBudget, Room, max_bytes
from .feeds import Feeds
from .gatekeeper import Gatekeeper
from .orders import OrderAction, Orders
from .quotas import ConnectionQuota, RequestQuota
from .topics import Topics
from .work import FREE, MAX_HTTP_WAIT_S, Work, WorkBudget

REPLAYED_BYTES_PER_MS = 50_000
"""Bytes of a feed that cost about a millisecond to read and to send to one connection."""
OWN_USER = "tidewire:gateway"
"""The user under which the gateway issues its own commands."""


class Admission(NamedTuple):
    """What a request holds of its user's budgets, from its beginning until its answer has left."""

    room: Room
    work: Work

    def cancel(self) -> None:
        """Give all back: the request was not begun."""
        self.work.cancel()
        self.room.close()

    def close(self) -> None:
        """Give back what is held. May be called again."""
        self.work.close()
        self.room.close()


def require_service(principal: Principal, what: str) -> None:
    """Check that a principal has a service key. Raises PermissionDenied."""
    if principal.role != "service":
        raise PermissionDenied(f"{what} requires a service key")


class Core:
    """The shared parts of one gateway."""

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
        self.topics = Topics(app, self._ask_store_to_follow)
        self.orders = Orders(self.backend, self.bus, self.registry)
        self.answers = AnswerBudget(self.settings.limit_answer_bytes)
        self.work = WorkBudget(self.settings.limit_work_ms_per_s)
        name, live = lambda: self.id, lambda: self.registry.live(ServiceKind.GATEWAY)
        self.connection_quota = ConnectionQuota(self.backend, name, live, self.settings.limit_connections)
        self.request_quota = RequestQuota(self.backend, name, live, self.settings.limit_requests_per_s)

    @property
    def id(self) -> str:
        """The gateway's id. It changes after other gateways considered this one dead."""
        return self.registry.id

    def now_ms(self) -> int:
        """The server's time, in ms since 1970."""
        return self.registry.now_ms()

    async def admit(
        self,
        connection: str | None,
        principal: Principal,
        request: Request,
        request_bytes: int,
        gone: Callable[[], bool] = lambda: False,
    ) -> Admission:
        """Wait until the user's budgets let a request begin. Service keys have no budgets of their own.

        Raises:
            Overloaded: too many bytes of answers were in flight for a while. Nothing was done.
            RateLimited: the user makes too many requests, or they cost too much and this one came over HTTP. Nothing
                was done.
        """
        user = principal.user if principal.role != "service" else None
        if user is not None:
            self.request_quota.take(user)
        answer_bytes = max_bytes(request, self.settings.limit_item_bytes)
        max_wait_s = MAX_HTTP_WAIT_S if connection is None else None
        work = await self.work.admit(user, request.action, request_bytes, answer_bytes, gone, max_wait_s)
        try:
            return Admission(await self.answers.room(connection, user, answer_bytes, gone), work)
        except BaseException:
            work.cancel()
            raise

    def charge(self, principal: Principal, replayed_bytes: int) -> None:
        """Charge a user for entries of a feed that are sent once more, or late."""
        if principal.role != "service":
            self.work.charge(principal.user, replayed_bytes / REPLAYED_BYTES_PER_MS)

    # ── requests of clients ─────────────────────────────────────────────────────────────────────────────────────────

    def begin(
        self, principal: Principal, connection: str | None, request: Request, work: Work = FREE
    ) -> Awaitable[JSON]:
        """Start on a request, over a websocket or HTTP, and return its result to await. `work` learns what it costs.

        A websocket handles requests about itself (`Auth`, `Follow`, `Unfollow`) before it comes here.

        Raises:
            RequestError: the request cannot be started.
        """
        match request:
            case Send():
                return self._send(principal, connection, request)
            case Disconnect():
                return self._disconnect(principal, request)
            case Whoami():
                who = {"user": principal.user, "connection": connection, "claims": principal.claims}
                return _ready(who)
            case Ping():
                return _ready({})
            case Auth() | Follow() | Unfollow():
                raise UnsupportedAction(f"{request.action} works only over a websocket")
        return self._store(principal, connection, request, work)

    async def _send(self, principal: Principal, connection: str | None, request: Send) -> JSON:
        """Send a message: to a user through store and feed, or to one connection, whichever gateway has it."""
        require_service(principal, "send")
        if request.connection is None:
            return await self._store(principal, connection, request)
        message = {"type": "message", "from": principal.user, "body": request.body, "at": self.now_ms()}
        await self.orders.to_connection(OrderAction.DELIVER, request.connection, frame=message)
        return {"delivered": True, "connections": 1}

    async def _disconnect(self, principal: Principal, request: Disconnect) -> JSON:
        """Close connections on every gateway, and count them."""
        require_service(principal, "disconnect")
        whom = {"connections": request.connections, "users": request.users}
        counts = await self.orders.to_all(OrderAction.DISCONNECT, **whom)
        return {"disconnected": sum(counts)}

    def _store(
        self, principal: Principal, connection: str | None, request: StoreRequest | Send, work: Work = FREE
    ) -> asyncio.Future[JSON]:
        """Pass a request to the store of its partition. Raises BadRequest for what is already wrong here."""
        partition = self.backend.keys.partition_of(self._partition_key(request))
        return self._command(
            partition,
            request.action,
            body_of(request),
            principal,
            connection=connection,
            request=write_id_of(request),
            trace=request.traceparent,
            work=work,
        )

    def _partition_key(self, request: StoreRequest | Operation | Send) -> Scalar:
        """The partition-key value that a request is about. Raises BadRequest, TooLarge or PermissionDenied."""
        if isinstance(request, Send):
            return str(request.user)
        if isinstance(request, Transact):
            values = []
            for number, operation in enumerate(parse_operations(request)):
                with within_operation(number):
                    values.append(self._partition_key(operation))
            return values[0]  # the store checks that they are all the same
        table = self.app[request.table]
        if table.name == CONNECTIONS and not isinstance(request, Get | Query):
            raise PermissionDenied("only gateways write the table connections")
        if isinstance(request, Put):
            self._check_size(request.item)
            return table.key_of(request.item).partition
        if not isinstance(request, Query):
            return table.parse_key(request.key).partition
        if request.index is not None:
            return table.parse_index_key(request.index, request.key)
        return table.parse_partition_key(request.key)

    def _check_size(self, item: dict[str, JSON]) -> None:
        limit = self.settings.limit_item_bytes
        size = len(encode_json(item)) if limit else 0
        if size > limit:
            raise item_too_large(size, limit)

    # ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def command(self, partition: int, action: str, body: dict[str, JSON], user: str = OWN_USER) -> JSON:
        """Have a store do a command of the gateway itself, with the rights of a service key. Raises RequestError."""
        return await self._command(partition, action, body, Principal(user, "service", {}, "", None))

    async def _ask_store_to_follow(self, principal: Principal, topic: str) -> None:
        await self._command(self.backend.keys.partition_of(topic), "follow", {"topic": topic}, principal)

    def _command(
        self,
        partition: int,
        action: str,
        body: dict[str, JSON],
        principal: Principal,
        *,
        connection: str | None = None,
        request: str | None = None,
        trace: str | None = None,
        work: Work = FREE,
    ) -> asyncio.Future[JSON]:
        """Add a command to a partition's stream, and return its result to await."""
        deadline = self.now_ms() + int(self.settings.request_timeout_s * 1000)
        reply_to = self.id

        def record(number: int) -> Command:
            return Command(
                action=action,
                body={"action": action} | body,
                user=principal.user,
                role=principal.role,
                claims=principal.claims,
                connection=connection,
                request=request,
                request_ttl_ms=int(1000 * self.settings.request_window_s),
                deadline=deadline,
                reply_to=reply_to,
                number=number,
                trace=trace,
            )

        return self.bus.request(self.backend.keys.commands(partition), record, work.cost)


async def _ready(result: JSON) -> JSON:
    return result
