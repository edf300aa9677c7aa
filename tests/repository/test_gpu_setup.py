# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``gpu`` are found, and their fixtures and parameters set up, on every machine.

Without a GPU they are skipped before that, so a missing fixture would go unnoticed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FILES = sorted(
    str(path.relative_to(TESTS.parent))
    for path in TESTS.rglob("test_*.py")
    if "mark.gpu" in path.read_text() and path != Path(__file__)
)


def run(*options: str, path: Path = TESTS.parent) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, check=False, timeout=240)


def test_every_gpu_test_can_be_set_up() -> None:
    done = run("--setup-only", "-rs", *FILES)
    assert done.returncode == 0 and "SKIPPED" not in done.stdout, done.stdout[-4000:]
    assert {line.strip().split("::")[0] for line in done.stdout.splitlines() if "::" in line} == set(FILES)


def test_a_missing_fixture_is_seen(tmp_path: Path) -> None:
    """That is what the check is for; it runs no test."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA device\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_found(no_fsync):\n    raise AssertionError('it ran')\n"
        "def test_missing(nowhere_to_be_found):\n    raise AssertionError('it ran')\n"
    )
    done = run("--setup-only", path=tmp_path)
    assert done.returncode == 1 and done.stdout.count("fixture 'nowhere_to_be_found' not found") == 1
    assert "it ran" not in done.stdout and "fixture 'no_fsync' not found" not in done.stdout
