"""The frames between clients and gateways, in JSON or MessagePack. No I/O.

`decode_frame` reads one object from a frame, and `parse_request` makes a request of it: one of the classes below, with
its shape checked. The services decide what a request means.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from decimal import Context, Decimal
from typing import Any, get_args

import msgpack
import msgspec

from tidewire.errors import BadRequest, RequestError, UnsupportedAction
from tidewire.model.records import FeedBody

SUBPROTOCOL = "tidewire.msgpack"
"""The websocket subprotocol of clients that speak MessagePack (RFC 6455, section 1.9)."""
MAX_DEPTH = 64
"""Maximum levels of nesting in a frame."""
SURE_DIGITS = 15
"""Significant digits of a decimal number that a double always keeps."""
MAX_DIGITS = 17
"""Significant digits of a decimal number: as many as it takes to tell any two doubles apart."""
MAX_OPERATIONS = 100
"""Maximum operations of a transaction."""
MAX_DISCONNECTED = 1000
"""Maximum connections and users of one `disconnect`."""
MAX_TOPICS = 1000
"""Maximum topics that one connection follows by request, or resumes."""
MAX_NAME_BYTES = 1024
"""Maximum length of the name of a topic, user or connection in a request, in bytes of UTF-8."""

RequestId = str | int | None

# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that every request may have."""

    action: str = ""
    id: RequestId = None
    """Comes back in the reply. A request without one gets no reply."""
    traceparent: str | None = None
    """W3C Trace Context; kept with the change."""


class Condition(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """`if` of a write: exactly one of the four fields."""

    version: int | None = None
    absent: bool | None = None
    present: bool | None = None
    equals: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("version", "absent", "present", "equals") if getattr(self, name) is not None]
        if len(given) != 1 or self.absent is False or self.present is False:
            raise ValueError('one of {"version":n}, {"absent":true}, {"present":true}, {"equals":{…}} is needed')


class WriteRequest(Common, kw_only=True):
    """Fields of `put`, `update` and `delete`."""

    table: str
    condition: Condition | None = msgspec.field(default=None, name="if")
    request: str | None = None
    """The client's own id for the write. A repeat returns the first result."""


class Put(WriteRequest, kw_only=True):
    """Write a whole item."""

    item: dict[str, Any]


Path = str | list[str]
"""Names joined by dots, or a list of names."""
Assignments = dict[str, Any] | list[tuple[Path, Any]]
"""Values by path: an object, or a list of pairs where names contain dots."""


class Update(WriteRequest, kw_only=True):
    """Change parts of an item: first `set`, then `remove`, then `add`."""

    key: Any
    set: Assignments = {}
    remove: list[Path] = []
    add: Assignments = {}


class Delete(WriteRequest, kw_only=True):
    """Delete an item."""

    key: Any


class Get(Common, kw_only=True):
    """Read an item."""

    table: str
    key: Any


Edge = str | int | float | list[str | int | float] | None
"""A bound of a query: a sort-key value. Where an index has several items with one value, a list of it and the key."""


class Query(Common, kw_only=True):
    """Read the items of a partition key, or of an index, in order."""

    table: str
    key: Any
    index: str | None = None
    after: Edge = None
    before: Edge = None
    prefix: str | None = None
    limit: int = 100
    reverse: bool = False


class Check(Common, kw_only=True):
    """An operation of a transaction that writes nothing: all of it is done only if the condition holds."""

    table: str
    key: Any
    condition: Condition = msgspec.field(name="if")


class Transact(Common, kw_only=True):
    """Write several items of one partition key, or none of them."""

    operations: list[dict[str, Any]]
    request: str | None = None


class Auth(Common, kw_only=True):
    """Present a credential: in the first frame, or to renew that of the connection."""

    auth_key: str
    cursor: str | None = None
    topics: dict[str, str] = {}


class Follow(Common, kw_only=True):
    """Receive the changes of a topic, from a cursor if one is given."""

    topic: str
    cursor: str | None = None


class Unfollow(Common, kw_only=True):
    """Receive no more changes of a topic."""

    topic: str


class Send(Common, kw_only=True):
    """Send a message: to a user through the feed, or to one open connection."""

    body: Any
    user: str | None = None
    connection: str | None = None
    request: str | None = None


class Disconnect(Common, kw_only=True):
    """Close connections, and all connections of users."""

    connections: list[str] = []
    users: list[str] = []


class Whoami(Common, kw_only=True):
    """Ask for the user, connection and claims."""


class Ping(Common, kw_only=True):
    """Ask for an empty answer."""


StoreRequest = Put | Update | Delete | Get | Query | Transact
"""Requests that a store decides."""
ConnectionRequest = Auth | Follow | Unfollow
"""Requests about a connection, which only websockets can make."""
Request = StoreRequest | ConnectionRequest | Send | Disconnect | Whoami | Ping
"""What a client can ask for."""
Operation = Put | Update | Delete | Check
"""A part of a transaction."""

ACTIONS: dict[str, type[Request]] = {kind.__name__.lower(): kind for kind in get_args(Request)}
OPERATIONS: dict[str, type[Operation]] = {kind.__name__.lower(): kind for kind in get_args(Operation)}
STORE_ACTIONS = frozenset(kind.__name__.lower() for kind in get_args(StoreRequest))

# W3C Trace Context, section 3.2: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def parse_request(frame: dict[str, Any]) -> Request:
    """Make a request of a frame.

    The gateway calls it for a client's frame. The store calls it again for the body of a command: the body comes from a
    stream that a gateway of another release may have written, so the store trusts no other process to have checked it.

    Raises:
        UnsupportedAction: there is no such action.
        BadRequest: the shape is wrong; the message says what and where.
    """
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
    if problem := _problem(request):
        raise BadRequest(f"{action}: {problem}")
    return request


def topics_problem(topics: Mapping[str, str]) -> str | None:
    """Say what is wrong with the topics that a connection resumes, or return None."""
    if len(topics) > MAX_TOPICS:
        return f"topics: a connection follows at most {MAX_TOPICS}, not {len(topics)}"
    if not all(map(_is_name, topics)):
        return f"topics: a topic is a string of 1 to {MAX_NAME_BYTES} bytes"
    return None


def _problem(request: Request) -> str | None:  # noqa: PLR0911 - one rule after another
    """The first rule that a request breaks, of those that its types do not express."""
    match request:
        case Query() if not 1 <= request.limit <= 1000:
            return "limit is between 1 and 1000"
        case Auth() if problem := topics_problem(request.topics):
            return problem
        case Follow() | Unfollow() if not _is_name(request.topic):
            return f"topic is a string of 1 to {MAX_NAME_BYTES} bytes"
        case Send():
            for name, value in (("user", request.user), ("connection", request.connection)):
                if value is not None and not _is_name(value):
                    return f"{name} is a string of 1 to {MAX_NAME_BYTES} bytes"
            if (request.user is None) == (request.connection is None):
                return "either user or connection says who it is for"
        case Disconnect() if not 1 <= len(request.connections) + len(request.users) <= MAX_DISCONNECTED:
            return f"connections and users are 1 to {MAX_DISCONNECTED} together"
        case Transact() if not 1 <= len(request.operations) <= MAX_OPERATIONS:
            return f"operations are 1 to {MAX_OPERATIONS}, not {len(request.operations)}"
    write_id = write_id_of(request)
    if write_id is not None and not 1 <= len(write_id) <= 256:
        return "request is a string of 1 to 256 characters"
    if request.traceparent is not None and not is_traceparent(request.traceparent):
        return "traceparent is not one of W3C Trace Context (00-<trace id>-<parent id>-<flags>)"
    return None


def _is_name(text: str) -> bool:
    return 1 <= len(text.encode()) <= MAX_NAME_BYTES


def write_id_of(request: Request) -> str | None:
    """The client's own id of a write, by which a repeat is recognized; None for a request that writes nothing."""
    return request.request if isinstance(request, WriteRequest | Transact | Send) else None


def body_of(request: StoreRequest | Send) -> dict[str, Any]:
    """Write a request as the body of a command, of which `parse_request` makes the same request.

    The values are those of the request, not copies.
    """
    body: dict[str, Any] = {}
    for name, key, default in _body_fields(type(request)):
        value = getattr(request, name)
        if value is not default:
            body[key] = msgspec.to_builtins(value) if isinstance(value, Condition) else value
    return body


def digest_of(body: dict[str, Any]) -> bytes:
    """Return the digest of a command's body, whatever the order of its fields."""
    return hashlib.blake2b(msgspec.json.encode(body, order="deterministic"), digest_size=16).digest()


@functools.cache
def _body_fields(kind: type[msgspec.Struct]) -> list[tuple[str, str, Any]]:
    """Attribute, name in the body, and default of each field that a command's body has."""
    return [
        (field.name, field.encode_name, field.default)
        for field in msgspec.structs.fields(kind)
        if field.name not in ("id", "request", "traceparent")
    ]


def parse_operations(request: Transact) -> list[Operation]:
    """Parse the operations of a transaction. Raises BadRequest that says which one is wrong, and where."""
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
    """Add the number of an operation to the errors that the block raises, in their message and details."""
    try:
        yield
    except RequestError as error:
        error.message = f"transact: operations[{number}]: {error.message}"
        error.details = error.details | {"operation": number}
        raise


def is_traceparent(text: str) -> bool:
    """Whether a text is a traceparent of W3C Trace Context."""
    return _TRACEPARENT.fullmatch(text) is not None


# ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Inexact(float):
    """A JSON number that a double does not hold as it was written. `fault_in` refuses it, and names its path."""


_MANY_DIGITS = Context(prec=2000)


def float_of(text: str) -> float:
    """Return the value of a JSON number with a fraction or an exponent; an `Inexact` if a double would change it.

    A double keeps a number of up to 17 digits if, with as many digits, it is written as that number again. Up to 15
    digits always come back (DBL_DIG of C). With more than 17, the number must be the double's exact value.
    """
    value = float(text)
    if len(text) <= SURE_DIGITS + 1 and -(2**53) < value < 2**53 and "-" not in text[1:]:
        return value  # the common cases, without decimal arithmetic
    if repr(value) == text:
        return value
    try:
        exact = Decimal(text)
    except ArithmeticError:  # its exponent has 19 digits
        return Inexact(value)
    digits = len(exact.normalize(_MANY_DIGITS).as_tuple().digits)
    # Halfway between two texts, repr and %g may choose differently.
    written = (f"{value:.{digits}g}", repr(value)) if digits <= MAX_DIGITS else (value,)
    return value if exact in map(Decimal, written) else Inexact(value)


_client_decoder = msgspec.json.Decoder(float_hook=float_of)
_own_decoder = msgspec.json.Decoder()
"""For frames that this process has encoded: their numbers are exact."""


def decode_frame(data: str | bytes, *, binary: bool) -> dict[str, Any]:
    """Decode one object from a client's frame. Raises BadRequest if there is none, or if an item could not hold it."""
    frame = _object(data, binary=binary)
    fault = fault_in(frame)
    if fault:
        raise BadRequest(fault)
    return frame


def id_of_refused(data: str | bytes, *, binary: bool) -> RequestId:
    """Return the id of a frame that `decode_frame` refused, so that the error can carry it; None without one."""
    try:
        id_ = request_id(_object(data, binary=binary))
    except BadRequest:
        return None
    return None if fault_in(id_) else id_


def request_id(frame: dict[str, Any]) -> RequestId:
    """Return the id of a frame if it is a string or an integer, else None."""
    value = frame.get("id")
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def _object(data: str | bytes, *, binary: bool) -> dict[str, Any]:
    kind = "MessagePack" if binary else "JSON"
    if binary != isinstance(data, bytes):
        raise BadRequest(f"a {'binary' if binary else 'text'} frame with one {kind} object was expected")
    try:
        frame = msgpack.unpackb(data, raw=False) if binary else _client_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError, ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadRequest(f"the frame is not {kind}: {error}") from None
    if not isinstance(frame, dict):
        raise BadRequest(f"the frame is not a {kind} object but {_kind_of(frame)}")
    return frame


def _kind_of(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null" if value is None else type(value).__name__)


def fault_in(value: Any, depth: int = MAX_DEPTH) -> str | None:
    """Return what an item cannot hold in a decoded value, and its path; None if it can hold all of it."""
    return _fault(value, "$", depth)


def _fault(value: Any, path: str, depth: int) -> str | None:  # noqa: C901, PLR0911, PLR0912 - one case for each kind
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
        return (
            f"a number that would be rounded at {path[:200]} (a double keeps {SURE_DIGITS} digits): "
            "send it with fewer digits, or as a string"
        )
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
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


# ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────────────

_encoder = msgspec.json.Encoder()


def encode_json(frame: Any) -> bytes:
    """Encode a frame as JSON in UTF-8."""
    return _encoder.encode(frame)


def encode_msgpack(frame: Any) -> bytes:
    """Encode a frame as MessagePack."""
    packed: bytes = msgpack.packb(frame)
    return packed


def feed_frame(body: FeedBody, cursor: str, topic: str | None) -> bytes:
    """Build the JSON frame of a feed entry: what differs by feed, before the body that the broadcaster has encoded."""
    head = b'{"type":"%s","cursor":"%s"' % (body.type.encode(), cursor.encode())
    if topic is not None:
        head += b',"topic":' + _encoder.encode(topic)
    return head + b"," + body.rest[1:]


def json_to_msgpack(frame: bytes) -> bytes:
    """Encode a JSON frame of our own again, as MessagePack."""
    return encode_msgpack(_own_decoder.decode(frame))
