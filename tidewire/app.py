"""What an application declares: its tables, its memberships, who may read and write them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tidewire.audiences import (
    Audience,
    AudienceOf,
    Claim,
    Everyone,
    Followers,
    Members,
    Peers,
    Topic,
    User,
    Vacant,
    nobody,
)
from tidewire.errors import BadRequest, ConfigurationError
from tidewire.model.protocol import fault_in
from tidewire.model.records import Item
from tidewire.model.values import LARGEST_KEY_NUMBER, ItemKey, Scalar, canonical, tuple_bytes

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
STREAM_VIEWS = ("KEYS_ONLY", "NEW_IMAGE", "OLD_IMAGE", "NEW_AND_OLD_IMAGES")
CONNECTIONS = "connections"
BY_MEMBER = "by_member"
MAX_KEY_BYTES = 1024
"""Of a string in a key, as UTF-8."""


class Write(NamedTuple):
    """What a `writers` function is asked about. `old` is None for an insert, `new` for a delete."""

    old: Item | None
    new: Item | None
    user: str
    claims: dict[str, Any]


Writers = Audience | Callable[[Write], Audience | bool]
Schema = type[msgspec.Struct] | Callable[[Item], Any]
"""What an item must pass: a msgspec Struct, or a callable that raises for an item that does not fit."""


@dataclass(frozen=True)
class Table:
    """A table as declared. `key` is its partition attribute, and its sort attribute if it has one."""

    name: str
    key: tuple[str, ...]
    readers: AudienceOf
    writers: Writers
    stream_view: str = "NEW_AND_OLD_IMAGES"
    hidden: frozenset[str] = frozenset()
    indexes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    expires: str | None = None
    schema: Schema | None = None
    normalize: bool = False

    @property
    def sorted(self) -> bool:
        return len(self.key) == 2

    @property
    def in_own_feeds(self) -> bool:
        """Whether a change can reach a user who follows no topic. False if all readers are followers of topics."""
        if not isinstance(self.readers, Audience):
            return True  # a function may return any audience
        return any(isinstance(part, User | Members | Peers | Everyone | Claim) for part in self.readers.parts())

    def index(self, name: str) -> tuple[str, str]:
        """The (partition attribute, sort attribute) of an index. Raises BadRequest when there is none of that name."""
        try:
            return self.indexes[name]
        except KeyError:
            known = ", ".join(map(repr, self.indexes)) or "none"
            raise BadRequest(f"table {self.name!r} has no index {name!r}; it has {known}") from None

    def is_expired(self, item: Item, now_ms: int) -> bool:
        """Whether its time has come. An attribute that is no number names no time."""
        at = item.get(self.expires) if self.expires else None
        # Divided as Redis is asked for what is due: rounded otherwise, an item could be due there and not here.
        return isinstance(at, int | float) and not isinstance(at, bool) and at <= now_ms / 1000

    def validate(self, item: Item) -> Item:
        """Check an item against the schema, and return the item to store.

        With `normalize` that is what the schema returns; else the item itself.

        Raises:
            BadRequest: the item does not fit; the message says why and where.
        """
        if self.schema is None:
            return item
        try:
            made = self._fitted(item)
        except Exception as error:  # the application's own rule: it may raise anything
            why = str(error) or type(error).__name__
            raise BadRequest(f"table {self.name!r}: the item does not fit its schema: {why}") from None
        if not self.normalize:
            return item
        if not isinstance(made, dict) or fault_in(made):
            problem = fault_in(made) if isinstance(made, dict) else f"a {type(made).__name__}, not a dict"
            raise BadRequest(f"table {self.name!r}: the schema returned {problem}")
        if self.key_of(made) != self.key_of(item):
            raise BadRequest(f"table {self.name!r}: the schema changed the key of the item")
        return made

    def _fitted(self, item: Item) -> Any:
        """What the schema returns for an item. Raises whatever the schema raises."""
        assert self.schema is not None
        if isinstance(self.schema, type) and issubclass(self.schema, msgspec.Struct):
            fitted = msgspec.convert(item, self.schema)
            return msgspec.to_builtins(fitted) if self.normalize else fitted
        check: Callable[[Item], Any] = self.schema
        return check(deepcopy(item))

    def key_of(self, item: Item) -> ItemKey:
        """The key of an item. Raises BadRequest naming the attribute that is missing or of a wrong kind."""
        partition = self._key_value(item, self.key[0])
        return ItemKey(self.name, partition, self._key_value(item, self.key[1]) if self.sorted else None)

    def parse_key(self, given: Any) -> ItemKey:
        """The key that a request names: an object of the key attributes, or the value where there is only one."""
        if not isinstance(given, dict):
            if self.sorted or isinstance(given, list):
                raise BadRequest(f"key: an object with {self._key_names()} is needed for table {self.name!r}")
            given = {self.key[0]: given}
        self._refuse_strangers(given, self.key)
        return self.key_of(given)

    def parse_partition_key(self, given: Any) -> Scalar:
        """The partition-key value that a query names: the value itself, or an object of that one attribute."""
        if isinstance(given, dict):
            self._refuse_strangers(given, self.key[:1])
        else:
            given = {self.key[0]: given}
        return self._key_value(given, self.key[0])

    def parse_index_key(self, index: str, given: Any) -> Scalar:
        """The value of an index's partition attribute that a query names, in either of the two forms."""
        attribute = self.index(index)[0]
        if isinstance(given, dict):
            if given.keys() != {attribute}:
                raise BadRequest(f"key: the value of {attribute!r} is needed for index {index!r}")
            given = given[attribute]
        return key_value(given, f"attribute {attribute!r} of index {index!r}")

    def key_object(self, key: ItemKey) -> dict[str, Scalar]:
        values = (key.partition,) if key.sort is None else (key.partition, key.sort)
        return dict(zip(self.key, values, strict=True))

    def visible(self, item: Item, role: str) -> Item:
        """The item without what is hidden from clients."""
        if not self.hidden or role == "service":
            return item
        return {name: value for name, value in item.items() if name not in self.hidden}

    def _key_names(self) -> str:
        return " and ".join(repr(name) for name in self.key)

    def _refuse_strangers(self, given: dict[str, Any], attributes: Iterable[str]) -> None:
        for name in given:
            if name not in attributes:
                raise BadRequest(f"key: {name!r} is not part of it; table {self.name!r} has {self._key_names()}")

    def _key_value(self, item: Item, attribute: str) -> Scalar:
        value = item.get(attribute)
        if type(value) is str and len(value) <= MAX_KEY_BYTES // 4:
            return value  # as most are, and short enough in any script
        if attribute not in item:
            raise BadRequest(f"key attribute {attribute!r} of table {self.name!r} is missing")
        return key_value(value, f"key attribute {attribute!r} of table {self.name!r}")


def key_value(value: Any, what: str) -> Scalar:
    """A value that can stand in a key. Raises BadRequest saying what is wrong with `what`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRequest(f"{what} must be a string or a number")
    if not isinstance(value, str):
        if not abs(value) <= LARGEST_KEY_NUMBER:
            raise BadRequest(f"{what} must be a number between -2^53 and 2^53")
        return canonical(value)
    if len(value.encode()) > MAX_KEY_BYTES:
        raise BadRequest(f"{what} is longer than {MAX_KEY_BYTES} bytes")
    return value


def index_key(item: Item, attributes: tuple[str, str]) -> tuple[Scalar, Scalar] | None:
    """Where an item stands in an index: (partition value, sort value). None for one that is not in it."""
    try:
        partition, sort = (key_value(item[attribute], attribute) for attribute in attributes)
    except (KeyError, BadRequest):
        return None
    return partition, sort


def index_field(key: ItemKey, item: Item, attributes: tuple[str, str]) -> bytes:
    """The bytes by which an item stands in an index: its sort value, then its own key."""
    return tuple_bytes(item[attributes[1]], *(value for value in key[1:] if value is not None))


class Membership(Table):
    """A table whose items say who belongs to which group: key (group, member). A member is the name of a user."""

    def key_of(self, item: Item) -> ItemKey:
        key = super().key_of(item)
        if not isinstance(key.sort, str):
            raise BadRequest(
                f"key attribute {self.key[1]!r} of table {self.name!r} must be the name of a user, a string"
            )
        return key

    def of(self, attribute: str, **values: Any) -> Audience:
        """The members of the group named by that attribute; with values, those whose membership item has them."""
        return Members(self.name, attribute, tuple(sorted(values.items())))

    def vacant(self, attribute: str) -> Audience:
        """Anyone, while that group has no members: how the first one gets in."""
        return Vacant(self.name, attribute)

    def peers(self, attribute: str) -> Audience:
        """Whoever shares a group with the user named by that attribute. Eventual."""
        return Peers(self.name, attribute)


class App:
    """An application: a name, its tables, and perhaps a folder of static files beside the module that declares it."""

    def __init__(self, name: str, *, static: str | None = None) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigurationError("App(name): a name is needed")
        self.name = name
        self.tables: dict[str, Table] = {}
        self.topics: dict[str, Topic] = {}
        self.static = _static_folder(static, inspect.stack()[1].filename) if static else None
        self.connections()

    def table(
        self,
        name: str,
        *,
        key: str | tuple[str, str],
        readers: AudienceOf = nobody,
        writers: Writers = nobody,
        stream_view: str = "NEW_AND_OLD_IMAGES",
        indexes: Mapping[str, tuple[str, str]] | None = None,
        hidden: Iterable[str] = (),
        expires: str | None = None,
        schema: Schema | None = None,
        normalize: bool = False,
    ) -> Table:
        """Declare a table; `key` is its partition attribute, or (partition attribute, sort attribute).

        `indexes` are name: (partition attribute, sort attribute). `expires` names the attribute that says when an item
        ends, in seconds since 1970. `schema` is a msgspec Struct, or a callable that raises for what does not fit. With
        `normalize`, the store keeps what the schema returns: the Struct's fields with their defaults, or the callable's
        dict.
        """
        attributes: Any = tuple(key) if isinstance(key, list | tuple) else (key,)
        table = Table(
            name,
            attributes,
            readers,
            writers,
            stream_view,
            _hidden(name, hidden),
            _indexes(name, indexes or {}),
            expires,
            schema,
            normalize,
        )
        self._declare(table)
        return table

    def membership(
        self,
        name: str,
        *,
        group: str,
        member: str,
        readers: AudienceOf | None = None,
        writers: Writers = nobody,
        stream_view: str = "NEW_AND_OLD_IMAGES",
        indexes: Mapping[str, tuple[str, str]] | None = None,
        hidden: Iterable[str] = (),
        expires: str | None = None,
        schema: Schema | None = None,
        normalize: bool = False,
    ) -> Membership:
        """Declare a membership. Unless `readers` says otherwise, its members may read it.

        Its index `by_member` gives the groups of a user.
        """
        shown = Members(name, group) if readers is None else readers
        membership = Membership(
            name,
            (group, member),
            shown,
            writers,
            stream_view,
            _hidden(name, hidden),
            {BY_MEMBER: (member, group)} | _indexes(name, indexes or {}),
            expires,
            schema,
            normalize,
        )
        self._declare(membership)
        return membership

    def topic(self, pattern: str, *, followers: Audience = nobody) -> Topic:
        """Declare a family of topics, like "cell:{id}"; `followers` says who may follow, of an item with `id`."""
        topic = Topic(pattern, followers)
        self._declare_topic(topic)
        return topic

    def families(self, name: str) -> list[tuple[Topic, dict[str, str]]]:
        """The families that a topic is of, each with what its {…} stand for: who follows must be let in by all."""
        found = ((topic, topic.parse(name)) for topic in self.topics.values())
        return [(topic, values) for topic, values in found if values is not None]

    def connections(self, *, readers: AudienceOf = nobody) -> Table:
        """Say who may see who is online: the readers of the table `connections`, which is always there."""
        hidden = frozenset({"source_ip", "user_agent", "claims"})
        table = Table(CONNECTIONS, ("user", "connection"), readers, nobody, hidden=hidden)
        self.tables.pop(CONNECTIONS, None)
        self._declare(table)
        return table

    def __getitem__(self, name: str) -> Table:
        """The table of that name. Raises BadRequest when there is none."""
        try:
            return self.tables[name]
        except KeyError:
            raise BadRequest(f"there is no table {name!r}") from None

    def check(self) -> None:
        """Look at the declarations together, once all are made. Raises ConfigurationError."""
        for table in self.tables.values():
            for what, rule in (("readers", table.readers), ("writers", table.writers)):
                for part in rule.parts() if isinstance(rule, Audience) else ():
                    self._check_part(part, f"table {table.name!r}: its {what}")
                    if isinstance(part, Followers) and self.topics.get(part.topic.pattern) is not part.topic:
                        self._declare_topic(part.topic)
        for topic in self.topics.values():
            for part in topic.followers.parts():
                self._check_part(part, f"topic {topic.pattern!r}: its followers")
            for name in self.tables:
                if topic.parse(name) is not None:
                    raise ConfigurationError(
                        f"topic {topic.pattern!r} could be {name!r}, which is the topic of the table of that name"
                    )

    def _check_part(self, part: Audience, whose: str) -> None:
        if isinstance(part, Members | Vacant | Peers) and not isinstance(self.tables.get(part.membership), Membership):
            raise ConfigurationError(
                f"{whose} name the membership {part.membership!r}, which app {self.name!r} does not declare"
            )

    def _declare_topic(self, topic: Topic) -> None:
        if topic.pattern in self.topics:
            raise ConfigurationError(f"topic {topic.pattern!r} is declared twice")
        self.topics[topic.pattern] = topic

    def _declare(self, table: Table) -> None:
        if not (isinstance(table.name, str) and NAME.match(table.name)):
            raise ConfigurationError(f"table name {table.name!r}: letters, digits and _ (at most 64), no digit first")
        if table.name in self.tables:
            raise ConfigurationError(f"table {table.name!r} is declared twice")
        for what, name in _names(table):
            if not (isinstance(name, str) and NAME.match(name)):
                raise ConfigurationError(
                    f"table {table.name!r}: {what} {name!r}: letters, digits and _ (at most 64), no digit first"
                )
        if len(table.key) not in (1, 2) or len(set(table.key)) != len(table.key):
            raise ConfigurationError(
                f"table {table.name!r}: key is one attribute, or (partition attribute, sort attribute), not {table.key}"
            )
        if set(table.key) & table.hidden:
            raise ConfigurationError(f"table {table.name!r}: a key attribute cannot be hidden")
        if table.schema is not None and not callable(table.schema):
            raise ConfigurationError(
                f"table {table.name!r}: schema is a msgspec Struct or a callable that raises, not {table.schema!r}"
            )
        for what, rule in (("readers", table.readers), ("writers", table.writers)):
            if not (isinstance(rule, Audience) or callable(rule)):
                raise ConfigurationError(
                    f"table {table.name!r}: {what} must be an audience (user(…), members.of(…), everyone, nobody) "
                    f"or a function that returns one, not {rule!r}"
                )
        if table.stream_view not in STREAM_VIEWS:
            raise ConfigurationError(
                f"table {table.name!r}: stream_view is one of {', '.join(STREAM_VIEWS)}, not {table.stream_view!r}"
            )
        self.tables[table.name] = table


def _hidden(table: str, hidden: Iterable[str]) -> frozenset[str]:
    if isinstance(hidden, str) or not isinstance(hidden, Iterable):
        raise ConfigurationError(f"table {table!r}: hidden is a tuple of attribute names, not {hidden!r}")
    return frozenset(hidden)


def _indexes(table: str, indexes: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    found = {}
    for name, attributes in indexes.items() if isinstance(indexes, Mapping) else [("", indexes)]:
        if not isinstance(attributes, list | tuple) or len(attributes) != 2:
            raise ConfigurationError(
                f"table {table!r}: indexes are name: (partition attribute, sort attribute), not {indexes!r}"
            )
        found[name] = (attributes[0], attributes[1])
    return found


def _names(table: Table) -> Iterable[tuple[str, Any]]:
    """What else is named in a declaration."""
    indexed = [attribute for attributes in table.indexes.values() for attribute in attributes]
    expires = [] if table.expires is None else [table.expires]
    yield from (("attribute", attribute) for attribute in (*table.key, *table.hidden, *indexed, *expires))
    yield from (("index", index) for index in table.indexes)


def _static_folder(static: str, declared_in: str) -> Path:
    folder = Path(declared_in).parent / static
    if not folder.is_dir():
        raise ConfigurationError(f"static={static!r}: there is no folder {folder}")
    return folder


def load_app(reference: str) -> App:
    """Import the application named by `module:attribute`. Raises ConfigurationError with one sentence that says why."""
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"APP is module:attribute, for example chat.app:app, not {reference!r}")
    try:
        module = importlib.import_module(module_name)
    except ConfigurationError as error:
        raise ConfigurationError(f"APP {reference!r}: {error}") from None
    except BaseException as error:  # the module is the user's: it can raise anything, SystemExit too
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigurationError(
            f"APP {reference!r} cannot be imported: {type(error).__name__}: {error}{_place(error, module_name)}"
        ) from None
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        found = "has no such attribute" if app is None else f"is of type {type(app).__name__}, not an App"
        raise ConfigurationError(f"APP {reference!r}: {attribute!r} in module {module_name!r} {found}")
    app.check()
    return app


def _place(error: BaseException, module_name: str) -> str:
    """Where in the application's own files it went wrong, for example " (shop.py, line 7)"."""
    if isinstance(error, SyntaxError):
        return ""  # its message says it
    place, trace = "", error.__traceback__
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if module_name.rpartition(".")[2] in (path.stem, path.parent.name):
            place = f" ({path.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
