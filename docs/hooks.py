"""Brings README.md and ARCHITECTURE.md, which stay at the top of the repository, into the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "architecture.md": "ARCHITECTURE.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, with links as they are inside docs/."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](").replace("](ARCHITECTURE.md", "](architecture.md")
        # Folders and files outside of docs/ are not part of the site: keep the text of such links.
        text = re.sub(r"\[([^]]+)\]\((?:examples|CONTRIBUTING\.md)[^)]*\)", r"\1", text)
        files.append(File.generated(config, name, content=text))
    return files
