"""Applications: valid declarations, and the errors of invalid ones."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tidewire.app import App, Table, load_app
from tidewire.audiences import everyone, nobody, user
from tidewire.errors import BadRequest, ConfigurationError
from tidewire.model.values import ItemKey

SENSELESS: dict[str, tuple[Callable[[App], Any], str]] = {
    "a name with a space": (lambda a: a.table("my table", key="id"), "my table"),
    "a name that begins with a digit": (lambda a: a.table("1st", key="id"), "1st"),
    "an empty name": (lambda a: a.table("", key="id"), "table name"),
    "a name of 65 characters": (lambda a: a.table("x" * 65, key="id"), "table name"),
    "a name that is no string": (lambda a: a.table(5, key="id"), "table name"),  # type: ignore[arg-type]
    "a name that ends with a newline": (lambda a: a.table("notes\n", key="id"), "table name"),
    "a key attribute with a dash": (lambda a: a.table("notes", key="my-id"), "my-id"),
    "no key attribute": (lambda a: a.table("notes", key=()), "key is one attribute"),  # type: ignore[arg-type]
    "three key attributes": (
        lambda a: a.table("notes", key=("a", "b", "c")),  # type: ignore[arg-type]
        "key is one attribute",
    ),
    "one key attribute twice": (lambda a: a.table("notes", key=("a", "a")), "key is one attribute"),
    "a membership of one attribute": (lambda a: a.membership("m", group="x", member="x"), "key is one attribute"),
    "a table twice": (lambda a: (a.table("notes", key="id"), a.table("notes", key="id")), "declared twice"),
    "the table connections": (lambda a: a.table("connections", key="id"), "declared twice"),
    "readers that are a string": (
        lambda a: a.table("notes", key="id", readers="author"),  # type: ignore[arg-type]
        "readers must be an audience",
    ),
    "writers that are a bool": (
        lambda a: a.table("notes", key="id", writers=True),  # type: ignore[arg-type]
        "writers must be an audience",
    ),
    "an unknown stream view": (lambda a: a.table("notes", key="id", stream_view="ALL"), "stream_view is one of"),
    "hidden as a string": (lambda a: a.table("notes", key="id", hidden="secret"), "tuple of attribute names"),
    "a hidden key": (lambda a: a.table("notes", key="id", hidden=("id",)), "key attribute cannot be hidden"),
    "a kind of sort key that there is not": (
        lambda a: a.table("notes", key=("a", "b"), sort="date"),
        "neither of them",
    ),
    "a kind of sort key without one": (lambda a: a.table("notes", key="a", sort="string"), "no sort attribute"),
    "a hidden name with a dot": (lambda a: a.table("notes", key="id", hidden=("a.b",)), "a.b"),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_a_senseless_declaration_is_refused_with_a_sentence(case: str) -> None:
    declare, says = SENSELESS[case]
    with pytest.raises(ConfigurationError, match=says) as refused:
        declare(App("test"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", None, 5])
def test_an_app_needs_a_name(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="a name is needed"):
        App(name)


def test_a_static_folder_must_be_there() -> None:
    with pytest.raises(ConfigurationError, match="there is no folder"):
        App("test", static="no-such-folder")


def test_a_membership_of_another_app_is_refused() -> None:
    strange = App("other").membership("members", group="room", member="user")
    app = App("test")
    app.table("messages", key=("room", "id"), readers=user("author") | strange.of("room"))
    with pytest.raises(ConfigurationError, match=r"'messages'.*'members'"):
        app.check()


def test_a_plain_table_is_no_membership() -> None:
    strange = App("other").membership("members", group="room", member="user")
    app = App("test")
    app.table("members", key=("room", "user"))
    app.table("messages", key="id", writers=strange.vacant("room"))
    with pytest.raises(ConfigurationError, match=r"'messages'.*writers.*'members'"):
        app.check()


def test_a_sensible_app_is_as_declared() -> None:
    app = App("test")
    rooms = app.membership("members", group="room", member="user")
    table = app.table("messages", key=("room", "id"), readers=rooms.of("room"), hidden=("secret",))
    app.check()
    assert (table.key, table.readers, table.stream_view) == (("room", "id"), rooms.of("room"), "NEW_AND_OLD_IMAGES")
    assert table.writers is nobody
    assert rooms.key == ("room", "user")
    assert rooms.readers == rooms.of("room"), "the members, unless said otherwise"
    assert app.table("notes", key="id").readers is nobody


def test_the_table_connections_is_always_there() -> None:
    app = App("test")
    connections = app["connections"]
    assert connections.key == ("user", "connection")
    assert connections.readers is nobody
    assert connections.hidden == {"source_ip", "user_agent", "claims"}
    assert app.connections(readers=everyone).readers is everyone
    assert app["connections"].readers is everyone


def test_an_unknown_table_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="no table 'nothing'"):
        App("test")["nothing"]


class TestKeys:
    app = App("test")
    notes: Table = app.table("notes", key="id")
    messages: Table = app.table("messages", key=("room", "id"))

    def test_a_key_is_taken_from_an_item(self) -> None:
        assert self.notes.key_of({"id": "n1", "x": 1}) == ItemKey("notes", "n1", None)
        assert self.messages.key_of({"room": "r1", "id": 2.0}) == ItemKey("messages", "r1", 2)

    def test_a_key_of_one_attribute_may_stand_alone(self) -> None:
        assert self.notes.parse_key("n1") == self.notes.parse_key({"id": "n1"})

    def test_a_query_names_the_partition_key_alone(self) -> None:
        assert self.messages.parse_partition_key("r1") == self.messages.parse_partition_key({"room": "r1"}) == "r1"

    @pytest.mark.parametrize(
        ("key", "says"),
        [
            ({"room": "r1"}, "'id'.*missing"),
            ({"id": "m1"}, "'room'.*missing"),
            ("r1", "'room' and 'id'"),
            (["r1", "m1"], "'room' and 'id'"),
            (None, "'room' and 'id'"),
            ({"room": "r1", "id": "m1", "x": 1}, "'x' is not part"),
            ({"room": "r1", "id": True}, "string or a number"),
            ({"room": "r1", "id": None}, "string or a number"),
            ({"room": ["r1"], "id": "m1"}, "string or a number"),
            ({"room": "r1", "id": 2**53 + 1}, "between"),
            ({"room": "r1", "id": float("nan")}, "between"),
            ({"room": "r1", "id": "é" * 513}, "1024 bytes"),
        ],
    )
    def test_the_error_of_an_invalid_key_names_the_fault(self, key: Any, says: str) -> None:
        with pytest.raises(BadRequest, match=says):
            self.messages.parse_key(key)

    def test_hidden_attributes_are_shown_only_to_service_keys(self) -> None:
        table = App("test").table("notes", key="id", hidden=("secret",))
        item = {"id": "n1", "secret": "s"}
        assert table.visible(item, "client") == {"id": "n1"}
        assert table.visible(item, "service") == item


class TestLoading:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "tw_shop", raising=False)

        def write(source: str) -> None:
            (tmp_path / "tw_shop.py").write_text(source)

        return write

    def test_an_app_is_found_by_its_reference(self, module: Callable[[str], None]) -> None:
        module("from tidewire import App\napp = App('shop')\n")
        assert load_app("tw_shop:app").name == "shop"

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            ("raise RuntimeError('broken')\n", r"RuntimeError: broken \(tw_shop.py, line 1\)"),
            ("raise SystemExit(3)\n", "SystemExit"),
            ("x = = 1\n", "SyntaxError"),
            ("app = None\n", "module 'tw_shop' has no 'app'$"),
            ("from tidewire import App\nshop = App('x')\n", "has no 'app'; its App is tw_shop:shop"),
            ("app = 5\n", "is of type int, not an App"),
            ("import tw_there_is_no_such_module\n", "tw_there_is_no_such_module"),
            ("from tidewire import App\napp = App('x')\napp.table('1', key='id')\n", "table name '1'"),
        ],
    )
    def test_an_application_that_cannot_be_loaded_is_explained_in_one_sentence(
        self, module: Callable[[str], None], source: str, says: str
    ) -> None:
        module(source)
        with pytest.raises(ConfigurationError, match=says):
            load_app("tw_shop:app")

    @pytest.mark.parametrize("reference", ["", "shop", ":app", "shop:"])
    def test_a_reference_names_module_and_attribute(self, reference: str) -> None:
        with pytest.raises(ConfigurationError, match="module:attribute"):
            load_app(reference)

    def test_a_module_that_is_not_there_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match=r"tw_no_such_module.* neither in .* nor installed"):
            load_app("tw_no_such_module:app")

    def test_a_file_in_place_of_a_module_is_corrected(self) -> None:
        with pytest.raises(ConfigurationError, match=r"write shop\.backend:app, not"):
            load_app("shop/backend.py:app")
