"""The `tidewire` command.

Data goes to standard output, the rest to standard error. Exit codes: 0, 1 failed, 2 usage.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from functools import partial
from typing import Annotated, Any

import typer

from tidewire import __version__
from tidewire.errors import ConfigurationError, TidewireError, Unreachable
from tidewire.process.settings import drop_service_links
from tidewire.tasks import leaf

from ..wiring import WIRING, Wiring
from . import output
from .data_commands import changes, export, import_
from .options import (
    DATA,
    HTTP_URL,
    MISCONFIGURED,
    SUPERVISED,
    AdminPortOption,
    AppArgument,
    DataOption,
    DrainSecondsOption,
    DurabilityOption,
    HostOption,
    HttpPortOption,
    ItemKeyArgument,
    JsonOption,
    KeyOption,
    LogFormatOption,
    OriginsOption,
    PartitionsOption,
    PathPrefixOption,
    RedisOption,
    ServiceRedisOption,
    StageOption,
    TableArgument,
    TlsCertOption,
    TlsKeyOption,
    TrustedProxiesOption,
    UrlOption,
    WsPortOption,
    option,
)
from .reach import with_redis

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Write an item; everyone entitled to see it sees the change.",
)
keys = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(keys, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidewire {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Write an item; everyone entitled to see it sees the change."""


def main() -> None:
    """Run the command. No traceback reaches a user."""
    for name in drop_service_links(os.environ):
        typer.echo(f"tidewire: {name} is ignored: Kubernetes set it for a Service, it is no setting", err=True)
    try:
        app()
    except Unreachable as error:
        fail(str(error))
    except ConfigurationError as error:
        fail(str(error), MISCONFIGURED if SUPERVISED in os.environ else 1)
    except TidewireError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone
        sys.exit(1)
    except Exception as error:
        if os.environ.get("TIDEWIRE_LOG_LEVEL") == "debug":
            raise
        cause = leaf(error)
        fail(f"this should not have happened: {type(cause).__name__}: {cause} (TIDEWIRE_LOG_LEVEL=debug tells where)")


def fail(message: str, code: int = 1) -> None:
    """Print one sentence to standard error, and end the process."""
    typer.echo(f"tidewire: {message}", err=True)
    sys.exit(code)


@app.command()
def up(
    reference: Annotated[
        str, typer.Argument(metavar="[APP]", help="The application: module:attribute.", show_default="the chat example")
    ] = "tidewire.examples.chat.app:app",
    data: DataOption = DATA,
    redis: Annotated[str | None, option("--redis", "Use this server.", shown="an embedded one")] = None,
    gateways: Annotated[int, option("--gateways", "Processes of the gateway.")] = 1,
    authorizers: Annotated[int, option("--authorizers", "Processes of the authorizer.")] = 1,
    broadcasters: Annotated[int, option("--broadcasters", "Processes of the broadcaster.")] = 1,
    stores: Annotated[int, option("--stores", "Processes of the store.")] = 1,
    stage: StageOption = None,
    partitions: PartitionsOption = None,
    host: HostOption = None,
    ws_port: WsPortOption = None,
    http_port: HttpPortOption = None,
    admin_port: AdminPortOption = None,
    origins: OriginsOption = None,
    trusted_proxies: TrustedProxiesOption = None,
    path_prefix: PathPrefixOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    durability: DurabilityOption = None,
    drain_seconds: DrainSecondsOption = None,
    log_format: LogFormatOption = None,
) -> None:
    """Run everything on this machine, until Ctrl-C."""
    from .up import up as run_up

    counts = {"gateway": gateways, "authorizer": authorizers, "broadcaster": broadcasters, "store": stores}
    run_up(
        reference,
        data,
        counts,
        redis=redis,
        stage=stage,
        partitions=partitions,
        host=host,
        ws_port=ws_port,
        http_port=http_port,
        admin_port=admin_port,
        origins=origins,
        trusted_proxies=trusted_proxies,
        path_prefix=path_prefix,
        tls_cert=tls_cert,
        tls_key=tls_key,
        durability=durability,
        drain_seconds=drain_seconds,
        log_format=log_format,
    )


EDGE_OPTIONS = {
    "origins": OriginsOption,
    "trusted_proxies": TrustedProxiesOption,
    "path_prefix": PathPrefixOption,
    "tls_cert": TlsCertOption,
    "tls_key": TlsKeyOption,
}
"""Options of a service that listens, beside its ports."""


def _options_of(wiring: Wiring) -> dict[str, Any]:
    """Return the options of a service's command: none that the service would ignore."""
    return {
        "stage": StageOption,
        "partitions": PartitionsOption,
        **({"host": HostOption, "ws_port": WsPortOption, "http_port": HttpPortOption} if wiring.listens else {}),
        "admin_port": AdminPortOption,
        **(EDGE_OPTIONS if wiring.listens else {"host": HostOption}),
        **({"durability": DurabilityOption} if wiring.writes else {}),
        "drain_seconds": DrainSecondsOption,
        "log_format": LogFormatOption,
    }


def _add_service(wiring: Wiring) -> None:
    def command(reference: str, redis: str, **flags: Any) -> None:
        from .service import run

        run(wiring.kind, reference, redis=redis, **flags)

    # Typer reads the options from the signature.
    parameter = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    parameters = [
        parameter("reference", annotation=AppArgument),
        parameter("redis", annotation=ServiceRedisOption),
        *(parameter(name, annotation=kind, default=None) for name, kind in _options_of(wiring).items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {declared.name: declared.annotation for declared in parameters}
    app.command(wiring.kind, help=wiring.help)(command)


for _wiring in WIRING.values():
    _add_service(_wiring)


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@keys.command("create")
def keys_create(
    user: Annotated[str, option("--user", "The user that the key stands for.")],
    role: Annotated[str, option("--role", "client, or service, which may read and write everything.")] = "client",
    claim: Annotated[list[str] | None, option("--claim", "A claim; may be repeated.", metavar="K=V")] = None,
    ttl: Annotated[
        str | None, option("--ttl", "How long the key is valid: 90s, 15m, 12h, 30d.", shown="forever")
    ] = None,
    redis: RedisOption = None,
    data: DataOption = DATA,
    stage: StageOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key. It is shown this once."""
    from tidewire.redis import keyring

    if role not in ("client", "service"):
        raise typer.BadParameter("client or service", param_hint="--role")
    if not user or len(user) > 256:
        raise typer.BadParameter("1 to 256 characters", param_hint="--user")
    claims = dict(_claim(one) for one in claim or [])
    ttl_s = None if ttl is None else duration_s(ttl)

    async def create(backend: Any) -> dict[str, str]:
        key = await keyring.create(backend, user, role=role, claims=claims, ttl_s=ttl_s)
        return {"id": key.id, "auth_key": str(key)}

    output.show(with_redis(redis, data, stage, create, may_be_new=True), as_json=as_json)


@keys.command("list")
def keys_list(
    redis: RedisOption = None, data: DataOption = DATA, stage: StageOption = None, as_json: JsonOption = False
) -> None:
    """List all keys, without their secrets."""
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.table import Table

    from tidewire.redis import keyring

    found = with_redis(redis, data, stage, keyring.listing, may_be_new=True)
    if as_json:
        output.show(found, as_json=True)
        return

    def when(ms: int | None) -> str:
        return "" if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")

    table = Table("id", "user", "role", "claims", "created", "expires", "revoked", box=None)
    for key in found:
        times = (when(key[name]) for name in ("created_at", "expires_at", "revoked_at"))
        table.add_row(key["id"], key["user"], key["role"], json.dumps(key["claims"]), *times)
    Console().print(table)


@keys.command("revoke")
def keys_revoke(
    id_: Annotated[str, typer.Argument(metavar="ID")],
    redis: RedisOption = None,
    data: DataOption = DATA,
    stage: StageOption = None,
) -> None:
    """Revoke a key, and close its connections."""
    from tidewire.redis import keyring

    async def revoke(backend: Any) -> bool:
        return await keyring.revoke(backend, id_)

    if not with_redis(redis, data, stage, revoke, may_be_new=True):
        fail(f"there is no key {id_!r}: `tidewire keys list` shows them all")


def _claim(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not name or not found:
        raise typer.BadParameter(f"{text!r} is not K=V", param_hint="--claim")
    return name, value


def duration_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is none of 90s, 15m, 12h, 30d", param_hint="--ttl")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


# ── through a gateway ───────────────────────────────────────────────────────────────────────────────────────────────


@app.command()
def put(
    table: TableArgument,
    item: Annotated[str, typer.Argument(metavar="ITEM", help="A JSON object.")],
    key: KeyOption,
    url: UrlOption = HTTP_URL,
    as_json: JsonOption = False,
) -> None:
    """Write an item."""
    _act(url, key, as_json, "put", table=table, item=_parsed(item, "ITEM"))


@app.command()
def get(
    table: TableArgument,
    item_key: ItemKeyArgument,
    key: KeyOption,
    url: UrlOption = HTTP_URL,
    as_json: JsonOption = False,
) -> None:
    """Read an item."""
    _act(url, key, as_json, "get", table=table, key=_parsed(item_key, "KEY"))


@app.command()
def delete(
    table: TableArgument,
    item_key: ItemKeyArgument,
    key: KeyOption,
    url: UrlOption = HTTP_URL,
    as_json: JsonOption = False,
) -> None:
    """Remove an item."""
    _act(url, key, as_json, "delete", table=table, key=_parsed(item_key, "KEY"))


@app.command()
def query(
    table: TableArgument,
    partition_key: Annotated[str, typer.Argument(metavar="KEY", help="JSON: the partition key.")],
    key: KeyOption,
    url: UrlOption = HTTP_URL,
    index: Annotated[
        str | None, option("--index", "An index of the table; KEY is then its partition attribute.")
    ] = None,
    after: Annotated[str | None, option("--after", "JSON: only sort keys greater than this, as in `next`.")] = None,
    before: Annotated[str | None, option("--before", "JSON: only sort keys less than this.")] = None,
    prefix: Annotated[str | None, option("--prefix", "Only sort keys that begin with this.")] = None,
    limit: Annotated[int, option("--limit", "Maximum number of items.")] = 100,
    reverse: Annotated[bool, option("--reverse", "The last items first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read the items of a partition key, or of an index, in order."""
    given = {
        "index": index,
        "after": None if after is None else _parsed(after, "--after"),
        "before": None if before is None else _parsed(before, "--before"),
        "prefix": prefix,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    key_value = _parsed(partition_key, "KEY")
    _act(url, key, as_json, "query", table=table, key=key_value, limit=limit, reverse=reverse, **fields)


@app.command()
def send(
    connection: Annotated[str, typer.Argument(metavar="CONNECTION", help="The id of a connection.")],
    body: Annotated[str, typer.Argument(metavar="BODY", help="JSON: the message.")],
    key: KeyOption,
    url: UrlOption = HTTP_URL,
    as_json: JsonOption = False,
) -> None:
    """Send a message to one open connection. Needs a service key."""
    _act(url, key, as_json, "send", connection=connection, body=_parsed(body, "BODY"))


@app.command()
def kick(
    users: Annotated[list[str], typer.Argument(metavar="USER", help="The users.")],
    key: KeyOption,
    url: UrlOption = HTTP_URL,
    as_json: JsonOption = False,
) -> None:
    """Close all connections of users, on every gateway. Needs a service key."""
    _act(url, key, as_json, "disconnect", users=users)


@app.command()
def listen(
    key: KeyOption,
    url: Annotated[str, typer.Option("--url", envvar="TIDEWIRE_WS_URL", help="Websocket address of a gateway.")] = (
        "ws://127.0.0.1:8080"
    ),
    as_json: JsonOption = False,
) -> None:
    """Print every frame of the user's feed, one JSON object per line. Reconnects and resumes by itself."""
    import asyncio

    from tidewire.client import Client
    from tidewire.tasks import run

    if not url.startswith(("ws://", "wss://")):
        raise typer.BadParameter("an address like ws://127.0.0.1:8080 is needed", param_hint="--url")

    client = Client(url, key)

    async def follow() -> None:
        async with client:
            typer.echo(f"listening as {client.user}", err=True)
            async for event in client.events():
                output.show(event, as_json=as_json, indent=None)

    async def tell_problems() -> None:
        shown = None
        while True:
            await asyncio.sleep(1)
            if client.problem != shown:
                shown = client.problem
                typer.echo(f"waiting for {url}: {shown}" if shown else f"connected to {url} again", err=True)

    async def work() -> None:
        telling = asyncio.create_task(tell_problems())
        try:
            await follow()
        finally:
            telling.cancel()

    run(work())


@app.command()
def status(
    redis: RedisOption = None, data: DataOption = DATA, stage: StageOption = None, as_json: JsonOption = False
) -> None:
    """Show services, connections, and who owns which partition."""
    from .status import collect, show

    found = with_redis(redis, data, stage, collect)
    if as_json:
        output.show(found, as_json=True)
    else:
        show(found)


app.command()(changes)
app.command()(export)
app.command("import")(import_)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not JSON (a string needs its quotes)", param_hint=what) from None


def _act(url: str, auth_key: str, as_json: bool, action: str, /, **body: Any) -> None:
    """Send an action to a gateway over HTTP, and print its result."""
    import urllib.error
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter("an address like http://127.0.0.1:8081 is needed", param_hint="--url")
    try:
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v1/{action}",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {auth_key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            output.show(json.loads(response.read()), as_json=as_json)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            frame = json.loads(text)
            fail(f"{frame['code']}: {frame['message']}")
        except (ValueError, KeyError, TypeError):
            fail(f"{url} answered {error.code}: is it a gateway's HTTP port?")
    except (OSError, ValueError) as error:
        fail(f"no gateway answers at {url}: {getattr(error, 'reason', error)}")


if __name__ == "__main__":
    main()
