"""Connects to Redis by URL. The scheme of the URL decides which topology is behind the backend."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import structlog
from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import AuthenticationError, MovedError, NoPermissionError, RedisError

from tidewire.errors import ConfigurationError, Unreachable
from tidewire.redis.addresses import ClusterAddress, SentinelsAddress, check_login, redacted
from tidewire.redis.backend import CONNECTING, Backend
from tidewire.redis.cluster import ClusterBackend, NotACluster
from tidewire.redis.connection import reconnect_when_closed
from tidewire.redis.keys import Keys
from tidewire.redis.sentinel import SentinelBackend
from tidewire.redis.wire import Wire

log = structlog.get_logger(__name__)

NO_EVICTION = "Redis may remove keys that Tidewire needs: set maxmemory-policy noeviction"


def backend_at(url: str, keys: Keys) -> Backend:
    """Create a backend that has not connected yet.

    Raises:
        ConfigurationError: the URL is not an address of a server, a cluster or sentinels.
    """
    backend = _backend_at(url, keys)
    backend.make_another = lambda: backend_at(url, backend.keys)
    return backend


def _backend_at(url: str, keys: Keys) -> Backend:
    scheme = url.partition("://")[0]
    if scheme == "redis+cluster":
        return ClusterBackend(ClusterAddress.parse(url), keys)
    if scheme == "redis+sentinel":
        return SentinelBackend(SentinelsAddress.parse(url), keys)
    if scheme not in ("redis", "rediss", "unix"):
        raise ConfigurationError(
            f"--redis {redacted(url)!r} has none of the known forms: redis://host:6379, rediss://…, unix://…, "
            "redis+sentinel://host:26379,host:26379/service or redis+cluster://host:6379,host:6379"
        )
    check_login(url)
    try:
        _ = urlsplit(url).port
        client = reconnect_when_closed(Redis.from_url(url, **CONNECTING))
        return Backend(client, keys, Wire(client.connection_pool.make_connection))
    except ValueError:  # its message may quote a part of the password
        raise ConfigurationError(
            f"--redis {redacted(url)!r} is not a valid address: write redis://user:password@host:port/database"
        ) from None


async def connect(url: str, keys: Keys) -> Backend:
    """Connect to a server, check its version and permissions, and open the stage.

    Raises:
        ConfigurationError: the server cannot be used; the message says why in one sentence.
        Unreachable: the server does not answer.
    """
    backend = backend_at(url, keys)
    try:
        async with _explained(url):
            await backend.reach()
            version = (await backend.commands.info("server")).get("redis_version", "0")
            if int(str(version).split(".", 1)[0]) < 7:
                raise ConfigurationError(f"the server at {redacted(url)} is version {version}; 7.0 or newer is needed")
            await backend.open_stage()
            # Redis 7 gives a new user no channels. Without them a service would start, and never hear of a change.
            await backend.calls([("SPUBLISH", keys.probe(), b"")])
            if policy := await backend.may_evict():
                log.warning("keys_may_be_evicted", maxmemory_policy=policy, advice=NO_EVICTION)
    except BaseException:
        await backend.__aexit__()
        raise
    return backend


async def connect_existing(url: str, stage: str, partitions: int) -> Backend:
    """Connect to a stage that may exist, with the number of partitions that it was created with.

    `partitions` counts when the stage does not exist yet. Raises as `connect` does.
    """
    backend = backend_at(url, Keys(stage, partitions))
    try:
        async with _explained(url):
            await backend.reach()
            stored = await backend.commands.hget(backend.keys.stage_settings(), "partitions")
    except BaseException:
        await backend.__aexit__()
        raise
    backend.keys = Keys(stage, int(stored or partitions))
    return backend


@contextlib.asynccontextmanager
async def _explained(url: str) -> AsyncIterator[None]:
    """Turn the errors of redis-py into one sentence that says what to do."""
    at = f"Redis at {redacted(url)}"
    try:
        yield
    except NotACluster:
        raise ConfigurationError(
            f"{at} is not in cluster mode: write a single server as redis://host:port, or set cluster-enabled yes"
        ) from None
    except MovedError:
        raise ConfigurationError(f"{at} is a node of a cluster: name it as redis+cluster://host:port") from None
    except AuthenticationError as error:
        raise ConfigurationError(f"{at} does not accept the login ({error}): check user and password") from None
    except NoPermissionError as error:
        raise ConfigurationError(
            f"{at} refuses a command that Tidewire needs ({error}): give the user this permission with ACL SETUSER; "
            "docs/operations.md lists all that are needed"
        ) from None
    except MasterNotFoundError:
        raise Unreachable(
            f"{at} does not answer: no sentinel there is reachable and knows a master of the service's name"
        ) from None
    except (RedisError, OSError) as error:
        raise Unreachable(f"{at} does not answer ({error}): is it running, and reachable?") from None
