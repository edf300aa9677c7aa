# SPDX-License-Identifier: Apache-2.0
"""Training scripts that know nothing of ckpt_fast, with it and without: each resumes the other.

With the real packages, two ranks and FSDP2 (`make test-frameworks`); skipped where they are not installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doors.dcp.test_installed import is_ours
from tests.manifests import find_damage

ROOT = Path(__file__).resolve().parents[2]
# The package that it is for.
EXAMPLES = {
    "lightning_fabric.py": "lightning",
    "lightning_trainer.py": "lightning",
    "accelerate_fsdp2.py": "accelerate",
    "torchtitan_manager.py": "torchtitan",
    "torchtitan_manager.py --background": "torchtitan",
}
# Its staging needs a GPU, unless it is ours.
OURS_ALONE = "torchtitan_manager.py --background"


def train(example: str, directory: Path, steps: int, with_ours: bool) -> dict[tuple[int, int], str]:
    """Run an example; return the losses by step and rank."""
    script, *options = example.split()
    starter = ["-m", "ckpt_fast.run", "--no-megatron"] if with_ours else []
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", *starter, f"examples/frameworks/{script}", *options]
    ran = subprocess.run(
        [*command, f"--directory={directory}", f"--steps={steps}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = re.findall(r"rank (\d) step (\d+) loss (\S+)", ran.stdout)
    return {(int(step), int(rank)): loss for rank, step, loss in lines}


def checkpoints(directory: Path, step: int) -> list[Path]:
    """Return the torch DCP checkpoints of a step: Accelerate makes two."""
    found = [path.parent for path in directory.rglob(".metadata")]
    return [
        path
        for path in found
        if re.search(rf"\b(step-|dist_epoch_)?{step}\b", str(path.relative_to(directory)))
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("example", EXAMPLES)
def test_each_resumes_the_other(example: str, tmp_path: Path) -> None:
    """Ours saves step 2, stock resumes and saves step 4, ours resumes: as if nothing had happened."""
    if importlib.util.find_spec(EXAMPLES[example]) is None:
        pytest.skip(f"{EXAMPLES[example]} is not installed")
    whole = train(example, tmp_path / "whole", 6, with_ours=example == OURS_ALONE)
    assert len(whole) == 12
    directory = tmp_path / "crossed"
    stock = example.replace(" --background", "") if example == OURS_ALONE else example
    runs = [
        train(example, directory, 2, True),
        train(stock, directory, 2, False),
        train(example, directory, 2, True),
    ]
    assert runs[0] | runs[1] | runs[2] == whole
    for step, by_us in ((2, True), (4, False), (6, True)):
        found = checkpoints(directory, step)
        assert found and {is_ours(path) for path in found} == {by_us}
        if by_us:
            assert [find_damage(str(path)) for path in found] == [[]] * len(found)
    shutil.rmtree(directory)
