"""The declarations of an application: tables, memberships and topics, with their readers and writers."""

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
"""Maximum length of a string in a key, in bytes of UTF-8."""


class Write(NamedTuple):
    """A write that a `writers` function judges.

    Attributes:
        old: the item before the write; None for an insert.
        new: the item after it; None for a delete.
        user: the user who writes.
        claims: the claims of the connection.
    """

    old: Item | None
    new: Item | None
    user: str
    claims: dict[str, Any]


Writers = Audience | Callable[[Write], Audience | bool]
Schema = type[msgspec.Struct] | Callable[[Item], Any]
"""A check of items: a msgspec Struct, or a callable that raises for an item that does not fit."""


@dataclass(frozen=True)
class Table:
    """A table as declared. `key` holds its partition attribute, and its sort attribute if it has one."""

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
    sort: str | None = None
    """The kind of all sort keys, "string" or "number"; None if the first item decides."""

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
        """Return the (partition attribute, sort attribute) of an index. Raises BadRequest if there is no such index."""
        try:
            return self.indexes[name]
        except KeyError:
            known = ", ".join(map(repr, self.indexes)) or "none"
            raise BadRequest(f"table {self.name!r} has no index {name!r}; it has {known}") from None

    def is_expired(self, item: Item, now_ms: int) -> bool:
        """Whether an item has expired. A value that is not a number sets no expiry."""
        at = item.get(self.expires) if self.expires else None
        # Divided exactly as for the query of due items in Redis. Rounded differently, an item could be due only there.
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
        """Return what the schema returns for an item. Raises whatever the schema raises."""
        assert self.schema is not None
        if isinstance(self.schema, type) and issubclass(self.schema, msgspec.Struct):
            fitted = msgspec.convert(item, self.schema)
            return msgspec.to_builtins(fitted) if self.normalize else fitted
        check: Callable[[Item], Any] = self.schema
        return check(deepcopy(item))

    def key_of(self, item: Item) -> ItemKey:
        """Return the key of an item. Raises BadRequest that names a missing or wrong attribute."""
        partition = self._key_value(item, self.key[0])
        return ItemKey(self.name, partition, self._key_value(item, self.key[1]) if self.sorted else None)

    def parse_key(self, given: Any) -> ItemKey:
        """Parse the key in a request: an object of the key attributes, or the value if there is only one."""
        if not isinstance(given, dict):
            if self.sorted or isinstance(given, list):
                raise BadRequest(f"key: an object with {self._key_names()} is needed for table {self.name!r}")
            given = {self.key[0]: given}
        self._refuse_strangers(given, self.key)
        return self.key_of(given)

    def parse_partition_key(self, given: Any) -> Scalar:
        """Parse the partition key in a query: the value, or an object of that one attribute."""
        if isinstance(given, dict):
            self._refuse_strangers(given, self.key[:1])
        else:
            given = {self.key[0]: given}
        return self._key_value(given, self.key[0])

    def parse_index_key(self, index: str, given: Any) -> Scalar:
        """Parse the partition key of an index in a query, in either of these forms."""
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
        """Return the item without its hidden attributes."""
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
            return value  # most strings are, and this one is short enough in any script
        if attribute not in item:
            raise BadRequest(f"key attribute {attribute!r} of table {self.name!r} is missing")
        return key_value(value, f"key attribute {attribute!r} of table {self.name!r}")


def key_value(value: Any, what: str) -> Scalar:
    """Check a value of a key. Raises BadRequest that says what is wrong with `what`."""
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
    """Return the (partition value, sort value) of an item in an index; None if the item is not in it."""
    try:
        partition, sort = (key_value(item[attribute], attribute) for attribute in attributes)
    except (KeyError, BadRequest):
        return None
    return partition, sort


def index_field(key: ItemKey, item: Item, attributes: tuple[str, str]) -> bytes:
    """Return the bytes that order an item in an index: its sort value, then its own key."""
    return tuple_bytes(item[attributes[1]], *(value for value in key[1:] if value is not None))


class Membership(Table):
    """A table whose items make users members of groups. Its key is (group, member); a member is the name of a user."""

    def key_of(self, item: Item) -> ItemKey:
        key = super().key_of(item)
        if not isinstance(key.sort, str):
            raise BadRequest(
                f"key attribute {self.key[1]!r} of table {self.name!r} must be the name of a user, a string"
            )
        return key

    def of(self, attribute: str, **values: Any) -> Audience:
        """Return the audience of the members of a group.

        Args:
            attribute: the attribute of the item that names the group.
            values: values that the membership item must have, such as `role="owner"`.
        """
        return Members(self.name, attribute, tuple(sorted(values.items())))

    def vacant(self, attribute: str) -> Audience:
        """Return the audience of every user while a group has no members.

        It lets the first member in; for writers only.
        """
        return Vacant(self.name, attribute)

    def peers(self, attribute: str) -> Audience:
        """Return the audience of the users who share a group with the user that an attribute names.

        Eventually consistent.
        """
        return Peers(self.name, attribute)


class App:
    """An application: its tables, memberships and topics.

    Args:
        name: a name for people.
        static: a folder beside the module; the HTTP port serves it at `/`.
    """

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
        sort: str | None = None,
    ) -> Table:
        """Declare a table.

        Args:
            name: letters, digits and `_`, at most 64, no digit first.
            key: the partition attribute, or (partition attribute, sort attribute).
            readers: an audience, or a function of the item that returns one. They read items and receive changes.
            writers: an audience, or a function of a `Write` that returns an audience or a bool.
            stream_view: the images in a change: `KEYS_ONLY`, `NEW_IMAGE`, `OLD_IMAGE` or `NEW_AND_OLD_IMAGES`.
            indexes: further orders to query by: name to (partition attribute, sort attribute).
            hidden: attributes that only service keys read and write.
            expires: the attribute with the time at which an item ends, in seconds since 1970.
            schema: a msgspec Struct, or a callable that raises for an item that does not fit.
            normalize: whether the store keeps what the schema returns: a Struct with its defaults, or a dict.
            sort: the kind of the sort keys: `"string"` or `"number"`. Without it, the first item decides.

        Raises:
            ConfigurationError: the declaration is wrong; the message says why.
        """
        attributes: Any = tuple(key) if isinstance(key, list | tuple) else (key,)
        if sort is not None and (sort not in ("string", "number") or len(attributes) != 2):
            why = "the table has no sort attribute" if len(attributes) != 2 else f"{sort!r} is neither of them"
            raise ConfigurationError(f'table {name!r}: sort is "string" or "number", the kind of a sort key: {why}')
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
            sort,
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
        """Declare a membership: a table with the key (group, member). Other parameters are those of `table`.

        By default, the members of a group read its items. The index `by_member` gives the groups of a user.

        Args:
            name: the name of the table.
            group: the attribute that names the group.
            member: the attribute that names the user.
            readers: the readers, if they are others than the members.
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
        """Declare a family of topics.

        Args:
            pattern: the names of the topics, such as `"cell:{id}"`.
            followers: the audience of users who may follow one, for an item with the values in its name, as strings.
        """
        topic = Topic(pattern, followers)
        self._declare_topic(topic)
        return topic

    def families(self, name: str) -> list[tuple[Topic, dict[str, str]]]:
        """Return the families that contain a topic, each with the values in its name.

        A follower must be admitted by all of them.
        """
        found = ((topic, topic.parse(name)) for topic in self.topics.values())
        return [(topic, values) for topic, values in found if values is not None]

    def connections(self, *, readers: AudienceOf = nobody) -> Table:
        """Declare the readers of the table `connections`, which every application has: the users who see who is
        online."""
        hidden = frozenset({"source_ip", "user_agent", "claims"})
        table = Table(CONNECTIONS, ("user", "connection"), readers, nobody, hidden=hidden)
        self.tables.pop(CONNECTIONS, None)
        self._declare(table)
        return table

    def __getitem__(self, name: str) -> Table:
        """Return a table by name. Raises BadRequest if there is none."""
        try:
            return self.tables[name]
        except KeyError:
            raise BadRequest(f"there is no table {name!r}") from None

    def check(self) -> None:
        """Check the declarations together, when all are made. Raises ConfigurationError."""
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
    """Check the names in a declaration."""
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
    """Import the application named `module:attribute`.

    Raises ConfigurationError with one sentence that says why not.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"APP is module:attribute, for example chat.app:app, not {reference!r}")
    if module_name.endswith(".py"):
        file = module_name.removesuffix(".py").replace("/", ".")
        raise ConfigurationError(f"APP names a module, not a file: write {file}:{attribute}, not {reference!r}")
    try:
        module = importlib.import_module(module_name)
    except ConfigurationError as error:
        raise ConfigurationError(f"APP {reference!r}: {error}") from None
    except BaseException as error:  # the user's module can raise anything, even SystemExit
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigurationError(
            f"APP {reference!r} cannot be imported: {type(error).__name__}: {error}{_place(error, module_name)}"
            f"{_searched(error, module_name)}"
        ) from None
    app = getattr(module, attribute, None)
    if app is None:
        names = [name for name, value in vars(module).items() if isinstance(value, App)]
        instead = f"; its App is {module_name}:{names[0]}" if names else ""
        raise ConfigurationError(f"APP {reference!r}: module {module_name!r} has no {attribute!r}{instead}")
    if not isinstance(app, App):
        found = f"is of type {type(app).__name__}, not an App"
        raise ConfigurationError(f"APP {reference!r}: {attribute!r} in module {module_name!r} {found}")
    app.check()
    return app


def _searched(error: BaseException, module_name: str) -> str:
    """Return where the application's module was searched, if it was not found."""
    if isinstance(error, ModuleNotFoundError) and module_name.partition(".")[0] == error.name:
        return f": it is neither in {Path.cwd()} nor installed"
    return ""


def _place(error: BaseException, module_name: str) -> str:
    """Return the place of an error in the application's own files, such as " (shop.py, line 7)"."""
    if isinstance(error, SyntaxError):
        return ""  # the message has the place already
    place, trace = "", error.__traceback__
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if module_name.rpartition(".")[2] in (path.stem, path.parent.name):
            place = f" ({path.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
