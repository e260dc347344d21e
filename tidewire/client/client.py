"""The client: one user's connection, which reconnects with its cursors and repeats unanswered requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, Self
from urllib.parse import quote, urlencode

import msgspec
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.http11 import Response

from tidewire.client.live import Live
from tidewire.client.live_items import Frame, LiveItems
from tidewire.errors import (
    ConfigurationError,
    ConnectionClosed,
    RequestError,
    Timeout,
    Unauthenticated,
    from_wire,
)
from tidewire.tasks import end

MAX_ADDRESS_BYTES = 4096
"""Maximum bytes of topics and cursors in an address. Further topics are followed after the welcome."""
MAX_EVENTS = 10_000
"""Maximum events that wait for the application. Beyond it, they are dropped, and a `reset` takes their place."""
CLOSING_S = 1.0
"""Seconds that the server has to answer a close frame."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 5.0
"""Seconds before the first and between later attempts to reconnect or to retry a request.

The pause doubles each time.
"""

_decode = msgspec.json.Decoder().decode


def comes_back(code: int) -> bool:
    """Whether a client reconnects after a close code."""
    return code not in (1008, 1009) and not 4400 <= code <= 4499


class Client:
    """One user's connection. It reconnects until the block is left.

        async with Client("ws://127.0.0.1:8080", auth_key) as client:
            await client.put("messages", {"room": "r1", "id": "m1", "text": "hello"})
            async for event in client.events():
                ...

    Events are the frames `change`, `message` and `reset`, in the order of the feed. At most 10,000 wait for the
    application. Beyond that they are dropped, and a `reset` with the reason `too_many` takes their place.

    It resumes by itself after a lost connection. To resume in another process, keep `cursor` and `topics`, and pass
    both to the next client. They move on when the application takes an event.

    Args:
        url: address of a gateway, such as `ws://127.0.0.1:8080`.
        auth_key: the credential.
        cursor: where to resume the user's feed; None begins with new changes.
        topics: topics to follow, each with its cursor. Those of tables with `everyone` or `claim(…)` are followed
            without being named, and then begin with new changes.
        timeout_s: maximum seconds for a connection and for each request, retries included.
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
        """Why there is no connection at the moment; None if there is one."""
        self.cursor = cursor
        """Cursor of the user's feed behind the last event that the application has taken."""
        self.topics: dict[str, str] = dict(topics or {})
        """The followed topics, each with the cursor behind the last event that the application has taken."""
        self.welcomes: list[Frame] = []
        """The last 100 welcomes, the newest last. Each connection begins with one."""
        self._url = url
        self._auth_key = auth_key
        self._timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._open: dict[int, tuple[Frame, asyncio.Future[Any]]] = {}
        self._events: asyncio.Queue[Frame | None] = asyncio.Queue(MAX_EVENTS)
        self._ws: ClientConnection | None = None
        self._welcomed = asyncio.Event()
        self._received_cursor = cursor
        self._received_topics = dict(self.topics)
        self._asked = set(self.topics)
        """Topics that are followed because the application asked. The server follows others without being asked."""
        self._beyond: dict[str, str] = {}
        """Topics with their cursors that found no room in the address."""
        self._ended: Exception | None = None
        self._after_ms: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._following: set[asyncio.Task[None]] = set()
        self._lives: set[Live] = set()

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            Unauthenticated: the credential is refused.
            ConnectionClosed: the server closed the connection for good.
            Timeout: there is no connection within `timeout_s`.
        """
        self._task = asyncio.create_task(self._keep(), name="tidewire-client")
        try:
            await self._until_welcomed(self._timeout_s)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        ws = self._ws
        await end([*self._following, *([self._task] if self._task else [])], ask_again_s=CLOSING_S)
        if ws:
            # The peer's unread frames would block a closing handshake.
            ws.transport.abort()

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def put(self, table: str, item: Frame, **options: Any) -> Frame:
        """Write a whole item.

        All writes take these options, and raise RequestError:

        Args:
            table: the table.
            item: the item, with its key attributes.
            options: `if_`, a condition such as `{"version": 3}`; `request`, a request id (one is made otherwise).

        Returns:
            `key`, `version` and `position`.
        """
        return await self._write("put", {"table": table, "item": item}, options)

    async def update(self, table: str, key: Any, **options: Any) -> Frame:
        """Change parts of an item, with the options `set`, `remove` and `add`: values by dotted path, or paths."""
        return await self._write("update", {"table": table, "key": key}, options)

    async def delete(self, table: str, key: Any, **options: Any) -> Frame:
        """Delete an item."""
        return await self._write("delete", {"table": table, "key": key}, options)

    async def transact(self, *operations: Frame, request: str | None = None) -> list[Frame]:
        """Do several writes of one partition-key value, all or none, and return their results.

        await client.transact(
            {"action": "put", "table": "members", "item": {"room": "r1", "user": "alice"}},
            {"action": "check", "table": "rooms", "key": "r1", "if": {"present": True}},
        )
        """
        options = {} if request is None else {"request": request}
        return list((await self._write("transact", {"operations": list(operations)}, options))["results"])

    async def get(self, table: str, key: Any) -> Frame:
        """Read an item: `item`, `version`, `at`, `by` and `position`. Raises NotFound."""
        result: Frame = await self.request("get", table=table, key=key)
        return result

    async def query(self, table: str, key: Any, **options: Any) -> Frame:
        """Read the items of one partition key, in the order of the sort key.

        Options: `index`, `after`, `before`, `prefix`, `limit` (100) and `reverse`.

        Returns:
            `items` (each with `item`, `version`, `at`, `by`), `next` to pass as `after`, and `position`.
        """
        result: Frame = await self.request("query", table=table, key=key, **options)
        return result

    async def whoami(self) -> Frame:
        """Return the user, connection and claims of this connection."""
        result: Frame = await self.request("whoami")
        return result

    async def request(self, action: str, **fields: Any) -> Any:
        """Request any action, and return its result.

        An unanswered request is repeated on the next connection. A write has a request id, so it is done once.

        Raises:
            RequestError: the server's answer, after retries if the error allows them.
            Timeout: there was no answer within `timeout_s`.
            ConnectionClosed: the server closed the connection for good.
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
                        after_s = error.details.get("retry_after_ms", 0) / 1000
                    await asyncio.sleep(max(pause_s * random.uniform(0.5, 1), after_s))
                    pause_s = min(2 * pause_s, MAX_PAUSE_S)
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
                with contextlib.suppress(websockets.ConnectionClosed):  # the next connection repeats it
                    await self._ws.send(json.dumps(frame))
            return await future
        finally:
            del self._open[id_]

    # ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def events(self) -> AsyncIterator[Frame]:
        """Yield each event once, in order.

        Raises ConnectionClosed when the server has closed the connection for good.
        """
        while True:
            event = await self._events.get()
            if event is None:
                self._events.put_nowait(None)  # for the next caller
                assert self._ended
                raise self._ended
            self._taken(event)
            yield event

    def _taken(self, event: Frame) -> None:
        if "cursor" not in event:
            return
        if "topic" not in event:
            self.cursor = event["cursor"]
        elif event["topic"] in self._received_topics:
            self.topics[event["topic"]] = event["cursor"]

    async def next_event(self, timeout_s: float = 30.0) -> Frame:
        """Return the next event. Raises Timeout if none comes within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                async for event in self.events():
                    return event
        except TimeoutError:
            pass
        raise Timeout(f"no event within {timeout_s} s")

    # ── topics ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def follow(self, topic: str, cursor: str | None = None) -> str:
        """Follow a topic, from a cursor if one is given, and return the cursor at which it begins.

        Each later connection follows it again, from where it stopped. Raises NotFound or PermissionDenied.
        """
        fields = {} if cursor is None else {"cursor": cursor}
        self._forget(topic)
        answer = await self.request("follow", topic=topic, **fields)
        self._asked.add(topic)
        self.topics.setdefault(topic, answer["cursor"])
        return str(self._received_topics.setdefault(topic, answer["cursor"]))

    async def unfollow(self, topic: str) -> str:
        """Leave a topic, and return the cursor at which it stopped. Raises NotFound if it is not followed."""
        answer = await self.request("unfollow", topic=topic)
        self._forget(topic)
        return str(answer["cursor"])

    def _forget(self, topic: str) -> None:
        self._asked.discard(topic)
        self._received_topics.pop(topic, None)
        self.topics.pop(topic, None)

    # ── live views ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def live(self, table: str, *, topic: str | None = None, **key: Any) -> AsyncGenerator[dict[Any, Frame]]:
        """Yield the current items of a partition key, again after each change: a dict of sort key to item, in order.

            async for messages in client.live("messages", room="r1"):
                ...

        In a table without a sort key, the item is under the partition key. Changes that arrive while the application
        handles a view are in the next one, together. After a `reset`, an empty view comes, and then a new one.

        Args:
            table: the table.
            topic: a topic to follow first, for a table whose readers are its followers.
            key: the partition attribute with its value.

        Raises:
            ConfigurationError: the credential's feed does not carry the table's changes, or `key` is not its partition
            key. RequestError: the query or the topic was refused. ConnectionClosed: the server closed the connection
            for good.
        """
        if len(key) != 1:
            raise ConfigurationError(f"live({table!r}, …) needs one attribute, the partition key, not {sorted(key)}")
        ((attribute, value),) = key.items()
        live = Live(self, LiveItems(table, attribute, value), topic)
        self._lives.add(live)
        try:
            async for view in live.views():
                yield view
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
                    self._address(),
                    additional_headers={"Authorization": f"Bearer {self._auth_key}"},
                    compression=None,
                    max_size=None,
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
                    self._end(Unauthenticated(_said(error.response)))
                status = error.response.status_code
                why = _said(error.response) if status >= 400 else "is it the port of websockets?"
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
                pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def _address(self) -> str:
        query = {}
        if self._received_cursor is not None:
            query["cursor"] = self._received_cursor
        named, self._beyond = self._parted_topics()
        if named:
            query["topics"] = json.dumps(named)
        base = self._url if self._url.count("/") > 2 else self._url + "/"
        return f"{base}?{urlencode(query)}" if query else base

    def _parted_topics(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the topics for the address, and those that are followed after the welcome.

        Servers and proxies bound the length of an address. Topics that are followed without asking come first: after
        the welcome, they would have begun with new changes.
        """
        named: dict[str, str] = {}
        size_bytes = 0
        for topic, cursor in sorted(self._received_topics.items(), key=lambda one: one[0] in self._asked):
            size_bytes += len(quote(json.dumps({topic: cursor})))
            if size_bytes > MAX_ADDRESS_BYTES:
                break
            named[topic] = cursor
        return named, {topic: one for topic, one in self._received_topics.items() if topic not in named}

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
                error = from_wire(frame)
                if error.retry:
                    self._follow_soon([frame["details"]["topic"]], FIRST_PAUSE_S)
                else:
                    self._not_followed(frame["details"]["topic"], error)
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
        # If a reset follows, it brings its own cursor.
        self._received_cursor = frame["cursor"]
        self._received_topics = frame["topics"] | self._beyond
        self.cursor = self.cursor or frame["cursor"]
        self.topics = {topic: self.topics.get(topic, cursor) for topic, cursor in self._received_topics.items()}
        self._welcomed.set()
        assert self._ws
        self._follow_soon(self._beyond)
        for request, future in list(self._open.values()):
            if not future.done():
                asyncio.ensure_future(_quietly(self._ws.send(json.dumps(request))))  # noqa: RUF006 - bounded by _open

    def _follow_soon(self, topics: Iterable[str], after_s: float = 0.0) -> None:
        """Follow topics from their cursors on this connection. The next one does so by itself."""

        async def follow(ws: ClientConnection | None, names: list[str]) -> None:
            await asyncio.sleep(after_s)
            for topic in names:
                cursor = self._received_topics.get(topic)
                if ws is not None and cursor is not None:
                    # Without an id, so that it is not repeated: a repeat would go back to an older place.
                    await _quietly(ws.send(json.dumps({"action": "follow", "topic": topic, "cursor": cursor})))

        task = asyncio.create_task(follow(self._ws, list(topics)), name="client_following")
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    def _not_followed(self, topic: str, error: RequestError) -> None:
        """Forget a topic that the user may no longer follow."""
        self._forget(topic)
        for live in self._lives:
            if live.topic == topic:
                live.end(error)

    def _note_cursor(self, frame: Frame) -> None:
        if "cursor" not in frame:
            return
        if "topic" in frame:
            self._received_topics[frame["topic"]] = frame["cursor"]
        else:
            self._received_cursor = frame["cursor"]

    def _put(self, event: Frame) -> None:
        if self._events.full():
            while not self._events.empty():
                self._events.get_nowait()
            event = {"type": "reset", "reason": "too_many", "cursor": self._received_cursor}
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


async def _quietly(sending: Any) -> None:
    with contextlib.suppress(websockets.ConnectionClosed):
        await sending


def _said(response: Response) -> str:
    """The message of a refused handshake."""
    try:
        return str(msgspec.json.decode(response.body or b"{}")["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the answer was HTTP status {response.status_code}, not a websocket: is it the port of websockets?"
