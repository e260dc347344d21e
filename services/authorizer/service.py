"""The authorizer process. Any live authorizer answers a question; if it dies meanwhile, another one takes over."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from prometheus_client import Counter
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from tidewire.errors import Overloaded, RequestError, Unauthenticated
from tidewire.model.credentials import ApiKey, verify
from tidewire.model.records import Authorization, Credential, Reply, stream_id, unpack
from tidewire.process.bus import Answers
from tidewire.process.lifecycle import Service
from tidewire.redis import keyring
from tidewire.redis.backend import Backend, StreamEntry
from tidewire.redis.keys import ConsumerGroup

log = structlog.get_logger(__name__)

ABANDONED_MS = 2000
"""Milliseconds after which another authorizer takes over a question that was not answered."""
BATCH = 100
"""Questions that an authorizer reads at a time."""

MISSING = Counter(
    "tidewire_authorizer_credentials_missing_total", "Questions that found the stage's credentials gone as a whole."
)
ANSWERS = Counter("tidewire_authorizer_answers_total", "Questions answered.", ["outcome"])


class Authorizer:
    """Reads the gateways' questions, as one of several competing consumers, and answers them."""

    def __init__(self, backend: Backend, service: Service) -> None:
        self._backend = backend
        self._answers = Answers(backend)
        self._registry = service.registry
        self._stream = backend.keys.authorizations()

    async def run(self) -> None:
        """Answer questions until cancelled."""
        while True:
            try:
                await self._backend.ensure_group(self._stream, ConsumerGroup.AUTHORIZER)
                await self._note_credentials()
                while True:
                    await self._turn()
            except (RedisError, OSError) as error:
                log.warning("authorizations_not_read", error=str(error))
                await asyncio.sleep(0.2)

    async def _turn(self) -> None:
        entries = await self._abandoned()
        entries += await self._backend.read_group(self._stream, ConsumerGroup.AUTHORIZER, self._registry.id, BATCH)
        if not entries:
            return
        replies: dict[str, list[Reply]] = {}
        for question, key in _questions(entries):
            replies.setdefault(question.reply_to, []).append(await self._answer(question.number, key))
        # Answer before acknowledging: after a crash between the two, a gateway gets two answers, and takes the first.
        self._answers.send(replies)
        await self._answers.sent()
        await self._backend.commands.xack(self._stream, ConsumerGroup.AUTHORIZER, *(id_ for id_, _ in entries))
        await self._trim(entries[-1][0])

    async def _note_credentials(self) -> None:
        """Note that the stage has credentials, for stages that a release without this note created."""
        if await self._backend.commands.exists(self._backend.keys.credentials()):
            try:
                await keyring.note_credentials(self._backend)
            except OutOfMemoryError as error:
                log.warning("credentials_not_noted", error=str(error))

    async def _abandoned(self) -> list[StreamEntry]:
        found: Any = await self._backend.commands.xautoclaim(
            self._stream, ConsumerGroup.AUTHORIZER, self._registry.id, ABANDONED_MS, "0-0", count=BATCH
        )
        return [(id_, fields) for id_, fields in found[1] if fields]

    async def _answer(self, number: int, key: ApiKey | None) -> Reply:
        try:
            if key is None:
                raise Unauthenticated("the auth_key is not valid: it has the form tw_<id>_<secret>")
            raw = await self._backend.commands.hget(self._backend.keys.credentials(), key.id)
            if raw is None and await keyring.credentials_lost(self._backend):
                log.error("credentials_lost", advice="restore the stage from a backup, or create new keys")
                MISSING.inc()
                raise Overloaded("the credentials of this stage cannot be read: try again later")
            credential = Credential(*unpack(raw)) if raw else None
            principal = verify(key, credential, self._registry.now_ms())
        except RequestError as error:
            ANSWERS.labels("unavailable" if error.retry else "refused").inc()
            return Reply(number, None, {"code": error.code, "message": error.message, "details": error.details})
        ANSWERS.labels("admitted").inc()
        return Reply(number, principal, None)

    async def _trim(self, last: bytes) -> None:
        """Remove questions that are answered."""
        pending: Any = await self._backend.commands.xpending(self._stream, ConsumerGroup.AUTHORIZER)
        oldest = pending["min"]
        ms, seq = stream_id(oldest) if oldest else stream_id(last)
        await self._backend.commands.xtrim(self._stream, minid=f"{ms}-{seq}", approximate=False)


def _questions(entries: list[StreamEntry]) -> list[tuple[Authorization, ApiKey | None]]:
    questions = []
    for _, fields in entries:
        try:
            question = Authorization(*unpack(fields[b"r"]))
        except Exception:
            log.exception("authorization_unreadable")
            continue
        questions.append((question, ApiKey.parse(question.auth_key)))
    return questions


async def forget_consumer(backend: Backend, consumer: str) -> None:
    """Remove a consumer from the group, unless it has unanswered questions."""
    try:
        pending: Any = await backend.commands.xpending_range(
            backend.keys.authorizations(), ConsumerGroup.AUTHORIZER, "-", "+", 1, consumername=consumer
        )
        if not pending:
            await backend.commands.xgroup_delconsumer(backend.keys.authorizations(), ConsumerGroup.AUTHORIZER, consumer)
    except ResponseError as error:
        log.warning("consumer_not_removed", error=str(error))


def build(service: Service) -> Authorizer:
    """Wire the authorizer into a service process."""
    authorizer = Authorizer(service.backend, service)
    service.run(authorizer.run)

    async def leave() -> None:
        try:
            await forget_consumer(service.backend, service.registry.id)
            await service.registry.leave()
        except (RedisError, OSError) as error:
            log.warning("not_left", error=str(error))

    service.at_drain(leave)
    return authorizer
