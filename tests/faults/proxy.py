"""A TCP proxy between one process and its Redis. It delays, holds and cuts connections on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Proxy:
    """Passes bytes both ways, unless a fault is set. An async context manager."""

    def __init__(self, to: int) -> None:
        self.port = 0
        self._to = to
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.Task[None]] = set()
        self._away = False
        self._free = asyncio.Event()
        self._free.set()
        self._slow_s = 0.0
        self._hold_at: bytes | None = None
        self._swallow: bytes | None = None
        self.done = asyncio.Event()
        """Note that the planned fault has happened."""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._line, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server
        self._server.close()
        await self._end()

    # ── what can be done ────────────────────────────────────────────────────────────────────────────────────────────

    async def cut(self, lasts_s: float) -> None:
        """Close all connections, and refuse new ones for that time."""
        self._away = True
        await self._end()
        await asyncio.sleep(lasts_s)
        self._away = False

    async def hold(self, lasts_s: float, at: bytes | None = None, begun: Callable[[], None] = lambda: None) -> None:
        """Hold all traffic for that time, then pass it on. With `at`, begin at the next command with these bytes."""
        if at is not None:
            self.done.clear()
            self._hold_at = at
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), 10)
            self._hold_at = None
        self._free.clear()
        begun()
        await asyncio.sleep(lasts_s)
        self._free.set()

    async def slow(self, lasts_s: float, by_s: float = 0.2) -> None:
        """Each piece takes so much longer, each way."""
        self._slow_s = by_s
        await asyncio.sleep(lasts_s)
        self._slow_s = 0.0

    async def swallow(self, at: bytes = b"FCALL") -> None:
        """Let the next command with these bytes be done, and cut its connection instead of answering."""
        self.done.clear()
        self._swallow = at
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.done.wait(), 10)
        self._swallow = None

    # ── what passes ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _end(self) -> None:
        lines = list(self._lines)
        for line in lines:
            line.cancel()
        if lines:
            await asyncio.wait(lines)

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._lines.add(task)
        writers = [writer]
        try:
            if self._away:
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
            writers.append(back)
            swallowing = asyncio.Event()
            ways = [
                asyncio.create_task(self._pass_on(reader, back, swallowing, is_command=True)),
                asyncio.create_task(self._pass_on(there, writer, swallowing, is_command=False)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # asyncio's server would report it
        finally:
            self._lines.discard(task)
            for one in writers:
                one.transport.abort()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, swallowing: asyncio.Event, *, is_command: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if is_command and self._hold_at is not None and self._hold_at in data:
                    self._hold_at = None
                    self._free.clear()
                    self.done.set()
                if is_command and self._swallow is not None and self._swallow in data:
                    self._swallow = None
                    swallowing.set()
                if self._slow_s:
                    await asyncio.sleep(self._slow_s)
                await self._free.wait()
                if not is_command and swallowing.is_set():
                    self.done.set()
                    return
                writer.write(data)
                await writer.drain()
