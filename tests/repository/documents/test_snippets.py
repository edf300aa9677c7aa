# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of README and docs is run, and does what the text around it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import run_ranks
from tests.repository.documents.pages import DOCUMENTS, NO_SNIPPETS, ROOT, blocks
from tests.repository.documents.snippets import ELSEWHERE, IN_NEW_PROCESSES, ON_TWO_RANKS, SNIPPETS

CASES = [(page, marker) for page, markers in SNIPPETS.items() for marker in markers]


@pytest.mark.parametrize(("page", "marker"), CASES, ids=lambda value: value.strip())
def test_snippet_runs(page: str, marker: str, tmp_path: Path) -> None:
    (code,) = [block for block in blocks(ROOT / page, "python") if marker in block]
    runner = SNIPPETS[page][marker]
    ranks = 2 if runner in ON_TWO_RANKS else 1
    run_ranks(runner, ranks, code, str(tmp_path), fresh=runner in IN_NEW_PROCESSES)


def test_every_snippet_is_run() -> None:
    for document in DOCUMENTS:
        page = str(document.relative_to(ROOT))
        if document == NO_SNIPPETS or page in ELSEWHERE:
            continue
        for block in blocks(document, "python"):
            assert len([marker for marker in SNIPPETS.get(page, {}) if marker in block]) == 1, block


def test_those_run_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (Path(__file__).parent / test).read_text()
