"""The handshake: which credential counts, which origin may, where to go on."""

import contextlib
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.errors import BadRequest, ConfigurationError, NotFound, PermissionDenied, RequestError
from tidewire.model.protocol import MAX_TOPICS
from tidewire.services.gateway.handshake import REASON_BYTES, Handshake, close_reason, read
from tidewire.services.gateway.origins import Origins

HOST = {"Host": "chat.example:8080"}


def handshake_of(path: str, headers: dict[str, str] | None = None) -> Handshake:
    return read(path, HOST | (headers or {}), Origins(""))


@pytest.mark.parametrize("path", ["/", "/v1", "/?cursor=a", "/v1?x"])
def test_websockets_are_served_at_the_root_and_at_v1(path: str) -> None:
    handshake_of(path)


@pytest.mark.parametrize("path", ["/v2", "/v1/x", "/chat", "/v1/feed"])
def test_another_path_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        read(path, HOST, Origins(""))


def test_the_first_credential_present_counts() -> None:
    headers = {"auth_key": "one", "Authorization": "Bearer two"}
    assert handshake_of("/?auth_key=three", headers).auth_key == "one"
    assert handshake_of("/?auth_key=three", {"Authorization": "bearer  two "}).auth_key == "two"
    assert handshake_of("/?auth_key=three", {"Authorization": "Basic two"}).auth_key == "three"
    assert handshake_of("/?auth_key=three").auth_key == "three"
    assert handshake_of("/").auth_key is None, "it comes with the first frame"


def test_cursor_and_topics_are_taken_from_the_query() -> None:
    topics = {"scores": "1.2.abc", "müll": "x"}
    found = handshake_of(f"/?cursor=1.2.abc&topics={quote(json.dumps(topics))}")
    assert found.cursor == "1.2.abc"
    assert found.topics == topics


@pytest.mark.parametrize("topics", ["nonsense", "[]", '{"a":1}', '"x"'])
def test_topics_that_are_no_object_of_cursors_are_a_bad_request(topics: str) -> None:
    with pytest.raises(BadRequest, match="topics"):
        read(f"/?topics={quote(topics)}", HOST, Origins(""))


@pytest.mark.parametrize(
    ("origin", "origins", "allowed"),
    [
        ("http://chat.example", "", True),
        ("http://chat.example:8081", "", True),
        ("https://chat.example", "", True),
        ("http://evil.example", "", False),
        ("http://chat.example.evil.example", "", False),
        ("http://evilchat.example", "", False),
        ("null", "", False),
        ("", "", False),
        ("https://app.example", "https://app.example", True),
        ("https://app.example:444", "https://app.example", False),
        ("http://chat.example", "https://app.example", False),
        ("http://anything.example", "*", True),
        ("https://app.example", "https://app.example:443", True),
        ("https://app.example", "HTTPS://APP.Example/", True),
        ("http://app.example", "https://app.example:443", False),
        ("https://one.app.example", "https://*.app.example", True),
        ("https://one.two.app.example", "https://*.app.example", True),
        ("https://app.example", "https://*.app.example", False),
        ("https://evilapp.example", "https://*.app.example", False),
        ("http://localhost:3000", "https://app.example, http://localhost:3000", True),
        ("https://xn--mnchen-3ya.example", "https://münchen.example", True),
        ("capacitor://localhost", "capacitor://localhost", True),
        ("null", "null", True),
    ],
)
def test_origins_are_the_listed_ones_or_the_same_host_name(origin: str, origins: str, allowed: bool) -> None:
    found = Origins(origins)
    assert found.allow(origin, HOST["Host"]) is allowed
    headers = HOST | {"Origin": origin}
    if allowed:
        assert read("/?auth_key=k", headers, found).browser
    else:
        with pytest.raises(PermissionDenied):
            read("/?auth_key=k", headers, found)


@pytest.mark.parametrize(
    "setting",
    [
        "app.example",
        "https://app.example/page",
        "https://",
        "https://*",
        "https://a.*.example",
        "https://app.example:x",
    ],
)
def test_a_setting_that_can_match_no_page_is_refused(setting: str) -> None:
    with pytest.raises(ConfigurationError, match="matches no page"):
        Origins(f"https://fine.example, {setting}")


def test_more_topics_than_a_connection_may_follow_are_a_bad_request() -> None:
    topics = quote(json.dumps({f"cell:{number}": "" for number in range(MAX_TOPICS + 1)}))
    with pytest.raises(BadRequest, match="at most 1000"):
        handshake_of(f"/?topics={topics}")


def test_a_client_without_an_origin_is_not_a_browser() -> None:
    assert not handshake_of("/").browser


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="[]\\"), max_size=60))
def test_any_path_is_read_or_refused(path: str) -> None:
    with contextlib.suppress(NotFound, BadRequest):
        assert isinstance(read("/" + path, HOST, Origins("")), Handshake)


@pytest.mark.parametrize(
    ("path", "headers"),
    [("//[", HOST), ("/", HOST | {"Origin": "http://["}), ("/", {"Host": "[", "Origin": "http://chat.example"})],
)
def test_a_bracket_in_an_address_is_refused_and_not_an_error(path: str, headers: dict[str, str]) -> None:
    with pytest.raises(RequestError):
        read(path, headers, Origins(""))


@given(st.text())
def test_a_close_reason_fits_into_its_frame_and_cuts_no_character(message: str) -> None:
    reason = close_reason(message)
    assert message.startswith(reason)
    assert len(reason.encode()) <= REASON_BYTES
    assert reason == message or len((reason + message[len(reason)]).encode()) > REASON_BYTES
