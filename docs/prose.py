"""Prints how the prose of README.md and docs/ reads: mean sentence length, and semicolons in 1,000 words.

    python docs/prose.py

Code, tables and headings are left out. The goals are fewer than 16 words and fewer than 3 semicolons. It informs, and
fails nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sentences(text: str) -> list[str]:
    """The sentences of a page. An item of a list ends one, as a blank line does."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||#|:::|<!--|    )", line)]
    found = []
    for paragraph in re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", "\n".join(lines)):
        plain = re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "]", paragraph))
        found += [part for part in re.split(r"(?<=[.!?:])\s+", plain) if len(part.split()) > 1]
    return found


def main() -> None:
    """Print a line for each page, and one for all of them."""
    words_of_all = sentences_of_all = semicolons_of_all = 0
    print(f"{'page':24} {'words':>6} {'mean sentence':>14} {'semicolons / 1,000 words':>26}")
    for page in PAGES:
        found = sentences(page.read_text(encoding="utf-8"))
        words = sum(len(sentence.split()) for sentence in found)
        semicolons = sum(sentence.count(";") for sentence in found)
        if words:
            print(f"{page.name:24} {words:6} {words / len(found):14.1f} {1000 * semicolons / words:26.1f}")
        words_of_all, sentences_of_all = words_of_all + words, sentences_of_all + len(found)
        semicolons_of_all += semicolons
    mean, rate = words_of_all / sentences_of_all, 1000 * semicolons_of_all / words_of_all
    print(f"{'all':24} {words_of_all:6} {mean:14.1f} {rate:26.1f}")


if __name__ == "__main__":
    main()
