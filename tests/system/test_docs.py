"""The documentation: its quickstart as written, and the paths that it names."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tidewire.testing
from tidewire import App, nobody, user
from tidewire.errors import PermissionDenied

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "applications.md").read_text()
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text()
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


def write_files(folder: Path) -> None:
    """Save each file of the quickstart."""
    files = re.findall(r"<!-- file: (\S+) -->\n```python\n(.*?)```", QUICKSTART, re.DOTALL)
    assert [name for name, _ in files] == ["notes.py", "reader.py", "writer.py", "test_notes.py"]
    for name, text in files:
        (folder / name).write_text(text)


def test_the_application_of_the_readme_is_that_of_the_quickstart(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert (tmp_path / "notes.py").read_text() in (ROOT / "README.md").read_text()


def test_the_quickstarts_test_passes(tmp_path: Path) -> None:
    write_files(tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "test_notes.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_of_the_guide_pass(tmp_path: Path) -> None:
    declarations = re.search(r"## Tables\n\n```python\n(.*?)```", GUIDE, re.DOTALL)
    tests = re.findall(r"<!-- tests -->\n```python\n(.*?)```", GUIDE, re.DOTALL)
    assert declarations
    assert len(tests) == 2
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "backend.py").write_text(declarations[1])
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nasyncio_mode = "auto"\n')
    (tmp_path / "test_shop.py").write_text("".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def rules(name: str) -> App:
    """The application that one example of the guide declares."""
    found = re.search(rf"<!-- rules: {name} -->\n```python\n(.*?)```", GUIDE, re.DOTALL)
    assert found
    app = App("rules")
    exec(found[1], {"app": app, "user": user, "nobody": nobody})
    return app


async def test_only_owners_delete_as_the_guide_says() -> None:
    async with tidewire.testing.run(rules("owners_delete")) as stage:
        alice, bob, eve = [await stage.client(name) for name in ("alice", "bob", "eve")]
        for client, name in ((alice, "alice"), (bob, "bob")):
            await client.put("members", {"team": "t", "user": name})
        ticket = {"team": "t", "id": "1", "owner": "alice"}
        await bob.put("tickets", ticket)
        await bob.update("tickets", {"team": "t", "id": "1"}, set={"title": "leak"})
        with pytest.raises(PermissionDenied):
            await bob.delete("tickets", {"team": "t", "id": "1"})
        with pytest.raises(PermissionDenied):
            await eve.put("tickets", ticket | {"id": "2"})
        await alice.delete("tickets", {"team": "t", "id": "1"})


async def test_the_first_member_leads_as_the_guide_says() -> None:
    async with tidewire.testing.run(rules("first_or_lead")) as stage:
        alice, eve = await stage.client("alice"), await stage.client("eve")
        with pytest.raises(PermissionDenied):
            await alice.put("members", {"team": "t", "user": "alice"})
        with pytest.raises(PermissionDenied):
            await eve.put("members", {"team": "t", "user": "alice", "role": "lead"})
        await alice.put("members", {"team": "t", "user": "alice", "role": "lead"})
        with pytest.raises(PermissionDenied):
            await eve.put("members", {"team": "t", "user": "eve", "role": "lead"})
        await alice.put("members", {"team": "t", "user": "eve"})


@pytest.mark.real
async def test_the_quickstarts_clients_print_what_it_says(new_up: Any, tmp_path: Path) -> None:
    write_files(tmp_path)
    up = new_up("notes:app", PYTHONPATH=str(tmp_path))
    keys = up.keys()
    environment = os.environ | {"ALICE": keys["alice"], "BOB": keys["bob"], "PYTHONUNBUFFERED": "1"}
    for name in ("reader.py", "writer.py"):
        text = (tmp_path / name).read_text()
        assert "ws://127.0.0.1:8080" in text
        (tmp_path / name).write_text(text.replace("ws://127.0.0.1:8080", up.url))

    expected = re.search(r"The reader prints:\n\n```\n(.*?)```", QUICKSTART, re.DOTALL)
    assert expected
    reader = await asyncio.create_subprocess_exec(
        sys.executable, "reader.py", cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    )
    assert reader.stdout
    try:
        printed = [(await asyncio.wait_for(reader.stdout.readline(), 60)).decode() for _ in range(2)]
        writer = await asyncio.create_subprocess_exec(sys.executable, "writer.py", cwd=tmp_path, env=environment)
        assert await asyncio.wait_for(writer.wait(), 60) == 0
        printed += [(await asyncio.wait_for(reader.stdout.readline(), 60)).decode() for _ in range(2)]
    finally:
        reader.terminate()
        await reader.wait()
    assert "".join(printed) == expected[1]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:tidewire|services|tests|examples|docs|deploy|benchmarks)/[\w./]*[\w/])`", text)
    paths += re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    here = (ROOT / page).parent
    missing = [path for path in paths if not (ROOT / path).exists() and not (here / path).exists()]
    # Pages that the site makes of files at the top of the repository.
    assert [path for path in missing if path not in ("index.md", "architecture.md")] == []
