# SPDX-License-Identifier: Apache-2.0
"""Laptops load, save, inspect and convert: in a process without what only Linux has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.platforms import elsewhere, uses

USES = [
    name
    for name, value in vars(uses).items()
    if getattr(value, "__module__", "") == uses.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_everything_works_elsewhere(platform: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", elsewhere.__name__, platform, str(tmp_path)],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split(" works\n")[:-1] == sorted(USES)
    assert "runs without its compiled engine" not in ran.stderr, "there is nothing to do about it"
