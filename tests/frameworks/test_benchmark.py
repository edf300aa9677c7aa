# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the frameworks runs, at a size too small to measure anything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The module that each needs.
FRAMEWORKS = {
    "dcp.async_save, thread": "torch",
    "dcp.async_save, process": "torch",
    "Lightning Fabric": "lightning",
    "Accelerate": "accelerate",
    "TorchTitan": "torchtitan",
    "TorchTitan, async": "torchtitan",
    "Automodel": "nemo_automodel",
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_benchmark(framework: str, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in (FRAMEWORKS[framework], "lightning")):
        pytest.skip(f"{FRAMEWORKS[framework]} is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "benchmarks/frameworks", f"--framework={framework}", "--tensors=20"]
    command += ["--rows=4", "--rounds=1", f"--path={tmp_path / 'work'}", f"--output={tmp_path / 'report'}"]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = (tmp_path / "report").read_text()
    assert "\n  ckpt_fast " in report and "\n  torch " in report and "held up" in report
    assert list((tmp_path / "work").iterdir()) == []
