"""Errors of the wire."""

import re

import pytest

from tidewire.errors import BY_CODE, Conflict, Internal, RequestError, from_wire, told

CODES = {
    "bad_request": (False, 400),
    "unauthenticated": (False, 401),
    "forbidden": (False, 403),
    "not_found": (False, 404),
    "conflict": (False, 409),
    "unsupported_action": (False, 400),
    "too_large": (False, 413),
    "rate_limited": (True, 429),
    "overloaded": (True, 503),
    "timeout": (True, 504),
    "internal": (True, 500),
}


def test_the_codes_are_those_of_the_contract() -> None:
    assert {code: (kind.retry, kind.status) for code, kind in BY_CODE.items()} == CODES


@pytest.mark.parametrize("code", CODES)
def test_an_error_goes_over_the_wire_and_back(code: str) -> None:
    frame = BY_CODE[code]("because", n=1).as_frame(7)
    assert frame == {
        "type": "error",
        "id": 7,
        "code": code,
        "message": "because",
        "retry": CODES[code][0],
        "details": {"n": 1},
    }
    again = from_wire(frame)
    assert type(again) is BY_CODE[code]
    assert again.as_frame(7) == frame


def test_a_code_of_a_later_version_is_still_an_error() -> None:
    assert isinstance(from_wire({"code": "moon_phase", "message": "x"}), Internal)
    assert isinstance(from_wire({}), RequestError)


def test_details_may_be_missing() -> None:
    error = from_wire({"code": "conflict", "message": "x", "details": None})
    assert isinstance(error, Conflict)
    assert error.details == {}


def test_an_error_of_an_application_is_told_with_its_place() -> None:
    def rule() -> None:
        raise KeyError("owner")

    with pytest.raises(KeyError) as raised:
        rule()
    assert re.fullmatch(r"KeyError\('owner'\), .*test_errors\.py:\d+", told(raised.value))
    assert told(ValueError("never raised")) == "ValueError('never raised')"
