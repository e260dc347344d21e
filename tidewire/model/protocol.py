"""The frames of the wire: parsed from, and written as, JSON or MessagePack. No I/O.

What a client sends becomes one of the request classes below, checked in shape; what they mean is the services' matter.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from decimal import Context, Decimal
from typing import Any

import msgpack
import msgspec

from tidewire.errors import BadRequest, RequestError, UnsupportedAction
from tidewire.model.records import FeedBody

SUBPROTOCOL = "tidewire.msgpack"
MAX_DEPTH = 64
RequestId = str | int | None

_encoder = msgspec.json.Encoder()


class Inexact(float):
    """A JSON number that a double does not hold as it was written. `fault_in` refuses it, and names its path."""


MAX_DIGITS = 17
"""Significant digits of a decimal number: as many as it takes to tell any two doubles apart."""


def float_of(text: str) -> float:
    """Return the value of a JSON number with a fraction or an exponent; an `Inexact` if a double would change it.

    Up to 17 digits name one double, so they are no change. Of a number beyond 2^53, the integer part must be kept too.
    """
    value = float(text)
    if len(text) <= MAX_DIGITS and -(2**53) < value < 2**53 and "-" not in text[1:]:
        return value
    try:
        exact = Decimal(text)
    except ArithmeticError:  # its exponent has 19 digits
        return Inexact(value)
    digits = len(exact.normalize(_ALL_DIGITS).as_tuple().digits)
    if digits <= MAX_DIGITS and (sys.float_info.min <= abs(value) < 2**53 or not exact):
        return value
    return value if exact in (Decimal(value), Decimal(repr(value))) else Inexact(value)


_ALL_DIGITS = Context(prec=2000)
_decoder = msgspec.json.Decoder(float_hook=float_of)
_decoder_of_ours = msgspec.json.Decoder()  # for what we have encoded


class _Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that any request may have."""

    action: str = ""
    id: RequestId = None
    traceparent: str | None = None


class Condition(msgspec.Struct, forbid_unknown_fields=True):
    """`if`: exactly one of the four."""

    version: int | None = None
    absent: bool | None = None
    present: bool | None = None
    equals: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("version", "absent", "present", "equals") if getattr(self, name) is not None]
        if len(given) != 1 or self.absent is False or self.present is False:
            raise ValueError('one of {"version":n}, {"absent":true}, {"present":true}, {"equals":{…}} is needed')


class _Write(_Request, kw_only=True):
    table: str
    condition: Condition | None = msgspec.field(default=None, name="if")
    request: str | None = None


class Put(_Write, kw_only=True):
    item: dict[str, Any]


Path = str | list[str]
Assignments = dict[str, Any] | list[tuple[Path, Any]]


class Update(_Write, kw_only=True):
    key: Any
    set: Assignments = {}
    remove: list[Path] = []
    add: Assignments = {}


class Delete(_Write, kw_only=True):
    key: Any


class Get(_Request, kw_only=True):
    table: str
    key: Any


Edge = str | int | float | list[str | int | float] | None
"""A bound of a query: a sort-key value or, where an index has several items of one, that and the item's key."""


class Query(_Request, kw_only=True):
    table: str
    key: Any
    index: str | None = None
    after: Edge = None
    before: Edge = None
    prefix: str | None = None
    limit: int = 100
    reverse: bool = False


class Check(_Request, kw_only=True):
    """Within a transaction: nothing is written, and all of it only if the condition holds."""

    table: str
    key: Any
    condition: Condition = msgspec.field(name="if")


class Transact(_Request, kw_only=True):
    operations: list[dict[str, Any]]
    request: str | None = None


Operation = Put | Update | Delete | Check
OPERATIONS: dict[str, type[Put] | type[Update] | type[Delete] | type[Check]] = {
    "put": Put,
    "update": Update,
    "delete": Delete,
    "check": Check,
}
MAX_OPERATIONS = 100


class Auth(_Request, kw_only=True):
    auth_key: str
    cursor: str | None = None
    topics: dict[str, str] = {}


class Follow(_Request, kw_only=True):
    topic: str
    cursor: str | None = None


class Unfollow(_Request, kw_only=True):
    topic: str


class Send(_Request, kw_only=True):
    """To a user, by the feed; or to one connection, at once or not at all."""

    body: Any
    user: str | None = None
    connection: str | None = None
    request: str | None = None


class Whoami(_Request, kw_only=True):
    pass


class Ping(_Request, kw_only=True):
    pass


ACTIONS: dict[str, type[_Request]] = {
    "put": Put,
    "update": Update,
    "delete": Delete,
    "get": Get,
    "query": Query,
    "transact": Transact,
    "follow": Follow,
    "unfollow": Unfollow,
    "send": Send,
    "auth": Auth,
    "whoami": Whoami,
    "ping": Ping,
}
WRITES = frozenset({"put", "update", "delete", "transact", "send"})
STORE_ACTIONS = (WRITES - {"send"}) | {"get", "query"}
MAX_NAME_BYTES = 1024
# W3C Trace Context, section 3.2: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def decode_frame(data: str | bytes, *, binary: bool) -> dict[str, Any]:
    """One object from a frame. Raises BadRequest when it is not one, or holds what our records cannot."""
    frame = _object(data, binary=binary)
    fault = fault_in(frame)
    if fault:
        raise BadRequest(fault)
    return frame


def id_of_refused(data: str | bytes, *, binary: bool) -> RequestId:
    """The id to answer with of a frame that `decode_frame` refused, as far as there is one."""
    try:
        id_ = request_id(_object(data, binary=binary))
    except BadRequest:
        return None
    return None if fault_in(id_) else id_


def _object(data: str | bytes, *, binary: bool) -> dict[str, Any]:
    kind = "MessagePack" if binary else "JSON"
    if binary != isinstance(data, bytes):
        raise BadRequest(f"a {'binary' if binary else 'text'} frame with one {kind} object was expected")
    try:
        frame = msgpack.unpackb(data, raw=False) if binary else _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadRequest(f"the frame is not {kind}: {error}") from None
    if not isinstance(frame, dict):
        raise BadRequest(f"the frame is not a {kind} object but {_kind_of(frame)}")
    return frame


def request_id(frame: dict[str, Any]) -> RequestId:
    """The id to answer with: what the frame has, if that is a string or an integer."""
    value = frame.get("id")
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def parse_request(frame: dict[str, Any]) -> _Request:
    """The request that a frame states. Raises UnsupportedAction, or BadRequest saying what is wrong and where."""
    action = frame.get("action")
    if not isinstance(action, str):
        raise BadRequest("the frame has no action: a string was expected at $.action")
    kind = ACTIONS.get(action)
    if kind is None:
        raise UnsupportedAction(f"there is no action {action[:64]!r}")
    try:
        request = msgspec.convert(frame, kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{action}: {error}") from None
    if isinstance(request, Query) and not 1 <= request.limit <= 1000:
        raise BadRequest("query: limit is between 1 and 1000")
    names = {"topic": getattr(request, "topic", None)}
    if isinstance(request, Send):
        names = {"user": request.user, "connection": request.connection}
    for name, value in names.items():
        if value is not None and not 1 <= len(value.encode()) <= MAX_NAME_BYTES:
            raise BadRequest(f"{action}: {name} is a string of 1 to {MAX_NAME_BYTES} bytes")
    if isinstance(request, Send) and (request.user is None) == (request.connection is None):
        raise BadRequest("send: either user or connection says who it is for")
    if (
        isinstance(request, _Write | Transact | Send)
        and request.request is not None
        and not 1 <= len(request.request) <= 256
    ):
        raise BadRequest(f"{action}: request is a string of 1 to 256 characters")
    if isinstance(request, Transact) and not 1 <= len(request.operations) <= MAX_OPERATIONS:
        raise BadRequest(f"transact: operations are 1 to {MAX_OPERATIONS}, not {len(request.operations)}")
    if request.traceparent is not None and not is_traceparent(request.traceparent):
        raise BadRequest(f"{action}: traceparent is not one of W3C Trace Context (00-<trace id>-<parent id>-<flags>)")
    return request


def parse_operations(request: Transact) -> list[Operation]:
    """The operations of a transaction. Raises BadRequest saying which one is wrong, and where."""
    operations: list[Operation] = []
    for number, fields in enumerate(request.operations):
        with within_operation(number):
            kind = OPERATIONS.get(str(fields.get("action")))
            if kind is None:
                raise BadRequest(f"action is put, update, delete or check, not {fields.get('action')!r:.64}")
            for name in ("request", "id", "traceparent"):
                if name in fields:
                    raise BadRequest(f"{name} belongs to the transaction, not to one of its operations")
            try:
                operations.append(msgspec.convert(fields, kind))
            except msgspec.ValidationError as error:
                raise BadRequest(str(error)) from None
    return operations


@contextlib.contextmanager
def within_operation(number: int) -> Iterator[None]:
    """Errors raised within say, in words and details, which operation of a transaction it was."""
    try:
        yield
    except RequestError as error:
        error.message = f"transact: operations[{number}]: {error.message}"
        error.details = error.details | {"operation": number}
        raise


def is_traceparent(text: str) -> bool:
    """Whether it is a traceparent of W3C Trace Context."""
    return _TRACEPARENT.fullmatch(text) is not None


def fault_in(item: Any, depth: int = MAX_DEPTH) -> str | None:
    """What in an item neither JSON nor our records can hold, and where; None when all is well."""
    return _fault(item, "$", depth)


def encode_json(frame: Any) -> bytes:
    return _encoder.encode(frame)


def encode_msgpack(frame: Any) -> bytes:
    packed: bytes = msgpack.packb(frame)
    return packed


def feed_frame(body: FeedBody, cursor: str, topic: str | None) -> bytes:
    """The JSON text of a feed's frame. The rest was encoded once, by the broadcaster; only what differs is added."""
    head = b'{"type":"%s","cursor":"%s"' % (body.type.encode(), cursor.encode())
    if topic is not None:
        head += b',"topic":' + _encoder.encode(topic)
    return head + b"," + body.rest[1:]


def json_to_msgpack(frame: bytes) -> bytes:
    """The same frame for a connection with the MessagePack subprotocol."""
    return encode_msgpack(_decoder_of_ours.decode(frame))


def _kind_of(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def _fault(value: Any, path: str, depth: int) -> str | None:  # noqa: C901, PLR0911, PLR0912 - a case a kind
    """What in a decoded value neither JSON nor our records can hold, and where; None when all is well."""
    if depth == 0:
        return f"nested deeper than {MAX_DEPTH} levels at {path[:200]}"
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                return f"a field name that is not a string at {path[:200]}"
            fault = _fault(inner, f"{path}.{name}", depth - 1) or _fault(name, path, depth)
            if fault:
                return fault
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            fault = _fault(inner, f"{path}[{index}]", depth - 1)
            if fault:
                return fault
    elif isinstance(value, bool) or value is None:
        return None
    elif isinstance(value, int):
        return None if -(2**63) <= value < 2**64 else f"a number beyond 64 bits at {path[:200]}"
    elif isinstance(value, Inexact) and abs(value) < float("inf"):
        return f"a number that would be rounded (more than {MAX_DIGITS} digits) at {path[:200]}: send it as a string"
    elif isinstance(value, float):
        return None if abs(value) < float("inf") else f"a number that is not finite at {path[:200]}"
    elif isinstance(value, str):
        return None if value.isascii() or _encodable(value) else f"a string that is not Unicode text at {path[:200]}"
    else:
        return f"a value that JSON does not have ({type(value).__name__}) at {path[:200]}"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
