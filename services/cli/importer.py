"""`tidewire import`: write items from JSON lines through the stores, which check each and record its change."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import typer
from redis.exceptions import RedisError

from tidewire.app import CONNECTIONS
from tidewire.errors import ConfigurationError, Overloaded, RequestError, Timeout
from tidewire.model.records import Command
from tidewire.process.bus import Bus
from tidewire.process.registry import new_id
from tidewire.process.settings import load
from tidewire.redis.backend import Backend
from tidewire.tasks import end

from . import progress
from .exporter import table_of
from .ledger import LARGEST_LINE, Ledger, Row
from .reach import declarations

USER = "tidewire:import"
BLOCK_BYTES = 1 << 18
MAX_WAITING_BYTES = 4 << 20
"""Bytes of lines that are read and not yet done. Beyond this, reading waits."""
MAX_OUTSTANDING = 64
"""Commands under way, each for a different partition."""
PATIENCE_S = 60.0
"""An import ends when no store has answered it for this long."""
REPORT_EVERY_S = 10.0


async def import_(backend: Backend, file: Path | None, skip: int, *, as_json: bool = False) -> None:
    """Write the items of a file's lines. Raises ConfigurationError if it must end before the file does."""
    declared = await declarations(backend)
    tables = {name: table_of(name, found) for name, found in declared.items() if name != CONNECTIONS}
    if not tables:
        raise ConfigurationError(f"stage {backend.keys.stage!r} has no tables: no store has ever run there")
    ledger, name = Ledger(tables, backend.keys, skip), "<stdin>" if file is None else str(file)
    with _opened(file) as descriptor, _ends_on_sigterm():
        begun = time.monotonic()
        try:
            await _Import(backend, ledger).run(descriptor, show_progress=not as_json)
        except BaseException:
            if ledger.read:
                typer.echo(f"stopped: {_how_to_go_on(max(ledger.done, skip))}", err=True)
            raise
    if ledger.fault:
        typer.echo(f"{name}:{ledger.fault.line}: {ledger.fault.what}", err=True)
        done = ledger.done
        raise ConfigurationError(f"that line is not imported: {_how_to_go_on(done)}, --skip {done + 1} without it")
    if ledger.read < skip:
        raise ConfigurationError(f"--skip {skip}: {name} has {ledger.read} lines")
    progress.report_end("imported", ledger.items, begun, as_json=as_json)


def _how_to_go_on(lines: int) -> str:
    return f"{lines:,} lines are surely done, the same command with --skip {lines} goes on"


class _Import:
    """Reads lines and sends them in parcels: one at a time to each partition, to many partitions at once."""

    def __init__(self, backend: Backend, ledger: Ledger) -> None:
        self._backend = backend
        self._ledger = ledger
        self._settings = load()
        self._id = f"import-{new_id()}"
        self._bus = Bus(
            backend,
            lambda: self._id,
            timeout_s=self._settings.request_timeout_s,
            max_queued=self._settings.commands_max,
            max_queued_bytes=self._settings.commands_bytes,
        )
        self._senders = [asyncio.Event() for _ in range(min(backend.keys.partitions, MAX_OUTSTANDING))]
        self._room = asyncio.Event()
        self._all_read = False
        self._answered_at = time.monotonic()
        self._clock_ms = 0.0  # the server's time, less the monotonic one

    async def run(self, descriptor: int, *, show_progress: bool = True) -> None:
        """Run until all lines before the first faulty one are done."""
        self._clock_ms = await self._backend.now_ms() - 1000 * time.monotonic()
        helpers = [asyncio.create_task(self._bus.send()), asyncio.create_task(self._bus.receive())]
        with progress.shown("import", _size_of(descriptor), wanted=show_progress) as advance:
            helpers.append(asyncio.create_task(self._report(advance)))
            work = [asyncio.create_task(self._send(number)) for number in range(len(self._senders))]
            work.append(asyncio.create_task(self._read(descriptor)))
            try:
                await asyncio.gather(*work)
            finally:
                await end([*work, *helpers])
                with contextlib.suppress(RedisError):  # the stream has a time to live
                    await self._backend.commands.delete(self._backend.keys.replies(self._id))

    async def _read(self, descriptor: int) -> None:
        ledger = self._ledger
        async with contextlib.aclosing(lines(descriptor)) as blocks:
            async for block in blocks:
                for line in block:
                    partition = ledger.take(line)
                    if ledger.fault:
                        break
                    if partition is not None:
                        self._senders[partition % len(self._senders)].set()
                    if ledger.waiting_bytes > MAX_WAITING_BYTES:
                        self._room.clear()
                        await self._room.wait()
                if ledger.fault:
                    break
        self._all_read = True
        for sender in self._senders:
            sender.set()

    async def _send(self, number: int) -> None:
        """Send the parcels of every n-th partition until all are done."""
        wanted = self._senders[number]
        while True:
            wanted.clear()
            idle = True
            for partition in range(number, self._backend.keys.partitions, len(self._senders)):
                if parcel := self._ledger.parcel(partition):
                    idle = False
                    await self._deliver(partition, parcel)
                    if self._ledger.waiting_bytes < MAX_WAITING_BYTES // 2 or self._ledger.fault:
                        self._room.set()
            if idle and self._all_read:
                return
            if idle:
                await wanted.wait()

    async def _deliver(self, partition: int, parcel: list[Row]) -> None:
        """Send once. Rows that were not done stay in the ledger and are sent again."""
        try:
            await self._ask(partition, parcel)
        except (Overloaded, Timeout) as error:
            await self._pause(error)
            return
        except RequestError as error:
            at = error.details.get("item")
            if at is None:
                lines_ = f"lines {parcel[0].line} to {parcel[-1].line}"
                raise ConfigurationError(f"the store did not take all of {lines_}: {error.message}") from None
            self._ledger.refuse(parcel[at].line, error.message)
        else:
            self._ledger.tell_done(partition, parcel)
        self._answered_at = time.monotonic()

    def _ask(self, partition: int, parcel: list[Row]) -> asyncio.Future[object]:
        items = [(row.table, row.item) for row in parcel]
        # After this time the store refuses the command, so it is safe to send it again.
        deadline = int(self._clock_ms + 1000 * (time.monotonic() + self._settings.request_timeout_s))

        def record(number: int) -> Command:
            body = {"action": "load", "items": items}
            return Command("load", body, USER, "service", {}, None, None, 0, deadline, self._id, number)

        return self._bus.request(self._backend.keys.commands(partition), record)

    async def _pause(self, error: RequestError) -> None:
        """Wait before the same parcel is sent again.

        Raises redis-py's error or ConfigurationError if that cannot help.
        """
        await self._backend.commands.ping()
        if time.monotonic() - self._answered_at > PATIENCE_S:
            raise ConfigurationError(
                f"nothing was done for {PATIENCE_S:.0f} s ({error.message}): see `tidewire status` for a store"
            )
        await asyncio.sleep(0.2)

    async def _report(self, advance: progress.Advance) -> None:
        """Report progress: as a bar for a person, as a line from time to time for a log."""
        reported_at, reported = time.monotonic(), self._ledger.done
        while True:
            await asyncio.sleep(0.1)
            advance(self._ledger.done_bytes, self._ledger.items)
            is_due = not sys.stderr.isatty() and time.monotonic() - reported_at > REPORT_EVERY_S
            if is_due and self._ledger.done > reported:
                reported_at, reported = time.monotonic(), self._ledger.done
                typer.echo(_how_to_go_on(reported), err=True)


# ── the file ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def lines(descriptor: int) -> AsyncGenerator[list[bytes], None]:
    """Yield the lines of a file or pipe without their ends, in batches of what is there."""
    begun = b""
    while block := await _block(descriptor):
        *whole, begun = (begun + block).split(b"\n")
        if len(begun) > LARGEST_LINE:
            whole, begun = [*whole, begun], b""
        yield whole
    if begun:
        yield [begun]


async def _block(descriptor: int) -> bytes:
    """Return the next bytes, or b"" at the end. Raises ConfigurationError if they cannot be read.

    The read runs in a daemon thread, because a terminal or a pipe may never send anything again.
    """
    loop = asyncio.get_running_loop()
    block: asyncio.Future[bytes | OSError] = loop.create_future()

    def settle(found: bytes | OSError) -> None:
        if not block.done():
            block.set_result(found)

    def read() -> None:
        found: bytes | OSError
        try:
            found = os.read(descriptor, BLOCK_BYTES)
        except OSError as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop has ended in the meantime
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=read, name="import", daemon=True).start()
    found = await block
    if isinstance(found, OSError):
        raise ConfigurationError(f"the file cannot be read: {found.strerror}")
    return found


@contextlib.contextmanager
def _opened(file: Path | None) -> Iterator[int]:
    """Return the descriptor to read. Raises ConfigurationError."""
    if file is None:
        if sys.stdin is not None and sys.stdin.isatty():
            typer.echo("reading JSON lines from the terminal: end them with Ctrl-D", err=True)
        yield 0
        return
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _size_of(descriptor: int) -> int | None:
    """The size in bytes. None if the input has no size."""
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    return None


@contextlib.contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that the command can report how far it is."""
    loop, task, terminated = asyncio.get_running_loop(), asyncio.current_task(), False
    assert task

    def stop() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        yield
    except asyncio.CancelledError:
        if terminated:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
