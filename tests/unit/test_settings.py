"""Settings: defaults of the contract, the environment, flags."""

from typing import Any

import pytest

from tidewire.errors import ConfigurationError
from tidewire.process.settings import Settings, load


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load({})
    found = {
        "host": "127.0.0.1",
        "ws_port": 8080,
        "http_port": 8081,
        "admin_port": 8090,
        "stage": "dev",
        "partitions": 8,
        "drain_seconds": 20.0,
        "log_format": "console",
        "limit_frame_bytes": 1048576,
        "limit_item_bytes": 262144,
        "limit_queued_bytes": 1048576,
        "resume_window_s": 300.0,
        "resume_entries": 1000,
        "request_window_s": 600.0,
        "first_frame_auth_s": 5.0,
    }
    assert {name: getattr(settings, name) for name in found} == found


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"TIDEWIRE_WS_PORT": "9000", "TIDEWIRE_STAGE": "test", "TIDEWIRE_DRAIN_SECONDS": "2.5"}
    settings = load(environment, stage="prod", http_port=None)
    assert settings.ws_port == 9000
    assert settings.stage == "prod"
    assert settings.drain_seconds == 2.5
    assert settings.http_port == 8081


def test_the_environment_of_others_is_not_read() -> None:
    assert load({"WS_PORT": "1", "TIDEWIRE_NONSENSE": "x"}) == Settings()


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"TIDEWIRE_PARTITIONS": "many"}, "TIDEWIRE_PARTITIONS='many'"),
        ({"TIDEWIRE_WS_PORT": "80.5"}, "TIDEWIRE_WS_PORT"),
        ({"TIDEWIRE_DRAIN_SECONDS": ""}, "TIDEWIRE_DRAIN_SECONDS"),
    ],
)
def test_a_value_of_a_wrong_kind_names_its_variable(environment: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigurationError, match=names):
        load(environment)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"stage": "Über"}, "--stage"),
        ({"stage": ""}, "--stage"),
        ({"stage": "a:b"}, "--stage"),
        ({"partitions": 0}, "--partitions"),
        ({"partitions": 16385}, "--partitions"),
        ({"ws_port": 65536}, "--ws-port"),
        ({"http_port": -1}, "--http-port"),
        ({"log_format": "xml"}, "--log-format 'xml': console or json"),
        ({"log_level": "loud"}, "TIDEWIRE_LOG_LEVEL 'loud': debug, info, warning or error"),
        ({"lease_ms": 10}, "LEASE_MS"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        load({}, **flags)
