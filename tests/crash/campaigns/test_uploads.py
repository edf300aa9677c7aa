# SPDX-License-Identifier: Apache-2.0
"""Saves to object storage, interrupted at many moments; nothing is left in the spool or in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.crash.campaigns.test_interruptions import run

pytest.importorskip("multistorageclient")

DOORS = ["megatron-core", "megatron-core-async", "documented", "documented-async", "upload"]


@pytest.mark.long
def test_a_few_moments(slow_disk: Path, tmp_path: Path) -> None:
    run(slow_disk, "upload", "saves", tmp_path, 10, "1", timeout_s=120, module="uploads")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["saves", "lines_of_saves"])
@pytest.mark.parametrize("door", DOORS)
def test_a_hundred_moments(slow_disk: Path, tmp_path: Path, door: str, what: str) -> None:
    result = run(slow_disk, door, what, tmp_path, 100, "1", timeout_s=1700, module="uploads")
    sys.stdout.write(f"{door} {what}: {result}\n")
