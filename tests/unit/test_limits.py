"""docs/limits.md names every bound that the code has."""

import re
from pathlib import Path

import msgspec
import pytest

from tidewire.process.settings import Settings

ROOT = Path(__file__).parents[2]
LIMITS = (ROOT / "docs" / "limits.md").read_text()
BOUNDED = ("_max", "_bytes", "_entries", "_window_s", "_timeout_s", "_retention_s")
"""How the names of settings end that bound something."""


def _constants() -> list[tuple[str, str]]:
    """(module, constant) of each bound: MAX_…"""
    found = []
    for folder in ("tidewire", "services"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = str(path.relative_to(ROOT / folder))
            if module.startswith(("services", "examples")):  # the same files, through symbolic links
                continue
            lines = re.findall(r"^((?:MAX_[A-Z_]+(?:, )?)+)(?:: \w+)? = ", path.read_text(), re.MULTILINE)
            found += [(module, name) for line in lines for name in line.split(", ")]
    return found


@pytest.mark.parametrize(("module", "constant"), _constants())
def test_each_bound_is_described(module: str, constant: str) -> None:
    # The same name may stand in several modules.
    rows = [row for row in LIMITS.splitlines() if f"`{constant}`" in row and f"`{module}`" in row]
    assert rows, f"add a row for `{constant}`, `{module}` to docs/limits.md"


@pytest.mark.parametrize(
    "name", [field.name for field in msgspec.structs.fields(Settings) if field.name.endswith(BOUNDED)]
)
def test_each_setting_that_bounds_something_is_described_with_its_default(name: str) -> None:
    default = getattr(Settings(), name)
    rows = [row.split("|") for row in LIMITS.splitlines() if row.startswith(f"| `TIDEWIRE_{name.upper()}`")]
    assert rows, f"add a row for `TIDEWIRE_{name.upper()}` to docs/limits.md"
    assert f"{default:,g}" in rows[0][2] or f"{default:,.0f}" in rows[0][2], f"its default is {default:,}"


def test_each_constant_that_is_described_exists() -> None:
    for row in LIMITS.splitlines():
        *constants, module = re.findall(r"`([^`]+)`", row.split("|")[1]) if row.startswith("| `") else [""]
        if not module.endswith(".py"):
            continue
        text = "".join(
            path.read_text() for path in (ROOT / "tidewire" / module, ROOT / "services" / module) if path.exists()
        )
        for constant in constants:
            assert re.search(rf"\b{constant}\b.* = ", text) or constant.islower(), f"{constant} is not in {module}"


def test_each_row_says_what_happens_and_what_to_do() -> None:
    rows = [row for row in LIMITS.splitlines() if row.startswith("| `")]
    assert len(rows) > 50
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row
