# SPDX-License-Identifier: Apache-2.0
"""The example of each door, run as its docstring says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from tests.manifests import manifest_lies

ROOT = Path(__file__).resolve().parents[2]


def torchrun(example: str, directory: Path, *options: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", f"examples/{example}", f"--directory={directory}", *options]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+) loss (\S+)$", output, re.M)}


@pytest.mark.long
@pytest.mark.parametrize("example", ["fsdp2_dcp.py", "megatron_core_install.py"])
def test_a_run_goes_on_from_the_newest_checkpoint(tmp_path: Path, example: str) -> None:
    whole = losses(torchrun(example, tmp_path, "--steps=6"))
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "6")
    again = losses(torchrun(example, tmp_path, "--steps=3"))
    assert again == {step: whole[step] for step in (4, 5, 6)}
    for step in (3, 6):
        directory = tmp_path / str(step)
        # Megatron-Core writes its seal itself.
        assert manifest_lies(directory) in ([], ["metadata.json"])
        assert dcp.FileSystemReader(directory).read_metadata().state_dict_metadata


@pytest.mark.long
def test_the_manager_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    whole = losses(torchrun("checkpoint_manager.py", tmp_path, "--steps=6"))
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "iter_0000006")
    again = losses(torchrun("checkpoint_manager.py", tmp_path, "--steps=3"))
    assert again == {step: whole[step] for step in (4, 5, 6)}
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000006"]
    assert manifest_lies(tmp_path / "iter_0000006") == []


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("nvidia_resiliency_ext") is None, reason="needs nvrx")
def test_a_lost_directory_costs_nothing(tmp_path: Path) -> None:
    output = torchrun("local_checkpoints.py", tmp_path)
    assert "resumed from the local checkpoint of step 3; step 4" in output
    assert output.rstrip().endswith("as before the loss")
