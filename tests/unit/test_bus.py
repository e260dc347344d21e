"""The asking side of the bus, without a server: what it holds, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ConnectionError, OutOfMemoryError, ResponseError

from tests.helpers import wait_until
from tidewire.errors import Overloaded, Timeout
from tidewire.model.records import Reply, pack
from tidewire.process import bus as module
from tidewire.process.bus import Bus, Inbox
from tidewire.redis.functions import NumberedCall, StreamBounds
from tidewire.redis.keys import Keys
from tidewire.testing import FakeBackend


def unsent(timeout_s: float, **limits: int) -> Bus:
    """A bus whose requests stay where they are."""
    backend: Any = None
    return Bus(backend, lambda: "gateway", timeout_s=timeout_s, **limits)


def ask(bus: Bus) -> asyncio.Future[Any]:
    return bus.request(b"stream", lambda number: (number,))


async def test_unanswered_requests_time_out_in_their_order() -> None:
    bus, order = unsent(0.02), list[str]()

    async def asked(name: str) -> None:
        with pytest.raises(Timeout, match="may or may not be done"):
            await ask(bus)
        order.append(name)

    await asyncio.gather(*(asked(name) for name in ("first", "second", "third")))
    assert order == ["first", "second", "third"]


async def test_one_asked_after_all_have_timed_out_times_out_too() -> None:
    bus = unsent(0.01)
    for _ in range(3):
        with pytest.raises(Timeout):
            await asyncio.wait_for(ask(bus), 5)


async def test_a_timed_out_request_makes_room_for_others() -> None:
    bus = unsent(0.01, max_waiting=1)
    first = ask(bus)
    with pytest.raises(Overloaded):
        ask(bus)
    with pytest.raises(Timeout):
        await first
    with pytest.raises(Timeout):
        await ask(bus)


class Refusing:
    """A backend whose enqueue raises, or counts the records of each call."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.sizes: list[int] = []
        self.numbers: list[int] = []
        self.keys = Keys("dev", 1)
        self.functions = self

    async def enqueue(self, stream: bytes, call: NumberedCall, bounds: StreamBounds, records: Sequence[bytes]) -> int:
        self.sizes.append(len(records))
        self.numbers.append(call.number)
        if self.error:
            raise self.error
        return len(records)


@contextlib.asynccontextmanager
async def sending(backend: Any, timeout_s: float = 10) -> AsyncIterator[Bus]:
    made = Bus(backend, lambda: "gateway", timeout_s=timeout_s)
    task = asyncio.create_task(made.send())
    yield made
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
        ResponseError("NOREPLICAS Not enough good replicas to write."),
    ],
)
async def test_a_server_that_takes_no_writes_is_reported_at_once_and_nothing_is_done(error: Exception) -> None:
    async with sending(Refusing(error)) as bus:
        with pytest.raises(Overloaded, match=r"Redis takes no writes.*nothing was done"):
            await ask(bus)


async def test_an_unanswered_enqueue_may_have_been_done() -> None:
    async with sending(Refusing(ConnectionError("MISCONF is no answer of the server's here"))) as bus:
        with pytest.raises(Timeout, match="may or may not be done"):
            await ask(bus)


async def test_calls_to_a_stream_are_cut_and_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_BATCH_BYTES", 2500)
    backend = Refusing()
    async with sending(backend) as bus:
        asked = [bus.request(b"stream", lambda number: (number, "x" * 1000)) for _ in range(5)]
        asked.append(bus.request(b"stream", lambda number: (number, "x" * 5000)))
        await wait_until(lambda: sum(backend.sizes) == 6, "all are sent")
        assert backend.sizes == [2, 2, 1, 1]
        assert backend.numbers == [1, 2, 3, 4]
        for future in asked:
            future.cancel()


class Moving(Refusing):
    def when_moved(self, told: Callable[[], None]) -> None:
        self.moved = told

    async def read(self, *_: Any) -> Any:
        await asyncio.sleep(3600)


async def test_a_request_from_before_a_failover_times_out_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOVED_S", 0.1)
    backend = Moving()
    async with sending(backend, timeout_s=600) as bus:
        receiving = asyncio.create_task(bus.receive())
        before = ask(bus)
        await asyncio.sleep(0.01)
        backend.moved()
        await asyncio.sleep(0.01)
        after = ask(bus)
        with pytest.raises(Timeout, match="master of Redis was replaced"):
            await asyncio.wait_for(before, 30)
        assert not after.done(), "it goes to the new master"
        receiving.cancel()
        await asyncio.wait([receiving])


async def test_an_inbox_is_trimmed_behind_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIM_S", 0)
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 1)) as backend:
        await backend.open_stage()
        stream = backend.keys.replies("gateway")
        inbox = Inbox(backend, lambda: stream)
        for number in range(3):
            record = pack([Reply(number, "x" * 100, None)])
            await backend.functions.answer(stream, StreamBounds(100, 1 << 20), 60_000, record)
        assert len(await inbox.read()) == 3
        assert await backend.commands.xlen(stream) == 0
        await backend.functions.answer(stream, StreamBounds(100, 1 << 20), 60_000, b"next")
        assert await inbox.read() == [b"next"]
        assert 0 < await backend.commands.pttl(stream) <= 60_000


async def test_a_repeated_enqueue_has_the_first_ones_answer_on_a_full_stream_too() -> None:
    async with FakeBackend(fakeredis.FakeServer(), Keys("dev", 1)) as backend:
        await backend.open_stage()
        stream, bounds = backend.keys.commands(0), StreamBounds(3, 1 << 20)
        sent = backend.keys.sent(stream, "gateway")

        async def enqueue(number: int, *records: bytes) -> int:
            return await backend.functions.enqueue(stream, NumberedCall(sent, number), bounds, records)

        assert await enqueue(1, b"a", b"b") == 2
        assert await enqueue(2, b"c", b"d") == 1
        assert await enqueue(2, b"c", b"d") == 1, "not 0, though there is no room"
        assert await enqueue(1, b"a", b"b") == 0, "it comes late, and nobody waits for its answer"
        entries: Any = await backend.commands.xrange(stream)
        assert [fields[b"r"] for _, fields in entries] == [b"a", b"b", b"c"]
        assert await backend.commands.pttl(sent) > 0
