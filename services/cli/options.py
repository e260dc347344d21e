"""The options that several commands share.

Each can also be set as an environment variable `TIDEWIRE_<OPTION>`. A flag wins over the variable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def option(name: str, help_: str, *, shown: str | None = None, metavar: str | None = None) -> object:
    """Declare an option with its environment variable. `shown` describes the default where the value does not."""
    variable = "TIDEWIRE_" + name.lstrip("-").replace("-", "_").upper()
    show_default = shown if shown is not None else True
    return typer.Option(name, envvar=variable, help=help_, show_default=show_default, metavar=metavar)


AppArgument = Annotated[str, typer.Argument(metavar="APP", help="The application: module:attribute.")]
TableArgument = Annotated[str, typer.Argument(metavar="TABLE", help="The table.")]
ItemKeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="JSON: an object of the key attributes.")]
_ADDRESS = "Address: redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://."
RedisOption = Annotated[str | None, option("--redis", _ADDRESS, shown="the running `up` of --data")]
ServiceRedisOption = Annotated[str, option("--redis", _ADDRESS)]
DataOption = Annotated[Path, option("--data", "Folder of `tidewire up`: its server's data, and how to reach it.")]
StageOption = Annotated[str | None, option("--stage", "Namespace: the prefix of every key.", shown="dev")]
PartitionsOption = Annotated[
    int | None, option("--partitions", "Number of partitions, when the stage is created.", shown="8")
]
HostOption = Annotated[str | None, option("--host", "Address to listen on.", shown="127.0.0.1")]
WsPortOption = Annotated[int | None, option("--ws-port", "Port of the websockets.", shown="8080")]
HttpPortOption = Annotated[int | None, option("--http-port", "Port of HTTP.", shown="8081")]
AdminPortOption = Annotated[int | None, option("--admin-port", "Port of probes and metrics.", shown="8090")]
OriginsOption = Annotated[
    str | None, option("--origins", "Origins whose pages may connect, with commas.", shown="the same host, any port")
]
TrustedProxiesOption = Annotated[
    str | None,
    option(
        "--trusted-proxies", "Proxies whose X-Forwarded-For counts: addresses and networks, with commas.", shown="none"
    ),
]
PathPrefixOption = Annotated[
    str | None, option("--path-prefix", "Path under which everything is served, such as /live.", shown="none")
]
TlsCertOption = Annotated[
    str | None, option("--tls-cert", "Certificate chain of both ports, as a PEM file.", shown="no TLS")
]
TlsKeyOption = Annotated[str | None, option("--tls-key", "Key of --tls-cert, as a PEM file.", shown="no TLS")]
DurabilityOption = Annotated[
    str | None,
    option("--durability", "When a write is answered: memory, fsync (on disk) or replicated.", shown="memory"),
]
DrainSecondsOption = Annotated[float | None, option("--drain-seconds", "Most seconds that a drain takes.", shown="20")]
LogFormatOption = Annotated[str | None, option("--log-format", "console or json.", shown="console")]
UrlOption = Annotated[str, option("--url", "HTTP address of a gateway.")]
KeyOption = Annotated[str, option("--key", "The auth_key to act with.")]
JsonOption = Annotated[
    bool, option("--json", "Print JSON for programs: one compact line for each result, never coloured.")
]
JsonReportOption = Annotated[bool, option("--json", "Report the end as JSON, without a progress bar.")]
HTTP_URL = "http://127.0.0.1:8081"
"""Default of --url."""
DATA = Path(".tidewire")
"""Default of --data."""

ADMIN_SOCKET = "TIDEWIRE_ADMIN_SOCKET"
"""Environment variable: descriptor of the bound admin socket that `up` hands to a service."""
SUPERVISED = "TIDEWIRE_SUPERVISED"
"""Environment variable: set by `up` in its services. A configuration error then ends them with `MISCONFIGURED`."""
MISCONFIGURED = 78
"""Exit code of a supervised service that a restart cannot repair (EX_CONFIG of sysexits.h)."""
