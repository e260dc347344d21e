"""One open connection, from its welcome to its end: requests, replies, and the credential."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine

import structlog
from redis.exceptions import RedisError
from websockets.exceptions import ConnectionClosed

from tidewire.errors import BadRequest, Internal, Overloaded, RequestError, Unauthenticated
from tidewire.model.protocol import (
    Auth,
    Follow,
    Get,
    Query,
    Request,
    RequestId,
    Unfollow,
    decode_frame,
    encode_json,
    encode_msgpack,
    id_of_refused,
    parse_request,
    request_id,
)
from tidewire.model.records import JSON, Principal
from tidewire.tasks import end

from .budget import Room
from .core import Admission, Core
from .deadline import Deadline
from .frames import Gathered
from .peers import Mark, Peer
from .subscriptions import Openings, Subscriptions
from .work import Work

log = structlog.get_logger(__name__)

MAX_UNANSWERED = 64
"""Maximum unanswered requests of one connection. The gateway reads nothing more from it at this limit."""
EXPIRING_S = 60.0
"""Seconds before the credential expires at which the peer is warned."""
MAX_CLEARING_S = 60.0
"""Maximum seconds for a refused handshake to leave its feeds. Calls to Redis give up long before."""


class Connection:
    """One connection of one user. It lives as long as `run` does."""

    def __init__(self, core: Core, peer: Peer, principal: Principal, deadline: Deadline) -> None:
        self.core = core
        self.peer = peer
        self.principal = principal
        self.begun = asyncio.Event()
        """Set when the connection is welcomed, is refused, or has ended."""
        self.refused: RequestError | None = None
        self.id = f"{core.id}-{secrets.token_hex(6)}"
        self.binary = peer.binary
        self.write_gathered: Callable[[Gathered], None] = peer.write_gathered
        """Queues frames without waiting. The caller has checked that the connection is not `full`."""
        self._max_queued_bytes = core.settings.limit_queued_bytes or sys.maxsize
        self.connected_at = self.active_at = core.now_ms()
        self.open = True
        self.welcomed = False
        self.subscriptions = Subscriptions(core, self, deadline)
        self._deadline = deadline
        self._tasks: set[asyncio.Task[None]] = set()
        self._unanswered = 0
        self._may_begin = asyncio.Event()
        """Set while fewer than MAX_UNANSWERED requests are unanswered."""
        self._may_begin.set()
        self.answered = asyncio.Event()
        """Set while no request is unanswered."""
        self.answered.set()
        self._expiry: asyncio.Task[None] | None = None

    async def run(self, cursor: str | None, topics: dict[str, str]) -> None:
        """Serve the connection, from the welcome to its end."""
        beginning = asyncio.create_task(self._begin(cursor, topics), name="begin")
        try:
            opened = await self._deadline.bound(beginning)
            await self.subscriptions.start(opened)
            self._watch_expiry()
            await self.peer.receive(self._received)
        except ConnectionClosed:
            pass
        except Unauthenticated as error:
            await self._refuse(error, 4401, error.message)
        except (RequestError, RedisError, OSError) as error:
            log.warning("connection_failed", connection=self.id, error=str(error))
            await self._refuse(error, 1013, "try again later")
        finally:
            self.open = False
            self.begun.set()
            # A refused handshake has told its peer by now. It still leaves the feeds that it was about to follow.
            await end([beginning], ask_again_s=MAX_CLEARING_S)
            for task in self._tasks:
                task.cancel()
            await self.subscriptions.close()

    async def _begin(self, cursor: str | None, topics: dict[str, str]) -> Openings:
        """Subscribe, read what was missed, and send the welcome."""
        opened = await self.subscriptions.open(cursor, topics)
        self.core.gatekeeper.check(self.principal)  # the credential may have been revoked meanwhile
        self._deadline.step = "the peer to read its welcome"
        own = opened.own
        await self.send(
            {
                "type": "welcome",
                "connection": self.id,
                "user": self.principal.user,
                "cursor": str(own.subscription.cursor),
                "resumed": own.resumed,
                "replayed": sum(map(self.subscriptions.concerns, own.missed)),
                "topics": {str(one.subscription.feed.topic): str(one.subscription.cursor) for one in opened.topics},
            },
            *((one.subscription.feed.topic, str(one.subscription.cursor)) for one in (own, *opened.topics)),
        )
        self.welcomed = True
        self.begun.set()
        return opened

    # ── frames to the peer ──────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, frame: JSON) -> bytes:
        """Encode a frame in the peer's encoding."""
        return encode_msgpack(frame) if self.binary else encode_json(frame)

    def full(self) -> bool:
        """Whether the peer is so slow that nothing more is queued for it."""
        return self.peer.queued_bytes() > self._max_queued_bytes

    def write(self, data: bytes, *marks: Mark) -> None:
        """Queue an encoded frame without waiting. The caller has checked that the connection is not `full`."""
        self.peer.write(data, *marks)

    async def send(self, frame: JSON, *marks: Mark) -> None:
        """Send a frame, waiting while the peer is slow. Raises ConnectionClosed."""
        await self.peer.send(self.encode(frame), *marks)

    async def send_encoded(self, data: bytes, *marks: Mark) -> None:
        """Send an encoded frame, waiting while the peer is slow. Raises ConnectionClosed."""
        await self.peer.send(data, *marks)

    def description(self) -> dict[str, JSON]:
        """Return its beginning, when the peer last sent something (ms since 1970), address and user agent."""
        return {
            "connected_at": self.connected_at,
            "active_at": self.active_at,
            "source_ip": self.peer.source_ip,
            "user_agent": self.peer.user_agent,
        }

    async def close(self, code: int, reason: str) -> None:
        """Close with a code of RFC 6455, section 7.4, or one of ours."""
        await self.peer.close(code, reason)

    async def _refuse(self, error: Exception, code: int, reason: str) -> None:
        self.refused = error if isinstance(error, RequestError) else Overloaded("Redis does not answer: connect again")
        self.begun.set()
        await self.close(code, reason)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None] | None:
        """Start a task that ends with the connection, and closes it if it fails. None if the connection has ended."""

        async def guarded() -> None:
            try:
                await work
            except ConnectionClosed:
                pass
            except (RedisError, OSError) as error:
                log.warning("connection_failed", connection=self.id, error=str(error))
                await self.close(1013, "try again later")
            except Exception:
                log.exception("connection_task_failed", connection=self.id)
                await self.close(1011, "internal error")

        if not self.open:
            work.close()
            return None
        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # a task that is cancelled before it begins never awaits it
        return task

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _received(self, message: str | bytes) -> None:
        """Start on one frame of the peer. Answers are sent in the background."""
        self.active_at = self.core.now_ms()
        while self.full():  # noqa: ASYNC110 - the transport has no event for it
            await asyncio.sleep(0.02)  # a peer that does not read is not read from
        await self._may_begin.wait()
        self._count(1)
        frame: dict[str, JSON] = {}
        admission: Admission | None = None
        try:
            frame = decode_frame(message, binary=self.binary)
            request = parse_request(frame)
            admission = await self.core.admit(
                self.id, self.principal, request, len(message), lambda: not self.peer.is_open()
            )
            if isinstance(request, Get | Query) and not self.peer.is_open():
                raise ConnectionClosed(None, None)  # nobody would read the answer. A write is still done
            result = self._begin_request(request, admission.work)
        except (RequestError, ConnectionClosed) as error:
            self._count(-1)
            if admission:
                admission.cancel()
            if isinstance(error, RequestError):
                id_ = request_id(frame) if frame else id_of_refused(message, binary=self.binary)
                await self.send(error.as_frame(id_))
            return
        task = self.spawn(self._answer(request.id, result, admission.room))
        if task:
            task.add_done_callback(lambda _: admission.close())
        else:
            admission.close()

    def _count(self, by: int) -> None:
        """Add to the number of unanswered requests."""
        self._unanswered += by
        (self._may_begin.set if self._unanswered < MAX_UNANSWERED else self._may_begin.clear)()
        (self.answered.clear if self._unanswered else self.answered.set)()

    def _begin_request(self, request: Request, work: Work) -> Awaitable[JSON]:
        """Start on a request, and return its result to await.

        It is started in the order of arrival. From the store's stream on, the order is that of the stream.
        """
        match request:
            case Auth():
                return self._renew(request)
            case Follow():
                return self.subscriptions.follow(request)
            case Unfollow():
                return self.subscriptions.unfollow(request.topic)
        return self.core.begin(self.principal, self.id, request, work)

    async def _answer(self, id_: RequestId, result: Awaitable[JSON], room: Room) -> None:
        """Send the reply or the error of a request. `follow` returns None: it has replied itself."""
        try:
            try:
                answer = await result
            except RequestError as error:
                await self.send(error.as_frame(id_))
            except (RedisError, OSError):
                raise  # it may be half done. The connection ends, and its peer comes back
            except Exception:
                log.exception("request_failed", connection=self.id)
                await self.send(Internal("something went wrong on the server").as_frame(id_))
            else:
                if id_ is not None and answer is not None:
                    data = self.encode({"type": "reply", "id": id_, "result": answer})
                    room.resize(len(data))
                    await self.peer.send(data)
        finally:
            self._count(-1)

    # ── credentials ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _renew(self, request: Auth) -> dict[str, JSON]:
        """Replace the credential of the connection by one of the same user."""
        principal = await self.core.gatekeeper.authorize(request.auth_key)
        if principal.user != self.principal.user:
            raise Unauthenticated("this connection is another user's: open a new one")
        if request.cursor is not None or request.topics:
            raise BadRequest("auth: cursor and topics belong to the first frame of a connection")
        before, self.principal = self.principal, principal
        self._watch_expiry()
        if before.claims != principal.claims:
            await self.subscriptions.claims_changed(before)
        return {"user": principal.user, "claims": principal.claims, "expires_at": principal.expires_at}

    def _watch_expiry(self) -> None:
        if self._expiry:
            self._expiry.cancel()
            self._expiry = None
        if self.principal.expires_at is not None:
            self._expiry = asyncio.create_task(self._expire(self.principal.expires_at))
            self._tasks.add(self._expiry)

    async def _expire(self, at_ms: int) -> None:
        """Warn the peer before its credential expires, and close the connection when it does."""
        left_s = (at_ms - self.core.now_ms()) / 1000
        begun = time.monotonic()
        with contextlib.suppress(ConnectionClosed):
            await asyncio.sleep(max(left_s - EXPIRING_S, 0))
            left_s -= time.monotonic() - begun
            await self.send({"type": "expiring", "in_ms": max(int(left_s * 1000), 0)})
            await asyncio.sleep(max(left_s, 0))
            await self.close(4401, "the credential has expired")
