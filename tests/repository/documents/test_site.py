# SPDX-License-Identifier: Apache-2.0
"""The site has every page, and its links lead to itself. ``make docs`` builds it and checks the rest."""

from __future__ import annotations

import re

import pytest

from tests.repository.documents.loading import script
from tests.repository.documents.pages import DOCUMENTS, ROOT

SITE = script("site_pages")
SETTINGS = (ROOT / "mkdocs.yml").read_text()


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", SETTINGS, re.M)
    pages = [SITE.place(path.relative_to(ROOT).as_posix()) for path in DOCUMENTS]
    assert sorted(listed) == sorted(page for page in pages if not re.match(r"decisions/\d", page))


def test_nothing_is_loaded_from_other_hosts() -> None:
    assert "\n  font: false\n" in SETTINGS
    for text in (SETTINGS, (ROOT / "docs" / "site.css").read_text()):
        assert "//" not in text


@pytest.mark.parametrize(
    ("document", "link", "on_the_site"),
    [
        ("README.md", "docs/guide.md#object-storage", "guide.md#object-storage"),
        ("README.md", "examples/train_gpt.py", "source/examples/train_gpt.py.md"),
        ("docs/guide.md", "../README.md", "index.md"),
        ("docs/guide.md", "images/stall.svg", "images/stall.svg"),
        ("docs/scale.md", "../benchmarks/results/scale.svg", "source/benchmarks/results/scale.svg"),
        ("docs/decisions/README.md", "0001-files-are-stock.md", "0001-files-are-stock.md"),
        ("docs/decisions/0025-hugging-face-through-bridge.md", "../guide.md", "../guide.md"),
        ("docs/guide.md", "https://example.com/a.md", "https://example.com/a.md"),
        ("docs/guide.md", "#memory", "#memory"),
    ],
)
def test_a_link(document: str, link: str, on_the_site: str) -> None:
    assert SITE.relinked(f"see [it]({link}).", document) == f"see [it]({on_the_site})."


def test_a_link_in_code_stays() -> None:
    code = "```\n[it](../README.md)\n```"
    assert SITE.relinked(code, "docs/guide.md") == code


def test_a_link_to_nothing_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"docs/guide\.md links to nothing\.md"):
        SITE.relinked("[it](nothing.md)", "docs/guide.md")


def test_a_file_is_shown_as_it_is() -> None:
    page = SITE.shown("examples/train_gpt.py")
    assert "````python\n" + (ROOT / "examples" / "train_gpt.py").read_text().rstrip() + "\n````" in page
    assert "## save.txt" in SITE.shown("benchmarks/results")
