# SPDX-License-Identifier: Apache-2.0
"""Training scripts that know nothing of ckpt_fast, with it and without: each resumes the other.

With the real packages, two ranks and FSDP2 (`make test-frameworks`, `make test-torchtune`); skipped where
they are not installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ckpt_fast
from tests.doors.dcp.states import differences
from tests.doors.installing.test_torch_dcp import is_ours
from tests.frameworks.torchrun import ROOT, torchrun
from tests.manifests import find_damage

# The package that it takes.
EXAMPLES = {
    "lightning_fabric.py": "lightning",
    "lightning_trainer.py": "lightning",
    "accelerate_fsdp2.py": "accelerate",
    "transformers_trainer.py": "accelerate",  # stack B may have transformers, without what its Trainer needs
    "torchtitan_manager.py": "torchtitan",
    "torchtitan_manager.py --background": "torchtitan",
    "automodel_checkpointer.py": "nemo_automodel",
    "automodel_checkpointer.py --background": "nemo_automodel",
    "torchtune_checkpointer.py": "torchtune",
    "torchtune_checkpointer.py --background": "torchtune",
}
# Their staging needs a GPU, unless it is ours.
OURS_ALONE = {"torchtitan_manager.py --background", "automodel_checkpointer.py --background"}


def train(example: str, directory: Path, *, with_ours: bool) -> dict[tuple[int, int], str]:
    """Run two steps, and save the second; return the losses by step and rank."""
    script, *options = example.split()
    starter = ["-m", "ckpt_fast.run", "--no-megatron"] if with_ours else []
    printed = torchrun(
        *starter, f"examples/frameworks/{script}", *options, f"--directory={directory}", "--steps=2"
    )
    lines = re.findall(r"rank (\d) step (\d+) loss ([\d.e+-]+)", printed)
    return {(int(step), int(rank)): loss for rank, step, loss in lines}


def checkpoints(directory: Path, step: int) -> list[Path]:
    """Return the torch DCP checkpoints of a step: Accelerate makes two."""
    found = sorted(path.parent for path in directory.rglob(".metadata"))
    return [
        path
        for path in found
        if re.search(rf"\b(step-|checkpoint-|dist_epoch_)?{step}\b", str(path.relative_to(directory)))
    ]


def contents(path: Path, *, with_ours: bool) -> dict[str, Any]:
    """Return all that a checkpoint has, read in this process."""
    with ckpt_fast.install(megatron=False, torch_dcp=with_ours):
        return _load_state_dict_from_keys(checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("example", EXAMPLES)
def test_each_resumes_the_other(example: str, tmp_path: Path) -> None:
    """Both resume what ours has saved, save, and resume what the other has saved, with equal losses.

    What they save is equal in all its bits, whichever of them reads it.
    """
    if importlib.util.find_spec(EXAMPLES[example]) is None:
        pytest.skip(f"{EXAMPLES[example]} is not installed")
    stock = example.removesuffix(" --background") if example in OURS_ALONE else example
    one, other = tmp_path / "one", tmp_path / "other"
    assert len(train(example, one, with_ours=True)) == 4
    shutil.copytree(one, other)
    for step in (4, 6):
        # The first pair reads files of ours; the second reads crosswise.
        by_stock = train(stock, one, with_ours=False)
        by_ours = train(example, other, with_ours=True)
        assert by_stock == by_ours and {at for at, _ in by_ours} == {step - 1, step}
        found = checkpoints(other, step)
        assert found and {is_ours(path) for path in found} == {True}
        assert [find_damage(str(path)) for path in found] == [[]] * len(found)
        by_torch = checkpoints(one, step)
        assert [path.relative_to(one) for path in by_torch] == [path.relative_to(other) for path in found]
        assert {is_ours(path) for path in by_torch} == {False}
        for expected, path in zip(by_torch, found, strict=True):
            values = contents(expected, with_ours=False)
            assert values
            for each, with_ours in ((expected, True), (path, False), (path, True)):
                assert differences(values, contents(each, with_ours=with_ours)) == []
        one, other = other, one


LAUNCHED = """
import sys
from torch.distributed.checkpoint import FileSystemWriter

print(__name__, *sys.argv, type(FileSystemWriter("x")).__name__)
"""


def test_accelerates_launcher(tmp_path: Path) -> None:
    """``accelerate launch -m ckpt_fast.run SCRIPT``."""
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(LAUNCHED)
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    ran = subprocess.run(
        [*launch, "-m", "ckpt_fast.run", "--no-megatron", "train.py", "--steps=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "__main__ train.py --steps=2 FastStorageWriter"
