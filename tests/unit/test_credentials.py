"""API keys: their form, their hash at rest, and the refusals."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidewire.errors import Unauthenticated
from tidewire.model.credentials import ApiKey, verify
from tidewire.model.records import Credential

NOW = 1_795_409_459_002


def stored(key: ApiKey, expires_at: int | None = None, revoked_at: int | None = None) -> Credential:
    return Credential(key.digest, "alice", "client", {"tenant": "t1"}, NOW - 1000, expires_at, revoked_at)


def test_a_key_has_the_form_of_the_contract_and_192_random_bits() -> None:
    key = ApiKey.new()
    prefix, id_, secret = str(key).split("_")
    assert (prefix, id_, secret) == ("tw", key.id, key.secret)
    assert len(bytes.fromhex(secret)) == 24
    assert len({str(ApiKey.new()) for _ in range(100)}) == 100


def test_a_key_is_parsed_back() -> None:
    key = ApiKey.new()
    assert ApiKey.parse(str(key)) == key


@given(st.text(max_size=300))
def test_any_text_is_a_key_or_none(text: str) -> None:
    key = ApiKey.parse(text)
    assert key is None or str(key) == text


@pytest.mark.parametrize("text", ["", "tw", "tw__", "tw_a_", "tw__b", "tw_a_b_c", "xx_a_b", "tw_a_é", "tw_a_b "])
def test_a_malformed_value_is_none(text: str) -> None:
    assert ApiKey.parse(text) is None


def test_at_rest_there_is_the_sha256_of_the_secret() -> None:
    key = ApiKey.new()
    assert key.digest == hashlib.sha256(key.secret.encode()).digest()
    assert key.secret.encode() not in b"".join(field for field in stored(key) if isinstance(field, bytes))


def test_the_answer_carries_user_role_and_claims() -> None:
    key = ApiKey.new()
    principal = verify(key, stored(key, expires_at=NOW + 1), NOW)
    assert principal == ("alice", "client", {"tenant": "t1"}, key.id, NOW + 1)


def test_a_wrong_secret_and_an_unknown_id_have_the_same_answer() -> None:
    key = ApiKey.new()
    messages = set()
    for credential in (None, stored(ApiKey.new())):
        with pytest.raises(Unauthenticated) as refused:
            verify(key, credential, NOW)
        messages.add(str(refused.value))
    assert len(messages) == 1


def test_an_unknown_id_is_not_opened_by_the_empty_hash() -> None:
    with pytest.raises(Unauthenticated):
        verify(ApiKey("a", ""), None, NOW)


@pytest.mark.parametrize(("expires_at", "revoked_at"), [(NOW, None), (NOW - 1, None), (None, NOW - 1), (NOW + 9, NOW)])
def test_an_expired_or_revoked_key_is_refused(expires_at: int | None, revoked_at: int | None) -> None:
    key = ApiKey.new()
    with pytest.raises(Unauthenticated):
        verify(key, stored(key, expires_at, revoked_at), NOW)
