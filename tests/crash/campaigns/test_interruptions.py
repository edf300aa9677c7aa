# SPDX-License-Identifier: Apache-2.0
"""Saves and loads of every door, interrupted or late at many moments; what follows is correct each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import compat

DOORS = [
    "pipeline",
    "pipeline-queue",
    "dcp",
    "dcp-async",
    "megatron-core",
    "megatron-core-async",
    "documented",
    "documented-async",
    "local",
    "local-async",
]
BACKGROUND = ["pipeline-queue", "dcp-queue", "megatron-core-async", "documented-async", "local-async"]
LOADS = ["pipeline", "dcp", "megatron-core", "documented", "local"]


def run(
    slow_disk: Path,
    door: str,
    what: str,
    directory: Path,
    moments: int,
    native: str,
    timeout_s: float,
    module: str = "interruptions",
) -> dict[str, Any]:
    if door.startswith("local") and not compat.HAVE_RESIL:
        pytest.skip("needs nvidia-resiliency-ext")
    arguments = (door, what, str(directory), str(moments))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.crash.campaigns.{module}", *arguments],
        env={
            **os.environ,
            "LD_PRELOAD": str(slow_disk),
            "CKPT_FAST_FSYNC": "0",
            "CKPT_FAST_CHUNK": "64K",
            "CKPT_FAST_THREADS": "2",
            "CKPT_FAST_NATIVE": native,
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["interrupted"] > moments // 4
    return result


@pytest.mark.parametrize(
    ("door", "what", "native"),
    [
        pytest.param("pipeline-queue", "lines_of_saves", "1", marks=pytest.mark.long),
        pytest.param("dcp", "saves", "0", marks=pytest.mark.long),
        pytest.param("pipeline", "loads", "1", marks=pytest.mark.long),
        pytest.param("pipeline-queue", "deadlines", "1", marks=pytest.mark.long),
    ],
)
def test_a_few_moments(slow_disk: Path, tmp_path: Path, door: str, what: str, native: str) -> None:
    run(slow_disk, door, what, tmp_path / "checkpoints", 15, native, timeout_s=120)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize(
    ("door", "what"),
    [(door, what) for door in DOORS for what in ("saves", "lines_of_saves")]
    + [(door, "deadlines") for door in BACKGROUND]
    + [(door, "loads") for door in LOADS],
)
def test_two_hundred_moments(slow_disk: Path, tmp_path: Path, door: str, what: str, native: str) -> None:
    result = run(slow_disk, door, what, tmp_path / "checkpoints", 200, native, timeout_s=3500)
    sys.stdout.write(f"{door} {what} {native}: {result}\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("door", BACKGROUND)
def test_deadlines_of_a_disk_that_hangs(slow_disk: Path, tmp_path: Path, door: str) -> None:
    what = "deadlines_of_a_disk_that_hangs"
    result = run(slow_disk, door, what, tmp_path / "checkpoints", 10, "1", timeout_s=500)
    sys.stdout.write(f"{door} {what}: {result}\n")
