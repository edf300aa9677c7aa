# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "README.md"
# Written by a script; its blocks are signatures.
NO_SNIPPETS = ROOT / "docs" / "api.md"
DOCUMENTS = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def prose(document: Path) -> str:
    """Return the text without its fenced blocks."""
    return FENCE.sub("", document.read_text())


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; "" for those that name none."""
    return [text for found, text in FENCE.findall(document.read_text()) if found == language]


def transcript(document: Path) -> list[tuple[str, str]]:
    """Return (command, output) of every example in the ``console`` blocks."""
    found = []
    for block in blocks(document, "console"):
        for example in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = example.partition("\n")
            found.append((command, output))
    return found


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings."""
    titles = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
