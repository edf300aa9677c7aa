# SPDX-License-Identifier: Apache-2.0
"""The pictures in docs/images are drawn from the reports that are published, and can be seen by everybody."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.repository.documents.loading import script
from tests.repository.documents.pages import DOCUMENTS, ROOT

IMAGES = sorted((ROOT / "docs" / "images").glob("*.svg"))


def test_they_are_of_the_published_reports() -> None:
    """If this fails after new measurements: python scripts/charts.py."""
    drawn = script("charts").pictures()
    assert {path.name for path in IMAGES} == set(drawn)
    for path in IMAGES:
        assert path.read_text() == drawn[path.name], path.name


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_is_whole(image: Path) -> None:
    root = ElementTree.parse(image).getroot()
    assert root.findtext("{http://www.w3.org/2000/svg}title")
    width = float(root.attrib["viewBox"].split()[2])
    left = float(root.attrib["viewBox"].split()[0])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.attrib["x"]) + float(box.attrib["width"]) <= left + width


def test_every_image_is_shown_and_described() -> None:
    shown = set()
    for document in DOCUMENTS:
        for description, path in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", document.read_text()):
            assert len(description) > 20
            shown.add((document.parent / path).resolve())
    assert shown == {*IMAGES}
