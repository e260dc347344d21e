"""The rights of one command: reading, writing, following, hidden attributes, and what a condition may reveal."""

from __future__ import annotations

from typing import Any

import pytest

from tidewire import App, claim, everyone, nobody, user
from tidewire.app import Write
from tidewire.errors import BadRequest, Conflict, NotFound, PermissionDenied
from tidewire.model.protocol import Condition
from tidewire.model.records import Command, ItemRecord
from tidewire.model.values import ItemKey
from tidewire.services.store.budget import UNLIMITED, Account
from tidewire.services.store.facts import Fact, ItemFact, Value
from tidewire.services.store.rights import Rights
from tidewire.services.store.view import Situation, View

from .world import GENERATION, KEYS, NOW

KEY = ItemKey("mail", "m", None)


def own_or_new(write: Write) -> Any:
    return user("to") if write.old else True


def broken(_: Any) -> Any:
    raise KeyError("missing")


def make_app() -> App:
    app = App("test")
    app.table("mail", key="id", readers=user("to"), writers=own_or_new, hidden=["secret"])
    app.table("offers", key="id", readers=claim("tenant"), writers=claim("tenant"))
    app.table("closed", key="id", readers=everyone, writers=nobody)
    app.table("unreadable", key="id", readers=broken, writers=everyone)
    app.table("unwritable", key="id", readers=everyone, writers=broken)
    app.table("odd", key="id", readers=everyone, writers=lambda write: "yes")  # type: ignore[arg-type,return-value]
    app.topic("weather:{city}", followers=everyone)
    app.topic("box:{to}", followers=user("to"))
    return app


def rights_of(who: str, *, role: str = "client", item: dict[str, Any] | None = None, **claims: Any) -> Rights:
    """The rights of a user, where the item `KEY` is as given, with version 4, or absent."""
    facts: dict[Fact, Value] = {ItemFact(KEY): ItemRecord(4, NOW, "someone", item) if item else None}
    view = View(make_app(), KEYS, facts, Situation(0, GENERATION, NOW, (0, 0), 262_144))
    view.begin(Account(UNLIMITED, lambda: 0.0))
    return Rights(view, Command("get", {}, who, role, claims, None, None, 0, NOW, "g1", 1))


MAIL = {"id": "m", "to": "alice", "text": "hello"}
TABLES = make_app().tables


def test_readers_decide_who_reads() -> None:
    assert rights_of("alice").may_read(TABLES["mail"], MAIL)
    assert not rights_of("bob").may_read(TABLES["mail"], MAIL)
    assert rights_of("bob", role="service").may_read(TABLES["mail"], MAIL), "a service key reads everything"
    offer = {"id": "o", "tenant": "acme"}
    assert rights_of("bob", tenant="acme").may_read(TABLES["offers"], offer)
    assert not rights_of("bob", tenant="other").may_read(TABLES["offers"], offer)


def test_readers_that_raise_let_no_client_read() -> None:
    assert not rights_of("alice").may_read(TABLES["unreadable"], {"id": "x"})


def test_an_unreadable_item_looks_like_an_absent_one() -> None:
    assert rights_of("alice", item=MAIL).readable(TABLES["mail"], KEY) == MAIL
    messages = []
    for rights in (rights_of("bob", item=MAIL), rights_of("bob")):
        with pytest.raises(NotFound) as refused:
            rights.readable(TABLES["mail"], KEY)
        messages.append((refused.value.message, refused.value.details))
    assert messages[0] == messages[1]


def test_a_write_needs_the_right_to_both_images() -> None:
    offers, taken = TABLES["offers"], {"id": "o", "tenant": "other"}
    offer = {"id": "o", "tenant": "acme"}
    rights = rights_of("bob", tenant="acme")
    rights.may_write(offers, None, offer)
    rights.may_write(offers, offer, None)
    for old, new in ((offer, taken), (taken, offer), (taken, None), (None, taken)):
        with pytest.raises(PermissionDenied, match="may not write"):
            rights.may_write(offers, old, new)


def test_a_writers_function_sees_both_images() -> None:
    mail = TABLES["mail"]
    rights_of("bob").may_write(mail, None, MAIL)
    rights_of("alice").may_write(mail, MAIL, MAIL)
    with pytest.raises(PermissionDenied):
        rights_of("bob").may_write(mail, MAIL, MAIL)


def test_a_table_that_no_client_writes_is_written_by_service_keys() -> None:
    with pytest.raises(PermissionDenied):
        rights_of("alice").may_write(TABLES["closed"], None, {"id": "c"})
    rights_of("job", role="service").may_write(TABLES["closed"], None, {"id": "c"})


@pytest.mark.parametrize("table", ["unwritable", "odd"])
def test_writers_that_fail_refuse_clients_with_a_sentence(table: str) -> None:
    with pytest.raises(BadRequest, match=f"rules of table '{table}'"):
        rights_of("alice").may_write(TABLES[table], None, {"id": "x"})
    rights_of("job", role="service").may_write(TABLES[table], None, {"id": "x"})


def test_an_item_whose_readers_fail_is_not_written_by_anyone() -> None:
    for role in ("client", "service"):
        with pytest.raises(BadRequest, match="rules of table 'unreadable'"):
            rights_of("alice", role=role).may_write(TABLES["unreadable"], None, {"id": "x"})


def test_hidden_attributes_are_for_service_keys() -> None:
    with pytest.raises(PermissionDenied, match="'secret'"):
        rights_of("alice").keep_hidden(TABLES["mail"], ["text", "secret"])
    rights_of("alice").keep_hidden(TABLES["mail"], ["text"])
    rights_of("job", role="service").keep_hidden(TABLES["mail"], ["secret"])


def test_the_followers_of_every_family_decide_who_follows() -> None:
    rights_of("bob").may_follow("weather:oslo")
    rights_of("bob").may_follow("box:bob")
    rights_of("job", role="service").may_follow("box:bob")
    with pytest.raises(PermissionDenied, match="box:bob"):
        rights_of("alice").may_follow("box:bob")
    with pytest.raises(NotFound, match="no topic 'sports'"):
        rights_of("alice").may_follow("sports")


class TestConditions:
    @pytest.mark.parametrize(
        ("condition", "item", "holds"),
        [
            (Condition(version=4), MAIL, True),
            (Condition(version=3), MAIL, False),
            (Condition(version=4), None, False),
            (Condition(absent=True), None, True),
            (Condition(absent=True), MAIL, False),
            (Condition(present=True), MAIL, True),
            (Condition(present=True), None, False),
            (Condition(equals={"text": "hello"}), MAIL, True),
            (Condition(equals={"text": "bye"}), MAIL, False),
            (Condition(equals={"missing": None}), MAIL, False),
        ],
    )
    def test_a_condition_holds_or_is_a_conflict(self, condition: Condition, item: Any, holds: bool) -> None:
        rights = rights_of("alice", item=item)
        if holds:
            rights.check(TABLES["mail"], KEY, condition)
            return
        with pytest.raises(Conflict) as refused:
            rights.check(TABLES["mail"], KEY, condition)
        assert refused.value.details == ({"version": 4} if item else {})

    @pytest.mark.parametrize(
        "condition",
        [Condition(version=4), Condition(version=3), Condition(equals={"text": "hello"}), Condition(absent=True)],
    )
    def test_a_conflict_reveals_nothing_of_an_unreadable_item(self, condition: Condition) -> None:
        with pytest.raises(Conflict) as refused:
            rights_of("bob", item=MAIL).check(TABLES["mail"], KEY, condition)
        assert refused.value.details == {}

    def test_the_first_look_at_the_checks_of_a_transaction_skips_unreadable_items(self) -> None:
        bob = rights_of("bob", item=MAIL)
        bob.check_if_readable(TABLES["mail"], KEY, Condition(version=3))
        with pytest.raises(NotFound):
            rights_of("bob").check_if_readable(TABLES["mail"], KEY, Condition(version=3))
        with pytest.raises(Conflict):
            rights_of("alice", item=MAIL).check_if_readable(TABLES["mail"], KEY, Condition(version=3))

    def test_a_condition_on_a_hidden_attribute_is_refused(self) -> None:
        with pytest.raises(PermissionDenied, match="'secret'"):
            rights_of("alice", item=MAIL).check(TABLES["mail"], KEY, Condition(equals={"secret": "guess"}))
