# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``gpu`` have their fixtures and parameters set up also where they are skipped.

Skipped before that, a missing fixture would go unnoticed on machines without a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_a_missing_fixture_is_seen(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_found(no_fsync):\n    raise AssertionError('it ran')\n"
        "def test_missing(nowhere_to_be_found):\n    raise AssertionError('it ran')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "ignore", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "FAIL_WITHOUT_GPU": "0",
            "PYTHONPATH": str(TESTS.parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 skipped, 1 error" in done.stdout, done.stdout
    assert done.stdout.count("fixture 'nowhere_to_be_found' not found") == 1
