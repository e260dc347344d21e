"""Settings: defaults, then environment variables `TIDEWIRE_<NAME>`, then flags. Units are in the names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import msgspec

from tidewire.errors import ConfigurationError

_LEAST = {
    "lease_ms": 300,
    "replicas": 1,
    "resume_window_s": 1,
    "resume_entries": 1,
    "resume_bytes": 1,
    "changes_retention_s": 0,
    "changes_max": 0,
    "changes_bytes": 0,
    "command_rounds": 0,
    "command_facts": 0,
    "command_evaluations": 0,
    "command_bytes": 0,
    "command_ms": 0,
    "commands_max": 1,
    "welcome_timeout_s": 0.1,
    "commands_bytes": 1,
    "limit_answer_bytes": 0,
    "limit_connections": 0,
    "limit_requests_per_s": 0,
    "limit_handshakes_per_s": 0,
    "limit_unauthenticated": 0,
    "limit_address_connections": 0,
    "limit_work_ms_per_s": 0,
    "max_connection_s": 0,
}

_ONE_OF = {
    "log_format": ("--log-format", "console", "json"),
    "log_level": ("TIDEWIRE_LOG_LEVEL", "debug", "info", "warning", "error"),
    "durability": ("--durability", "memory", "fsync", "replicated"),
}


_PATTERNS = {
    "stage": (r"[a-z0-9][a-z0-9_-]{0,31}", "up to 32 lower-case letters, digits, _ and -"),
    "path_prefix": (r"(/[\w.~-]+)*", "write a path like /live, without a / at its end"),
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a process."""

    redis: str = "redis://127.0.0.1:6379"
    stage: str = "dev"
    partitions: int = 8
    host: str = "127.0.0.1"
    ws_port: int = 8080
    http_port: int = 8081
    admin_port: int = 8090
    origins: str = ""
    trusted_proxies: str = ""
    path_prefix: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    drain_seconds: float = 20.0
    log_format: str = "console"
    log_level: str = "info"

    durability: str = "memory"
    replicas: int = 1
    durable_timeout_s: float = 3.0

    changes_retention_s: float = 86400.0
    changes_max: int = 1_000_000
    changes_bytes: int = 67108864
    commands_max: int = 10_000
    command_rounds: int = 32
    command_facts: int = 20_000
    command_evaluations: int = 50_000
    command_bytes: int = 33554432
    command_ms: int = 1000
    commands_bytes: int = 67_108_864

    lease_ms: int = 3000
    batch: int = 256
    request_timeout_s: float = 10.0
    request_window_s: float = 600.0
    resume_window_s: float = 300.0
    resume_entries: int = 1000
    resume_bytes: int = 4194304
    auth_cache_s: float = 5.0
    first_frame_auth_s: float = 5.0
    max_connection_s: float = 0.0
    welcome_timeout_s: float = 10.0
    limit_frame_bytes: int = 1048576
    limit_item_bytes: int = 262144
    limit_queued_bytes: int = 1048576
    limit_answer_bytes: int = 4194304
    limit_connections: int = 20
    limit_requests_per_s: int = 100
    limit_handshakes_per_s: int = 0
    limit_unauthenticated: int = 2000
    limit_address_connections: int = 0
    limit_work_ms_per_s: int = 250

    def __post_init__(self) -> None:
        for name, (pattern, right) in _PATTERNS.items():
            if not re.fullmatch(pattern, getattr(self, name), re.ASCII):
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(self, name)!r}: {right}")
        if not 1 <= self.partitions <= 16384:
            raise ConfigurationError(f"--partitions {self.partitions}: between 1 and 16384")
        for name in ("ws_port", "http_port", "admin_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(self, name)}: between 0 and 65535")
        for name, (shown, *allowed, last) in _ONE_OF.items():
            if (given := getattr(self, name)) not in (*allowed, last):
                raise ConfigurationError(f"{shown} {given!r}: {', '.join(allowed)} or {last}")
        if not 0 < self.durable_timeout_s <= 4:  # shorter than the time-out of the socket
            raise ConfigurationError(f"TIDEWIRE_DURABLE_TIMEOUT_S={self.durable_timeout_s}: above 0, at most 4")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigurationError(f"TIDEWIRE_{name.upper()}={getattr(self, name)}: at least {least}")
        # a batch must hold a whole transaction, which may also remove 100 expired items
        if not 256 <= self.batch <= 2000:
            raise ConfigurationError(f"TIDEWIRE_BATCH={self.batch}: between 256 and 2000")


def drop_service_links(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that Kubernetes sets for a Service, and return their names.

    A Service called `tidewire-ws` gives every pod of its namespace TIDEWIRE_WS_PORT=tcp://10.0.0.7:8080, which is also
    the name of a setting.
    """
    links = [
        name
        for name, value in environment.items()
        if name.startswith("TIDEWIRE_") and re.match(r"(tcp|udp|sctp)://", value)
    ]
    for name in links:
        del environment[name]
    return links


def load(environment: Mapping[str, str] | None = None, **flags: Any) -> Settings:
    """Load the settings. Flags that are None count as not given. Raises ConfigurationError that names the variable."""
    environment = os.environ if environment is None else environment
    given: dict[str, Any] = {}
    for field in msgspec.structs.fields(Settings):
        variable = f"TIDEWIRE_{field.name.upper()}"
        if flags.get(field.name) is not None:
            given[field.name] = flags[field.name]
        elif variable in environment:
            try:
                given[field.name] = msgspec.convert(environment[variable], field.type, strict=False)
            except msgspec.ValidationError as error:
                raise ConfigurationError(f"{variable}={environment[variable]!r}: {error}") from None
    return Settings(**given)
