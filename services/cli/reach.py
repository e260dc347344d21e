"""How commands find Redis, and what a stage says about its tables."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tidewire.errors import ConfigurationError

if TYPE_CHECKING:
    from tidewire.model.records import Declaration
    from tidewire.redis.backend import Backend

T = TypeVar("T")


def with_redis(
    redis: str | None,
    data: Path,
    stage: str | None,
    work: Callable[[Backend], Awaitable[T]],
    *,
    may_be_new: bool = False,
) -> T:
    """Run something on the stage of the named server, or of the running `up`.

    Raises ConfigurationError if there is no such stage and it may not be new, or if the server stops answering.
    """
    from redis.exceptions import ConnectionError, TimeoutError

    from tidewire.process.settings import load
    from tidewire.redis.addresses import redacted
    from tidewire.redis.connect import connect_existing
    from tidewire.tasks import run

    from .embedded import running

    found = {} if redis else running(data)
    settings = load(stage=stage or found.get("stage"), redis=redis or found["redis"])

    async def do() -> T:
        async with await connect_existing(settings.redis, settings.stage, settings.partitions) as backend:
            if not (may_be_new or await backend.commands.exists(backend.keys.stage_settings())):
                raise ConfigurationError(
                    f"there is no stage {settings.stage!r} at {redacted(settings.redis)}: "
                    "its first service creates it; --stage names another"
                )
            return await work(backend)

    try:
        return run(do())
    except (ConnectionError, TimeoutError) as error:
        raise ConfigurationError(f"Redis at {redacted(settings.redis)} does not answer any more: {error}") from None


def address_of_up(data: Path) -> str | None:
    """The Redis URL of the running `up`, or None when none runs on that data."""
    from .embedded import running

    try:
        return str(running(data)["redis"])
    except ConfigurationError:
        return None


def has_moved(data: Path, address: str | None) -> bool:
    """Whether `up` has restarted on that data, with its server at another address."""
    return address is not None and address_of_up(data) not in (None, address)


async def declarations(backend: Backend) -> dict[str, Declaration]:
    """Return the tables that the stores have declared, by name, sorted."""
    from tidewire.model.records import Declaration, text, unpack

    found = await backend.commands.hgetall(backend.keys.tables())
    return {text(name): Declaration(*unpack(raw)) for name, raw in sorted(found.items())}


def declaration_of(table: str, found: Mapping[str, Declaration], stage: str) -> Declaration:
    """Return the table. Raises ConfigurationError if no store has declared it."""
    if table not in found:
        known = f"it has {', '.join(found)}" if found else "no store has ever run there"
        raise ConfigurationError(f"there is no table {table!r} in stage {stage!r}: {known}")
    return found[table]
