# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the frameworks runs, at a size too small to measure anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.frameworks.torchrun import torchrun

# The module that each needs.
FRAMEWORKS = {
    "dcp.async_save, thread": "torch",
    "dcp.async_save, process": "torch",
    "Lightning Fabric": "lightning",
    "Lightning Trainer": "lightning",
    "Accelerate": "accelerate",
    "TorchTitan": "torchtitan",
    "TorchTitan, async": "torchtitan",
    "Automodel": "nemo_automodel",
    "torchtune": "torchtune",
    "torchtune, async": "torchtune",
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_benchmark(framework: str, tmp_path: Path) -> None:
    package = FRAMEWORKS[framework]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "torch" and importlib.util.find_spec("lightning") is None:
        pytest.skip("an environment for others")
    options = [f"--framework={framework}", "--tensors=20", "--rows=4", "--rounds=1"]
    places = [f"--path={tmp_path / 'work'}", f"--output={tmp_path / 'report'}"]
    torchrun("benchmarks/frameworks", *options, *places)
    report = (tmp_path / "report").read_text()
    assert "\n  ckpt_fast " in report and "\n  torch " in report and "held up" in report
    assert list((tmp_path / "work").iterdir()) == []
