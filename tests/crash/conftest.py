# SPDX-License-Identifier: Apache-2.0
"""What campaigns of interruptions share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def slow_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload; see its source."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the slow disk")
    library = tmp_path_factory.mktemp("slow_disk") / "slow_disk.so"
    source = Path(__file__).parents[1] / "pipeline/slow_disk.c"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    return library
