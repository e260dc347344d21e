"""API keys: `tw_<id>_<secret>`, with a secret of 192 random bits. Only its SHA-256 is stored."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import NamedTuple

from tidewire.errors import Unauthenticated
from tidewire.model.records import Credential, Principal

SECRET_BYTES = 24


class ApiKey(NamedTuple):
    id: str
    secret: str

    def __str__(self) -> str:
        return f"tw_{self.id}_{self.secret}"

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.secret.encode()).digest()

    @classmethod
    def new(cls) -> ApiKey:
        return cls(secrets.token_hex(6), secrets.token_hex(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> ApiKey | None:
        """Parse a key, or return None if the text has another form."""
        parts = text.split("_")
        sound = len(parts) == 3 and parts[0] == "tw" and all(part.isascii() and part.isalnum() for part in parts[1:])
        return cls(parts[1], parts[2]) if sound and len(text) <= 200 else None


def verify(key: ApiKey, credential: Credential | None, now_ms: int) -> Principal:
    """Return whom a key stands for. Raises Unauthenticated, without the reason."""
    # Compare even without a credential, so that the time taken does not tell which ids exist.
    matches = hmac.compare_digest(key.digest, credential.digest if credential else bytes(32))
    if credential is None or not matches:
        raise Unauthenticated("the auth_key is not valid")
    if credential.revoked_at is not None:
        raise Unauthenticated("the auth_key has been revoked")
    if credential.expires_at is not None and credential.expires_at <= now_ms:
        raise Unauthenticated("the auth_key has expired")
    return Principal(credential.user, credential.role, credential.claims, key.id, credential.expires_at)
