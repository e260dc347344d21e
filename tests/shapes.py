"""Every malformed shape of every action: the request, its error code, and a word that the message must name.

What a message names is what its reader needs to correct the request: the field or attribute, and where it stands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from tidewire import App, everyone
from tidewire.model.records import Item

BIG = "x" * 200_000
MAX_BYTES = 262144
LONG_KEY = "k" * 1025


class Order(msgspec.Struct):
    """The schema of orders."""

    id: str
    owner: str
    at: int = 0


def must_be_even(item: Item) -> None:
    if item.get("n", 0) % 2:
        raise ValueError(f"n is {item['n']}, which is odd")


def make_app() -> App:
    app = App("shapes")
    app.membership("members", group="room", member="user", readers=everyone, writers=everyone)
    app.table("notes", key="id", readers=everyone, writers=everyone)
    app.table("lines", key=("page", "n"), readers=everyone, writers=everyone)
    app.table(
        "orders", key="id", readers=everyone, writers=everyone, indexes={"by_owner": ("owner", "at")}, schema=Order
    )
    app.table("even", key="id", readers=everyone, writers=everyone, schema=must_be_even)
    return app


SEEDS: list[tuple[str, Item]] = [
    ("notes", {"id": "n", "text": "x", "list": [1], "yes": True, "count": 1, "huge": 1.7e308, "deep": {}}),
    ("notes", {"id": "big", "x": BIG}),
    ("lines", {"page": "p", "n": 1}),
    ("orders", {"id": "o", "owner": "alice", "at": 1}),
]
"""Requests that set up the state before."""
GOOD: tuple[str, dict[str, Any]] = ("update", {"table": "notes", "key": "n", "add": {"count": 1}})
"""Requests after all others, which must work as if there had been no others."""


class Wrong(NamedTuple):
    """A request of a wrong shape. `names` are what its message must say."""

    action: Any
    fields: dict[str, Any]
    names: tuple[str, ...]
    code: str = "bad_request"

    @property
    def frame(self) -> dict[str, Any]:
        return {"action": self.action, **self.fields}

    def __str__(self) -> str:
        return f"{self.action} {str(self.fields)[:100]} … {' '.join(self.names)}"


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def put(table: Any, item: Any, *names: str, code: str = "bad_request", **more: Any) -> Wrong:
    return Wrong("put", {"table": table, "item": item, **more}, names, code)


def update(*names: str, **fields: Any) -> Wrong:
    """Return requests for the note "n", unless they name another."""
    code = fields.pop("code", "bad_request")
    return Wrong("update", {"table": "notes", "key": "n", **fields}, names, code)


def query(*names: str, **fields: Any) -> Wrong:
    """Return requests for the lines of "p", unless they name another."""
    return Wrong("query", {"table": "lines", "key": "p", **fields}, names)


def transact(operations: Any, *names: str, code: str = "bad_request", **more: Any) -> Wrong:
    return Wrong("transact", {"operations": operations, **more}, names, code)


def second(operation: Any, *names: str, code: str = "bad_request") -> Wrong:
    """A transaction whose second operation is wrong."""
    first = {"action": "put", "table": "notes", "item": {"id": "p"}}
    return transact([first, operation], "operations[1]", *names, code=code)


NOTE = {"id": "n"}
BAD_IFS: list[tuple[Any, str]] = [
    (5, "$.if"),
    ("absent", "$.if"),
    ([], "$.if"),
    ({}, "$.if"),
    ({"newer": 1}, "newer"),
    ({"version": "1"}, "$.if.version"),
    ({"version": 1.5}, "$.if.version"),
    ({"version": True}, "$.if.version"),
    ({"version": None}, "$.if"),
    ({"absent": 1}, "$.if.absent"),
    ({"absent": "true"}, "$.if.absent"),
    ({"absent": False}, "$.if"),
    ({"present": 1}, "$.if.present"),
    ({"present": {}}, "$.if.present"),
    ({"present": False}, "$.if"),
    ({"equals": 5}, "$.if.equals"),
    ({"equals": ["text"]}, "$.if.equals"),
    ({"equals": "text"}, "$.if.equals"),
    ({"absent": True, "version": 1}, "$.if"),
    ({"present": True, "equals": {}}, "$.if"),
]
"""Each of the four with each wrong kind of value; none; two; another."""

WRONG_VALUES: list[tuple[Any, str]] = [
    (None, "string or a number"),
    (True, "string or a number"),
    ([1], "string or a number"),
    ({"a": 1}, "string or a number"),
    (2**53 + 1, "2^53"),
    (-(2**53) - 1, "2^53"),
    (1e300, "2^53"),
    (LONG_KEY, "1024"),
]
"""Values that no key may have."""

# A bare key is written as a value or as an object: a list is neither, and an object has the key's own attributes.
KEYS = [("notes", value, "'id'") for value, _ in WRONG_VALUES if not isinstance(value, list | dict)]
KEYS += [("notes", {"id": value}, "'id'") for value, _ in WRONG_VALUES]
KEYS += [
    ("notes", [1], "'id'"),
    ("notes", {}, "'id'"),
    ("notes", {"id": "n", "other": 1}, "'other'"),
    ("lines", "p", "'n'"),
    ("lines", ["p", 1], "'n'"),
    ("lines", {"page": "p"}, "'n'"),
    ("lines", {"n": 1}, "'page'"),
    ("lines", {"page": "p", "n": True}, "'n'"),
    ("lines", {"page": "p", "n": 1, "m": 2}, "'m'"),
    ("members", {"room": "r", "user": 5}, "'user'"),
]
"""Keys that are none: of an update, a delete, a get and a check."""
KEYED: list[tuple[str, dict[str, Any]]] = [("get", {}), ("delete", {}), ("update", {"set": {"x": 1}})]


def _wrong() -> list[Wrong]:
    found = [
        # ── any request ──
        Wrong(5, {}, ("$.action",)),
        Wrong(None, {}, ("$.action",)),
        Wrong(["put"], {}, ("$.action",)),
        Wrong("", {}, ("''",), "unsupported_action"),
        Wrong("upsert", {}, ("'upsert'",), "unsupported_action"),
        Wrong("ping", {"traceparent": 5}, ("traceparent",)),
        Wrong("put", {"table": "notes", "item": NOTE, "traceparent": "00-0-0-00"}, ("traceparent",)),
        Wrong("ping", {"pong": 1}, ("pong",)),
        Wrong("whoami", {"user": "alice"}, ("user",)),
        # ── auth ──
        Wrong("auth", {}, ("auth_key",)),
        Wrong("auth", {"auth_key": 5}, ("$.auth_key",)),
        Wrong("auth", {"auth_key": None}, ("$.auth_key",)),
        Wrong("auth", {"auth_key": "k", "cursor": 5}, ("$.cursor",)),
        Wrong("auth", {"auth_key": "k", "topics": []}, ("$.topics",)),
        Wrong("auth", {"auth_key": "k", "topics": {"scores": 5}}, ("$.topics",)),
        Wrong("auth", {"auth_key": "k", "user": "bob"}, ("user",)),
        # ── follow, unfollow, send ──
        *(
            Wrong(action, fields, names)
            for action in ("follow", "unfollow")
            for fields, names in (
                ({}, ("topic",)),
                ({"topic": 5}, ("$.topic",)),
                ({"topic": ""}, ("topic", "1024 bytes")),
                ({"topic": LONG_KEY}, ("topic", "1024 bytes")),
                ({"topic": "cell:1", "table": "notes"}, ("table",)),
            )
        ),
        Wrong("follow", {"topic": "cell:1", "cursor": 5}, ("$.cursor",)),
        Wrong("send", {"user": "bob"}, ("body",)),
        Wrong("send", {"body": 1}, ("user", "connection")),
        Wrong("send", {"body": 1, "user": "bob", "connection": "c"}, ("user", "connection")),
        Wrong("send", {"body": 1, "user": 5}, ("$.user",)),
        Wrong("send", {"body": 1, "connection": 5}, ("$.connection",)),
        Wrong("send", {"body": 1, "user": "bob", "to": "bob"}, ("to",)),
        Wrong("send", {"body": 1, "user": "bob", "request": ""}, ("request", "256 characters")),
        Wrong("send", {"body": nested(70), "user": "bob"}, ("64 levels", "$.body")),
        Wrong("send", {"body": 1, "user": ""}, ("user", "1024 bytes")),
        Wrong("send", {"body": 1, "user": LONG_KEY}, ("user", "1024 bytes")),
        # ── put ──
        Wrong("put", {"item": NOTE}, ("table",)),
        Wrong("put", {"table": "notes"}, ("item",)),
        put(5, NOTE, "$.table"),
        put("nothing", NOTE, "'nothing'"),
        put("notes", [], "$.item"),
        put("notes", None, "$.item"),
        put("notes", "text", "$.item"),
        put("notes", NOTE, "iff", iff={"absent": True}),
        put("notes", NOTE, "key", key="n"),
        put("notes", {}, "'id'", "'notes'", "missing"),
        put("lines", {"n": 1}, "'page'", "'lines'", "missing"),
        put("lines", {"page": "p"}, "'n'", "'lines'", "missing"),
        put("lines", {"page": "p", "n": "one"}, "'n'", "'lines'", "number"),
        put("members", {"room": "r", "user": 5}, "'user'", "string"),
        put("notes", {"id": "n", "x": nested(70)}, "64 levels", "$.item.x.a"),
        put("notes", {"id": "n", "x": [{"y": 2**64}]}, "64 bits", "$.item.x[0].y"),
        put("notes", {"id": 2**64}, "64 bits", "$.item.id"),
        put("notes", {"id": -(2**63) - 1}, "64 bits", "$.item.id"),
        put("notes", {"id": "n", "x": BIG + BIG}, str(MAX_BYTES), code="too_large"),
        put("orders", {"id": "o", "owner": "alice", "at": "noon"}, "'orders'", "$.at"),
        put("orders", {"id": "o"}, "'orders'", "`owner`"),
        put("orders", {"id": 5, "owner": "alice"}, "'orders'", "$.id"),
        put("even", {"id": 1, "n": 3}, "'even'", "n is 3, which is odd"),
        put("even", {"id": 1, "n": "x"}, "'even'", "schema"),
        # ── update ──
        Wrong("update", {"table": "notes"}, ("key",)),
        Wrong("update", {"key": "n"}, ("table",)),
        Wrong("update", {"table": "nothing", "key": "n"}, ("'nothing'",)),
        update("item", item=NOTE),
        update("$.set", set=5),
        update("$.set", set="text"),
        update("$.set[0]", set=["text"]),
        update("$.set[0]", set=[["text"]]),
        update("$.set[0]", set=[["text", 1, 2]]),
        update("$.set[0][0]", set=[[5, 1]]),
        update("$.set[0][0][1]", set=[[["deep", 5], 1]]),
        update("$.remove", remove="text"),
        update("$.remove", remove={"text": 1}),
        update("$.remove[0]", remove=[5]),
        update("$.remove[0][1]", remove=[["deep", None]]),
        update("$.add", add=5),
        update("$.add[0]", add=["count"]),
        update("add", "'count'", "number", add={"count": "1"}),
        update("add", "'count'", "number", add={"count": True}),
        update("add", "'count'", "number", add={"count": None}),
        update("add", "'text'", "not a number", add={"text": 1}),
        update("add", "'yes'", "not a number", add={"yes": 1}),
        update("add", "'deep'", "not a number", add={"deep": 1}),
        update("add", "'huge'", "beyond", add={"huge": 1.7e308}),
        update("add", "'count'", "beyond", add={"count": 2**64 - 1}),
        *(
            update(f"'{name}.a.b'", f"'{name}'", "not an object", **{part: value})
            for name in ("text", "list", "yes", "count")
            for part, value in (
                ("set", {f"{name}.a.b": 1}),
                ("remove", [f"{name}.a.b"]),
                ("add", {f"{name}.a.b": 1}),
            )
        ),
        update("['text', 'a']", "'text'", "not an object", set=[[["text", "a"], 1]]),
        update("''", "empty name", set={"": 1}),
        update("'a..b'", "empty name", set={"a..b": 1}),
        update("'a.'", "empty name", remove=["a."]),
        update("'.a'", "empty name", add={".a": 1}),
        update("[]", "empty name", set=[[[], 1]]),
        update("32 names", set={".".join("a" * 33): 1}),
        update("64 levels", "$.a.a.a.a", set={"a.a.a.a.a": nested(60)}),
        update(str(MAX_BYTES), code="too_large", key="big", set={"y": BIG}),
        update("'id'", "key", set={"id": "m"}),
        update("'id'", "key", set={"id": None}),
        update("'id'", "not an object", set={"id.a": 1}),
        update("'id'", "key", set=[[["id"], "m"]]),
        update("'id'", "key", remove=["id"]),
        Wrong("update", {"table": "lines", "key": {"page": "p", "n": 1}, "add": {"n": 1}}, ("'n'", "key")),
        Wrong("update", {"table": "lines", "key": {"page": "p", "n": 1}, "set": {"page": "q"}}, ("'page'", "key")),
        Wrong("update", {"table": "orders", "key": "o", "set": {"at": "noon"}}, ("'orders'", "$.at")),
        Wrong("update", {"table": "orders", "key": "o", "remove": ["owner"]}, ("'orders'", "`owner`")),
        # ── delete, get ──
        Wrong("delete", {"table": "notes"}, ("key",)),
        Wrong("delete", {"key": "n"}, ("table",)),
        Wrong("delete", {"table": "nothing", "key": "n"}, ("'nothing'",)),
        Wrong("delete", {"table": "notes", "key": "n", "item": NOTE}, ("item",)),
        Wrong("get", {"table": "notes"}, ("key",)),
        Wrong("get", {"key": "n"}, ("table",)),
        Wrong("get", {"table": ["notes"], "key": "n"}, ("$.table",)),
        Wrong("get", {"table": "nothing", "key": "n"}, ("'nothing'",)),
        Wrong("get", {"table": "notes", "key": "n", "if": {"present": True}}, ("if",)),
        Wrong("get", {"table": "notes", "key": "n", "request": "r"}, ("request",)),
        # ── query ──
        Wrong("query", {"table": "lines"}, ("key",)),
        Wrong("query", {"key": "p"}, ("table",)),
        query("'nothing'", table="nothing"),
        query("'page'", key=None),
        query("'page'", key=True),
        query("'page'", key=["p"]),
        query("'page'", key={}),
        query("'page'", key=2**53 + 1),
        query("'page'", key=LONG_KEY),
        query("'n'", key={"page": "p", "n": 1}),
        *(query("limit", limit=limit) for limit in (0, -1, 1001, 2**63)),
        *(query("$.limit", limit=limit) for limit in ("5", 1.5, True, None)),
        *(query("$.reverse", reverse=value) for value in (1, "true", None)),
        *(query("$.prefix", prefix=value) for value in (5, ["a"], True)),
        *(query(f"$.{name}", **{name: value}) for name in ("after", "before") for value in (True, {"n": 1})),
        *(query(f"$.{name}[0]", **{name: [value]}) for name in ("after", "before") for value in (None, True, [1])),
        *(query(name, "list", **{name: ["p", 1]}) for name in ("after", "before")),
        query("start", start=1),
        query("$.index", index=5),
        query("'by_owner'", "none", index="by_owner"),
        query("'by_color'", "'by_owner'", table="orders", index="by_color"),
        query("'owner'", "'by_owner'", table="orders", index="by_owner", key={"id": "o"}),
        query("'owner'", "'by_owner'", table="orders", index="by_owner", key={"owner": "a", "at": 1}),
        *(
            query("'owner'", says, table="orders", index="by_owner", key=value)
            for value, says in WRONG_VALUES
            if not isinstance(value, dict)
        ),
        *(
            query(name, "list", table="orders", index="by_owner", key="alice", **{name: value})
            for name in ("after", "before")
            for value in ([], [1], [1, "o", 2])
        ),
        # ── transact ──
        Wrong("transact", {}, ("operations",)),
        transact({}, "$.operations"),
        transact(None, "$.operations"),
        transact([], "operations", "1 to 100"),
        transact([{"action": "put", "table": "notes", "item": NOTE}] * 101, "operations", "1 to 100"),
        transact([1], "$.operations[0]"),
        transact([{"action": "put", "table": "notes", "item": NOTE}, []], "$.operations[1]"),
        transact([{"action": "put", "table": "notes", "item": NOTE}], "table", table="notes"),
        second({"table": "notes", "item": NOTE}, "action"),
        second({"action": "get", "table": "notes", "key": "n"}, "action", "'get'"),
        second({"action": "transact", "operations": []}, "action", "'transact'"),
        second({"action": None}, "action"),
        second({"action": ["put"]}, "action"),
        second({"action": "put", "table": "notes"}, "item"),
        second({"action": "put", "item": NOTE}, "table"),
        second({"action": "put", "table": 5, "item": NOTE}, "$.table"),
        second({"action": "put", "table": "nothing", "item": NOTE}, "'nothing'"),
        second({"action": "put", "table": "notes", "item": [NOTE]}, "$.item"),
        second({"action": "put", "table": "lines", "item": {"page": "p"}}, "'n'", "missing"),
        second({"action": "put", "table": "lines", "item": {"page": "p", "n": 2**54}}, "'n'", "2^53"),
        second({"action": "put", "table": "lines", "item": {"page": "p", "n": "one"}}, "'n'", "number"),
        second({"action": "put", "table": "notes", "item": NOTE, "request": "r"}, "request"),
        second({"action": "put", "table": "notes", "item": NOTE, "id": 1}, "id"),
        second({"action": "put", "table": "orders", "item": {"id": "p", "owner": 5}}, "$.owner"),
        second({"action": "put", "table": "even", "item": {"id": "p", "x": BIG + BIG}}, "262144", code="too_large"),
        second({"action": "update", "table": "lines", "set": {}}, "key"),
        second({"action": "update", "table": "lines", "key": {"page": "p"}, "set": {}}, "'n'"),
        second({"action": "update", "table": "lines", "key": {"page": "p", "n": 1}, "set": 5}, "$.set"),
        second({"action": "update", "table": "lines", "key": {"page": "p", "n": 1}, "set": {"n": 2}}, "'n'", "key"),
        second({"action": "update", "table": "lines", "key": {"page": "p", "n": 1}, "add": {"x": "1"}}, "add", "'x'"),
        second({"action": "delete", "table": "notes"}, "key"),
        second({"action": "delete", "table": "lines", "key": {"page": "p", "m": 1}}, "'m'"),
        second({"action": "check", "table": "lines", "key": {"page": "p", "n": 1}}, "if"),
        second({"action": "check", "table": "lines", "if": {"absent": True}}, "key"),
        second({"action": "check", "table": "lines", "key": {"page": "p"}, "if": {"absent": True}}, "'n'"),
        second({"action": "check", "table": "lines", "key": {"page": "p", "n": 1}, "set": {}}, "set"),
        transact(
            [
                {"action": "put", "table": "notes", "item": NOTE},
                {"action": "check", "table": "notes", "key": "x", "if": {"absent": True}},
                {"action": "delete", "table": "notes", "key": {"id": "n"}},
            ],
            "operations 0 and 1",
            "partition",
        ),
        transact(
            [
                {"action": "put", "table": "notes", "item": {"id": "p"}},
                {"action": "put", "table": "lines", "item": {"page": "p", "n": 1}},
                {"action": "check", "table": "lines", "key": {"page": "p", "n": 1.0}, "if": {"present": True}},
            ],
            "operations 1 and 2",
            "same item",
        ),
        transact(
            [
                {"action": "put", "table": "notes", "item": {"id": 1}},
                {"action": "put", "table": "orders", "item": {"id": "1", "owner": "a"}},
            ],
            "operations 0 and 1",
            "partition",
        ),
    ]
    for value, says in WRONG_VALUES:
        found += [
            put("notes", {"id": value}, "'id'", "'notes'", says),
            put("lines", {"page": "p", "n": value}, "'n'", "'lines'", says),
        ]
    for table, key, names in KEYS:
        found += [Wrong(action, {"table": table, "key": key, **more}, (names,)) for action, more in KEYED]
        found.append(second({"action": "check", "table": table, "key": key, "if": {"present": True}}, names))
    for condition, names in BAD_IFS:
        found += [
            put("notes", NOTE, names, **{"if": condition}),
            update(names, **{"if": condition}),
            Wrong("delete", {"table": "notes", "key": "n", "if": condition}, (names,)),
            second({"action": "check", "table": "notes", "key": "p", "if": condition}, names),
        ]
    operations = [{"action": "put", "table": "notes", "item": {"id": "n"}}]
    for request in ("", "r" * 257, 5, ["r"], True):
        found += [
            put("notes", NOTE, "request", request=request),
            update("request", set={"x": 1}, request=request),
            Wrong("delete", {"table": "notes", "key": "n", "request": request}, ("request",)),
            transact(operations, "request", request=request),
        ]
    return found


WRONG = _wrong()

NO_JSON = [
    '{"id":7,"action":"put","table":"notes","item":{"id":"n","x":NaN}}',
    '{"id":7,"action":"put","table":"notes","item":{"id":"n","x":Infinity}}',
    '{"id":7,"action":"put","table":"notes","item":{"id":"n","x":-Infinity}}',
    '{"id":7,"action":"put","table":"notes","item":{"id":"n",}}',
    '{"id":7,"action":"put","table":"notes","item":{"id":"n"}',
]
"""Texts that are no JSON."""
