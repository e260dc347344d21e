"""TLS on both ports, and certificates that are renewed while the gateway runs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import websockets
from structlog.testing import capture_logs

from tidewire.errors import ConfigurationError
from tidewire.process.tls import Certificate, certificate

from .conftest import Open, another_gateway, make_app

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A function that makes a certificate of 127.0.0.1, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")

    def made(name: str) -> Made:
        chain, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
        return chain, key

    return made


async def name_of(port: int) -> str:
    """Return the common name in the certificate that a port presents."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    raw = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    text: str = subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-noout", "-subject"], input=raw, check=True, capture_output=True
    ).stdout.decode()
    return text.rpartition("=")[2].strip()


async def test_both_ports_speak_tls_and_load_a_renewed_certificate(
    open_stage: Open, stack: AsyncExitStack, make: Callable[[str], Made], tmp_path: Path
) -> None:
    chain, key = (tmp_path / path.name for path in make("first"))
    for path, to in zip(make("first"), (chain, key), strict=True):
        shutil.copy(path, to)
    settings = {"tls_cert": str(chain), "tls_key": str(key)}
    async with (
        open_stage(make_app()) as stage,
        another_gateway(stage, drain_seconds=0.1, **settings) as (gateway, there),
    ):
        trusted = ssl.create_default_context(cafile=str(chain))
        auth_key = await stage.key("alice")
        ws_port, http_port = (int(url.rpartition(":")[2]) for url in (there.url, there.http_url))
        address = f"wss://127.0.0.1:{ws_port}/"
        headers = {"auth_key": auth_key}
        async with websockets.connect(address, ssl=trusted, additional_headers=headers, proxy=None) as ws:
            assert json.loads(await ws.recv())["type"] == "welcome"
            item = {"id": "s", "text": "x" * 100_000}
            await ws.send(json.dumps({"id": 1, "action": "put", "table": "scores", "item": item}))
            while json.loads(await ws.recv())["type"] != "reply":
                pass

            request = urllib.request.Request(f"https://127.0.0.1:{http_port}/v1/whoami", b"{}", headers, method="POST")
            with await asyncio.to_thread(urllib.request.urlopen, request, timeout=15, context=trusted) as response:
                assert json.loads(response.read())["user"] == "alice"
            with pytest.raises((websockets.exceptions.InvalidMessage, OSError)):
                await websockets.connect(there.url, additional_headers=headers, proxy=None, open_timeout=5)

            assert gateway.certificate
            second = make("second")
            shutil.copy(second[0], chain)  # half of the new pair: it does not fit the old key
            with capture_logs() as logs:
                gateway.certificate.reload()
            assert [entry["event"] for entry in logs] == ["certificate_not_loaded"]
            assert await name_of(ws_port) == "first"
            shutil.copy(second[1], key)
            gateway.certificate.reload()
            assert [await name_of(port) for port in (ws_port, http_port)] == ["second", "second"]
            await ws.send(json.dumps({"id": 2, "action": "ping"}))
            while json.loads(await ws.recv()).get("id") != 2:
                pass  # the open connection goes on
        assert ws.close_code == 1000


def test_a_link_that_points_to_other_files_is_a_change(make: Callable[[str], Made], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for path, to in zip(make(name), ("tls.crt", "tls.key"), strict=True):
            shutil.copy2(path, tmp_path / name / to)
    (tmp_path / "data").symlink_to("one")
    found = Certificate(str(tmp_path / "data/tls.crt"), str(tmp_path / "data/tls.key"))
    before = found._state
    found.reload()
    assert found._state == before
    (tmp_path / "new").symlink_to("two")
    os.replace(tmp_path / "new", tmp_path / "data")  # as Kubernetes does with a mounted secret
    found.reload()
    assert found._state != before


def test_wrong_files_are_a_configuration_error(make: Callable[[str], Made], tmp_path: Path) -> None:
    chain, key = make("chain")
    other = make("other")[1]
    (tmp_path / "text.pem").write_text("no certificate")
    for wrong in (
        (str(tmp_path / "none.pem"), str(key)),
        (str(tmp_path / "text.pem"), str(key)),
        (str(chain), str(other)),
    ):
        with pytest.raises(ConfigurationError, match="PEM files"):
            certificate(*wrong)
    with pytest.raises(ConfigurationError, match="--tls-cert needs --tls-key"):
        certificate(str(chain), "")
    with pytest.raises(ConfigurationError, match="--tls-key needs --tls-cert"):
        certificate("", str(key))
    assert certificate("", "") is None
