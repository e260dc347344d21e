"""API keys in Redis: creation, listing and revocation."""

from __future__ import annotations

import time
from typing import Any

from tidewire.model.credentials import ApiKey
from tidewire.model.records import Credential, pack, text, unpack
from tidewire.redis.backend import Backend

REVOCATIONS_KEPT = 100_000
CREDENTIALS = "credentials"
"""Field of the stage's settings, which is set once the stage has a credential."""


async def create(
    backend: Backend,
    user: str,
    *,
    role: str = "client",
    claims: dict[str, Any] | None = None,
    ttl_s: float | None = None,
) -> ApiKey:
    """Create a key for a user, and return it. Redis keeps only its hash."""
    key, now = ApiKey.new(), int(time.time() * 1000)
    expires_at = None if ttl_s is None else now + int(ttl_s * 1000)
    credential = Credential(key.digest, user, role, claims or {}, now, expires_at, None)
    await backend.commands.hset(backend.keys.credentials(), key.id, pack(credential))
    await note_credentials(backend)
    return key


async def note_credentials(backend: Backend) -> None:
    """Note in the stage's settings that it has credentials. If they are missing later, they were lost."""
    await backend.commands.hset(backend.keys.stage_settings(), CREDENTIALS, "1")


async def credentials_lost(backend: Backend) -> bool:
    """Whether all credentials of the stage, or its settings, are lost.

    A server that evicts keys loses them, and so does one that restarts without its file.
    """
    if await backend.commands.exists(backend.keys.credentials()):
        return False
    partitions, noted = await backend.commands.hmget(backend.keys.stage_settings(), "partitions", CREDENTIALS)
    return bool(noted) or not partitions


async def listing(backend: Backend) -> list[dict[str, Any]]:
    """Return all keys, the oldest first, without their hashes."""
    raw = await backend.commands.hgetall(backend.keys.credentials())
    found = []
    for id_, record in raw.items():
        credential = Credential(*unpack(record))
        found.append({"id": text(id_), **{k: v for k, v in credential._asdict().items() if k != "digest"}})
    return sorted(found, key=lambda key: (key["created_at"], key["id"]))


async def revoke(backend: Backend, id_: str) -> bool:
    """Refuse a key from now on, and close its connections. Returns False if there is no such key."""
    raw = await backend.commands.hget(backend.keys.credentials(), id_)
    if raw is None:
        return False
    credential = Credential(*unpack(raw))
    revoked = credential._replace(revoked_at=credential.revoked_at or int(time.time() * 1000))
    keys = backend.keys
    await backend.functions.credential_revoke(
        keys.credentials(), keys.revocations(), id_, pack(revoked), REVOCATIONS_KEPT
    )
    return True
