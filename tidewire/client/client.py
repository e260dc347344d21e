"""A connection that comes back: with its cursors, so that nothing is lost, and with the requests that were open."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Self
from urllib.parse import urlencode

import msgspec
import websockets
from websockets.asyncio.client import ClientConnection, connect

from tidewire.client.live import View
from tidewire.errors import (
    ConfigurationError,
    ConnectionClosed,
    NotFound,
    RequestError,
    TidewireError,
    Timeout,
    Unauthenticated,
    from_wire,
)
from tidewire.tasks import end

EVENTS_KEPT = 10_000
CLOSING_S = 1.0
"""How long the server is given to agree to the end of a connection."""
LOADS, SETTLE_S = 5, 0.5
"""A view of several pages is loaded so often, for all of them to be of one moment; else it is given time to settle."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

Frame = dict[str, Any]
_decode = msgspec.json.Decoder().decode


def comes_back(code: int) -> bool:
    """Whether a client reconnects after this close code (contract: close codes)."""
    return code not in (1008, 1009) and not 4400 <= code <= 4499


class Client:
    """One user's connection, kept up until the block is left.

        async with Client("ws://127.0.0.1:8080", auth_key) as client:
            await client.put("messages", {"room": "r1", "id": "m1", "text": "hello"})
            async for event in client.events():
                ...

    Events are the frames `change`, `message` and `reset` in the feed's order. At most 10,000 wait to be taken: beyond,
    they are dropped, and a `reset` with the reason `too_many` stands in their place.
    """

    def __init__(
        self,
        url: str,
        auth_key: str,
        *,
        cursor: str | None = None,
        topics: dict[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.user: str | None = None
        self.connection: str | None = None
        self.problem: str | None = None
        """Why there is no connection at present, as far as that is known."""
        self.cursor = cursor
        self.topics: dict[str, str] = dict(topics or {})
        self.welcomes: list[Frame] = []
        """The last welcomes, the newest last: each connection begins with one."""
        self._url = url
        self._auth_key = auth_key
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._open: dict[int, tuple[Frame, asyncio.Future[Any]]] = {}
        self._events: asyncio.Queue[Frame | None] = asyncio.Queue(EVENTS_KEPT)
        self._ws: ClientConnection | None = None
        self._welcomed = asyncio.Event()
        self._ended: Exception | None = None
        self._after_ms: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._lives: set[Live] = set()

    async def __aenter__(self) -> Self:
        """Connect. Raises Unauthenticated or ConnectionClosed when that is refused for good, Timeout when it lasts."""
        self._task = asyncio.create_task(self._keep(), name="tidewire-client")
        try:
            await self._until_welcomed(self._timeout_s)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        ws = self._ws
        if self._task:
            await end([self._task], ask_again_s=CLOSING_S)
        if ws:
            # Under frames that nobody reads any more a closing handshake does not get through.
            ws.transport.abort()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def put(self, table: str, item: Frame, **options: Any) -> Frame:
        """Write an item whole. Options of all writes: `if_` (a condition), `request` (an id; one is made otherwise)."""
        return await self._write("put", {"table": table, "item": item}, options)

    async def update(self, table: str, key: Any, **options: Any) -> Frame:
        """Change parts of an item: `set`, `remove`, `add`."""
        return await self._write("update", {"table": table, "key": key}, options)

    async def delete(self, table: str, key: Any, **options: Any) -> Frame:
        return await self._write("delete", {"table": table, "key": key}, options)

    async def transact(self, *operations: Frame, request: str | None = None) -> list[Frame]:
        """Several writes of one partition-key value, all or none; their results. Operations are frames of actions:

        await client.transact(
            {"action": "put", "table": "members", "item": {"room": "r1", "user": "alice"}},
            {"action": "check", "table": "rooms", "key": "r1", "if": {"present": True}},
        )
        """
        options = {} if request is None else {"request": request}
        return list((await self._write("transact", {"operations": list(operations)}, options))["results"])

    async def get(self, table: str, key: Any) -> Frame:
        """The item with version, at, by and position. Raises NotFound."""
        result: Frame = await self.request("get", table=table, key=key)
        return result

    async def query(self, table: str, key: Any, **options: Any) -> Frame:
        """Items of one partition key, in sort-key order: options as in the contract."""
        result: Frame = await self.request("query", table=table, key=key, **options)
        return result

    async def whoami(self) -> Frame:
        result: Frame = await self.request("whoami")
        return result

    async def request(self, action: str, **fields: Any) -> Any:
        """Any action; its result. Raises the RequestError that the server answers, Timeout, or ConnectionClosed.

        An open request is sent again on the next connection; a write carries a request id, so that it is done once.
        """
        id_ = next(self._ids)
        frame = {"id": id_, "action": action, **fields}
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await self._once(id_, frame)
                    except RequestError as error:
                        if not error.retry:
                            raise
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1))
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            raise Timeout(f"{action}: no answer within {self._timeout_s} s") from None

    async def _write(self, action: str, fields: Frame, options: Frame) -> Frame:
        if "if_" in options:
            options["if"] = options.pop("if_")
        options.setdefault("request", secrets.token_hex(12))
        result: Frame = await self.request(action, **fields, **options)
        return result

    async def _once(self, id_: int, frame: Frame) -> Any:
        if self._ended:
            raise self._ended
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[id_] = (frame, future)
        try:
            if self._ws and self._welcomed.is_set():
                with contextlib.suppress(websockets.ConnectionClosed):  # it is sent again on the next connection
                    await self._ws.send(json.dumps(frame))
            return await future
        finally:
            del self._open[id_]

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def events(self) -> AsyncIterator[Frame]:
        """Each event once, in order. Raises ConnectionClosed when the server ended the connection for good."""
        while True:
            event = await self._events.get()
            if event is None:
                self._events.put_nowait(None)  # for the next one who asks
                assert self._ended
                raise self._ended
            yield event

    async def next_event(self, timeout_s: float = 30.0) -> Frame:
        """The next event. Raises Timeout when none comes."""
        try:
            async with asyncio.timeout(timeout_s):
                async for event in self.events():
                    return event
        except TimeoutError:
            pass
        raise Timeout(f"no event within {timeout_s} s")

    # ── topics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def follow(self, topic: str, cursor: str | None = None) -> str:
        """Follow a topic, from a cursor on; the cursor it begins at. Raises NotFound or PermissionDenied.

        It is followed again on each connection, from where it stopped.
        """
        fields = {} if cursor is None else {"cursor": cursor}
        self.topics.pop(topic, None)
        answer = await self.request("follow", topic=topic, **fields)
        return str(self.topics.setdefault(topic, answer["cursor"]))

    async def unfollow(self, topic: str) -> str:
        """Follow it no more; the cursor it stopped at. Raises NotFound when it is not followed."""
        answer = await self.request("unfollow", topic=topic)
        self.topics.pop(topic, None)
        return str(answer["cursor"])

    # ── live views ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def live(self, table: str, *, topic: str | None = None, **key: Any) -> AsyncGenerator[dict[Any, Frame]]:
        """The items of a partition key as they are, again whenever something has changed: sort key to item, in order.

        `key` is the partition attribute with its value: `client.live("messages", room="r1")`. In a table without a sort
        key the one item stands under the partition key. With `topic`, that topic is followed first, for a table whose
        readers are its followers. Changes that come while a view is looked at are in the next one, together; one that
        says that something may be missing gives an empty view, and then a new one.

        Raises RequestError when the query or the topic is refused, ConnectionClosed at the connection's end for good.
        """
        if len(key) != 1:
            raise ConfigurationError(f"live({table!r}, …) needs one attribute, the partition key, not {sorted(key)}")
        ((attribute, value),) = key.items()
        live = Live(self, View(table, attribute, value), topic)
        self._lives.add(live)
        try:
            async for shown in live.views():
                yield shown
        finally:
            self._lives.discard(live)
            await live.aclose()

    # ── the connection ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _until_welcomed(self, timeout_s: float) -> None:
        welcomed = asyncio.create_task(self._welcomed.wait())
        assert self._task
        done, _ = await asyncio.wait({welcomed, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        welcomed.cancel()
        if self._ended:
            raise self._ended
        if self._task in done:
            self._task.result()
        if not self._welcomed.is_set():
            why = f": {self.problem}" if self.problem else ""
            raise Timeout(f"no connection to {self._url} within {timeout_s:g} s{why}")

    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._ended:
            try:
                async with connect(
                    self._address(), additional_headers={"auth_key": self._auth_key}, compression=None, max_size=None
                ) as ws:
                    self._ws = ws
                    async for message in ws:
                        self._received(_decode(message))
                        self.problem, pause_s = None, FIRST_PAUSE_S
                self._closed(ws.close_code or 1006, ws.close_reason or "")
            except websockets.ConnectionClosed as error:
                received = error.rcvd
                self._closed(received.code if received else 1006, received.reason if received else "")
            except websockets.InvalidStatus as error:
                if error.response.status_code in (401, 403, 404):
                    self._end(Unauthenticated(_said(error.response.body)))
                status = error.response.status_code
                why = _said(error.response.body) if status >= 400 else "is it the port of websockets?"
                self.problem = f"it answered with HTTP status {status}: {why}"
            except (OSError, websockets.WebSocketException, EOFError, TimeoutError) as error:
                self.problem = str(error) or type(error).__name__
            finally:
                self._ws = None
                self._welcomed.clear()
            if not self._ended:
                wait_s = pause_s if self._after_ms is None else self._after_ms / 1000
                self._after_ms = None
                await asyncio.sleep(wait_s * random.uniform(0.5, 1))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _address(self) -> str:
        query = {}
        if self.cursor is not None:
            query["cursor"] = self.cursor
        if self.topics:
            query["topics"] = json.dumps(self.topics)
        base = self._url if self._url.count("/") > 2 else self._url + "/"
        return f"{base}?{urlencode(query)}" if query else base

    def _received(self, frame: Frame) -> None:
        kind = frame["type"]
        if kind in ("reply", "error"):
            _, future = self._open.get(frame["id"], (None, None))
            if future and not future.done():
                if kind == "reply":
                    future.set_result(frame["result"])
                else:
                    future.set_exception(from_wire(frame))
            elif kind == "error" and "topic" in frame["details"]:
                self._not_followed(frame["details"]["topic"], from_wire(frame))
        elif kind == "welcome":
            self._welcome(frame)
        elif kind == "reconnect":
            self._after_ms = frame["after_ms"]
        elif kind in ("change", "message", "reset"):
            self._note_cursor(frame)
            for live in self._lives:
                live.take(frame)
            self._put(frame)

    def _welcome(self, frame: Frame) -> None:
        self.user, self.connection = frame["user"], frame["connection"]
        self.welcomes = [*self.welcomes[-99:], frame]
        # Where a reset follows, its own cursor comes with it.
        self.cursor = frame["cursor"]
        self.topics = dict(frame["topics"])
        self._welcomed.set()
        assert self._ws
        for request, future in list(self._open.values()):
            if not future.done():
                asyncio.ensure_future(_quietly(self._ws.send(json.dumps(request))))  # noqa: RUF006 - bounded by _open

    def _not_followed(self, topic: str, error: RequestError) -> None:
        """The server no longer lets this user follow the topic."""
        self.topics.pop(topic, None)
        for live in self._lives:
            if live.topic == topic:
                live.end(error)

    def _note_cursor(self, frame: Frame) -> None:
        if "cursor" not in frame:
            return
        if "topic" in frame:
            self.topics[frame["topic"]] = frame["cursor"]
        else:
            self.cursor = frame["cursor"]

    def _put(self, event: Frame) -> None:
        if self._events.full():
            while not self._events.empty():
                self._events.get_nowait()
            event = {"type": "reset", "reason": "too_many", "cursor": self.cursor}
        self._events.put_nowait(event)

    def _closed(self, code: int, reason: str) -> None:
        if not comes_back(code):
            self._end(ConnectionClosed(code, reason))

    def _end(self, error: Exception) -> None:
        self._ended = error
        for _, future in self._open.values():
            if not future.done():
                future.set_exception(error)
        for live in self._lives:
            live.end(error)
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(None)


class Live:
    """One live view: what feeds the view, and what it is looked at by."""

    def __init__(self, client: Client, view: View, topic: str | None) -> None:
        self.topic = topic
        self._client = client
        self._view = view
        self._changed = asyncio.Event()
        self._empty = False  # to be shown as that, before it is filled again
        self._is_loaded = False
        self._load_again = asyncio.Event()
        self._load_again.set()
        self._ended: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    def take(self, frame: Frame) -> None:
        """A frame of a feed, in the order of arrival."""
        if frame["type"] == "change":
            if self._view.take(frame):
                self._changed.set()
            if self._view.unread:
                self._load_again.set()
        elif frame["type"] == "reset" and self._view.concerns(frame):
            self._view.start_over()
            self._empty, self._is_loaded = True, False
            self._changed.set()
            self._load_again.set()

    def end(self, error: Exception) -> None:
        self._ended = error
        self._changed.set()

    async def views(self) -> AsyncIterator[dict[Any, Frame]]:
        self._task = asyncio.create_task(self._keep_loaded(), name="live")
        shown: dict[Any, Frame] | None = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._ended:
                raise self._ended
            if self._empty:
                self._empty = False
                if shown:
                    shown = {}
                    yield {}
            if self._is_loaded and self._view.is_whole and (now := self._view.shown()) != shown:
                shown = now
                yield dict(now)

    async def aclose(self) -> None:
        if self._task:
            await end([self._task])

    async def _keep_loaded(self) -> None:
        try:
            if self.topic is not None and self.topic not in self._client.topics:
                await self._client.follow(self.topic)
            while True:
                await self._load_again.wait()
                self._load_again.clear()
                try:
                    if not self._is_loaded:
                        await self._load()
                    for key in list(self._view.unread):
                        await self._read(key)
                except RequestError as error:
                    if not error.retry:
                        raise
                    self._load_again.set()  # whatever is away, it has been waited for
                self._changed.set()
        except TidewireError as error:
            self.end(error)

    async def _load(self) -> None:
        """Page by page, until there is a last one; again, as long as there is hope, where they differ in time."""
        for more_tries in reversed(range(LOADS)):
            self._view.start_over()
            begun = self._view.loads
            after: Any = None
            while True:
                bounds = {} if after is None else {"after": after}
                found = await self._client.query(self._view.table, self._view.value, limit=1000, **bounds)
                if self._view.loads != begun:
                    return  # a reset came meanwhile: it is loaded again
                if (partition := found["key"][0]) != self._view.attribute:
                    raise ConfigurationError(
                        f"table {self._view.table!r} has the partition key {partition!r}, not {self._view.attribute!r}"
                    )
                following = found["next"]
                items = [one["item"] for one in found["items"]]
                self._view.page(items, found["key"], found["position"], after, last=following is None)
                if following is None:
                    break
                after = following
            if self._view.is_of_one_moment:
                break
            if not more_tries:
                # Written to all the time, and longer than a page: what happened between the pages comes as frames.
                await asyncio.sleep(SETTLE_S)
                if self._view.loads != begun:
                    return
        self._is_loaded = True

    async def _read(self, key: Any) -> None:
        view = self._view
        named = {view.attribute: view.value} | ({} if view.sort is None else {view.sort: key})
        with contextlib.suppress(NotFound):
            found = await self._client.get(view.table, named)
            view.read(key, found["item"], found["version"], found["position"])


async def _quietly(sending: Any) -> None:
    with contextlib.suppress(websockets.ConnectionClosed):
        await sending


def _said(body: bytes | bytearray | None) -> str:
    """What a refused handshake said."""
    try:
        return str(msgspec.json.decode(body or b"{}")["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return "the server refused the connection"
