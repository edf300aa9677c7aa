# SPDX-License-Identifier: Apache-2.0
"""Missing, damaged and foreign checkpoints: every rank raises what failed, where, and what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import RerunMode

from ckpt_fast import compat
from ckpt_fast.checkpointing import _load_model_weights_from_checkpoint
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.trainer.load.plan import LoadPlan
from ckpt_fast.trainer.load.restore import restore_rerun_and_rng
from tests.helpers import run_ranks
from tests.manifests import make_older
from tests.models import Run, Setup
from tests.trainer import training
from tests.trainer.training import error_of, require

SETUP = Setup(bf16=True, distributed=True)
EXIT_1 = ("SystemExit", "1")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save iterations 1 and 2 on two ranks."""
    root = str(tmp_path_factory.mktemp("errors") / "run")
    run_ranks(training.save_steps, 2, SETUP, root, 2, {})
    return root


@pytest.fixture
def root(sound: str, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "run"))


def load(rank: int, setup: Setup, config: dict[str, Any]) -> tuple[str, str]:
    with Run(setup, **{"on_corrupt": "raise", **config}) as run:
        return error_of(run.load)


def load_on_two(setup: Setup = SETUP, **config: Any) -> tuple[str, str]:
    """Load on two ranks; return the one error that both raise."""
    first, second = run_ranks(load, 2, setup, config)
    assert first == second
    return first


# --- nothing there ---------------------------------------------------------------------------------------


def test_step_that_does_not_exist(root: Path) -> None:
    error = load_on_two(load=str(root), ckpt_step=77)
    require(error, "CheckpointNotFoundError", "ckpt_step=77", f"{root}/iter_0000077", "ls")


def test_pretrained_checkpoint_that_does_not_exist(tmp_path: Path) -> None:
    error = load_on_two(load=str(tmp_path), pretrained_checkpoint=str(tmp_path / "nothing"))
    require(error, "CheckpointNotFoundError", "pretrained_checkpoint", str(tmp_path / "nothing"))


def test_tracker_names_what_is_gone(root: Path) -> None:
    shutil.rmtree(root / "iter_0000002")
    error = load_on_two(load=str(root))
    require(error, "CheckpointNotFoundError", f"{root}/iter_0000002", "ckpt_step")


def test_trackers_that_cannot_be_understood_where_nothing_is_whole(root: Path) -> None:
    (root / "latest_train_state.pt").write_bytes(b"\x80nonsense")
    (root / "latest_checkpointed_iteration.txt").write_text("soon")
    for directory in root.glob("iter_*"):
        (directory / "__1_0.distcp").unlink()
    error = load_on_two(load=str(root))
    require(error, "DamagedFileError", f"{root}/latest_train_state.pt", "'soon'", "No iteration", "whole")


def test_every_exit_has_a_status_that_job_scripts_see(root: Path, tmp_path: Path) -> None:
    assert load_on_two(load=str(tmp_path / "nothing"), exit_on_missing_checkpoint=True) == EXIT_1
    assert run_ranks(load_without_rng_states, 2, str(root)) == [EXIT_1, EXIT_1]
    assert run_ranks(load_a_rerun_state_that_does_not_fit, 2, str(root)) == [EXIT_1, EXIT_1]


def load_without_rng_states(rank: int, root: str) -> tuple[str, str]:
    """Load a checkpoint that promises more than it contains; return the error."""
    with Run(SETUP, load=root) as run:
        plan = LoadPlan(rng=True)
        groups = compat.get_pg_collection(run.model)
        state_dict = {"rng_state": [{"random_rng_state": None}]}
        return error_of(lambda: restore_rerun_and_rng(plan, state_dict, run.state.cfg, groups))


def load_a_rerun_state_that_does_not_fit(rank: int, root: str) -> tuple[str, str]:
    machine = compat.get_rerun_state_machine()
    mode, machine.mode = machine.mode, RerunMode.VALIDATE_RESULTS
    try:
        with Run(SETUP, load=root) as run:
            plan = LoadPlan(rerun=True)
            groups = compat.get_pg_collection(run.model)
            state_dict = {"rerun_state_machine": "nonsense"}
            return error_of(lambda: restore_rerun_and_rng(plan, state_dict, run.state.cfg, groups))
    finally:
        machine.mode = mode


def load_weights(rank: int, path: str) -> tuple[str, str]:
    with Run(SETUP) as run:
        return error_of(lambda: _load_model_weights_from_checkpoint(path, run.model))


def test_weights_from_nowhere(tmp_path: Path) -> None:
    first, second = run_ranks(load_weights, 2, str(tmp_path / "nothing"))
    assert first == second
    require(first, "CheckpointNotFoundError", str(tmp_path / "nothing"), "does not exist")


def test_weights_from_a_root_of_checkpoints(root: Path) -> None:
    first, second = run_ranks(load_weights, 2, str(root))
    assert first == second
    require(first, "CheckpointNotFoundError", str(root), "pass the directory of one iteration")


# --- half a checkpoint -----------------------------------------------------------------------------------


def unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, nbytes: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / name, nbytes)


def flip_last_weight_bit(directory: Path) -> None:
    """Flip a bit in the data of ``output_layer.weight``, in whichever file it is."""
    metadata = torch.distributed.checkpoint.FileSystemReader(directory).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "output_layer.weight"]
    with (directory / info.relative_path).open("r+b") as file:
        file.seek(info.offset + info.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def garble(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(b"\x80\x04nonsense" * 9) and None


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = {
    # what is done, error types, fragments of the text
    "no-seal": (unlink("metadata.json"), ("CheckpointCorruptError",), ("metadata.json",)),
    "no-metadata": (
        unlink(".metadata"),
        ("CheckpointNotFoundError", "CheckpointCorruptError"),
        (".metadata",),
    ),
    "no-common": (unlink("common.pt"), ("CheckpointNotFoundError", "CheckpointCorruptError"), ("common.pt",)),
    "no-shard": (
        unlink("__1_0.distcp"),
        ("CheckpointNotFoundError", "CheckpointCorruptError"),
        ("__1_0.distcp",),
    ),
    "short-shard": (truncate("__1_0.distcp", 3000), ("CheckpointCorruptError",), ("__1_0.distcp", "3000")),
    "flipped-bit": (
        flip_last_weight_bit,
        ("CheckpointCorruptError",),
        ("output_layer.weight", ".distcp", "CRC-32"),
    ),
    "garbled-metadata": (garble(".metadata"), ("CheckpointCorruptError",), (".metadata",)),
    "garbled-common": (garble("common.pt"), ("CheckpointCorruptError",), ("common.pt",)),
    "garbled-seal": (garble("metadata.json"), ("CheckpointCorruptError",), ("metadata.json",)),
}


@pytest.mark.parametrize("kind", ["ours", pytest.param("older", marks=pytest.mark.long), "stock"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(root: Path, damage: str, kind: str) -> None:
    inflict, kinds, fragments = DAMAGES[damage]
    directory = root / "iter_0000002"
    if kind != "ours":
        make_older(directory)
    if kind == "stock":
        # As stock writers leave it: damage must be detected without the list of files.
        (directory / "ckpt_fast.json").unlink()
    inflict(directory)
    error, text = load_on_two(load=str(root))
    assert error in kinds, (error, text)
    for fragment in (str(directory), "earlier iteration", *fragments):
        assert fragment in text


def test_an_empty_directory(root: Path) -> None:
    shutil.rmtree(root / "iter_0000002")
    (root / "iter_0000002").mkdir()
    error = load_on_two(load=str(root))
    require(error, "UnknownFormatError", "Unknown checkpoint format", f"{root}/iter_0000002", "older")


def load_where_rank_1_lacks_a_file(rank: int, path: str) -> tuple[str, str]:
    """Give each rank its own view of the directory, as on a file system that is not shared."""
    with Run(SETUP) as run:
        scaffold = run.sharded_state_dict() if rank == 9 else {"model": run.sharded_state_dict(True)["model"]}
        return error_of(lambda: torch_dist.load(scaffold, f"{path}_{rank}"))


def test_only_one_rank_sees_the_damage(root: Path) -> None:
    for rank in range(2):
        shutil.copytree(root / "iter_0000002", root / f"view_{rank}")
    (root / "view_1/.metadata").unlink()
    first, second = run_ranks(load_where_rank_1_lacks_a_file, 2, str(root / "view"))
    assert first == second
    require(first, "CheckpointNotFoundError", "rank 1:", str(root / "view_1"), ".metadata")


# --- a checkpoint of something else ----------------------------------------------------------------------


def test_unknown_format_in_the_configuration(root: Path) -> None:
    error = load_on_two(load=str(root), ckpt_format="zarr")
    require(error, "NotImplementedError", "zarr", "torch_dist", "fsdp_dtensor")


def test_format_on_disk_is_another(root: Path) -> None:
    error = load_on_two(load=str(root), ckpt_format="fsdp_dtensor")
    require(error, "AssertionError", "torch_dist", "fsdp_dtensor", f"{root}/iter_0000002", "ckpt_format")


def test_format_of_one_iterations_directory_is_another(root: Path) -> None:
    error = load_on_two(load=str(root / "iter_0000002"), ckpt_format="fsdp_dtensor")
    require(error, "AssertionError", "torch_dist", "fsdp_dtensor", f"{root}/iter_0000002", "ckpt_format")


def test_unknown_format_on_disk(root: Path) -> None:
    directory = root / "iter_0000002"
    for path in directory.iterdir():
        if path.name not in ("run_config.yaml", "train_state.pt"):
            path.unlink()
    error = load_on_two(load=str(root))
    require(error, "UnknownFormatError", "Unknown checkpoint format", str(directory), "older")


@pytest.mark.parametrize(
    "setup, name, shapes",
    [
        (Setup(bf16=True, hidden=32), "weight has shape", ("16", "32")),
        (Setup(bf16=True, layers=3), "decoder.layers.", ("(1, ", "(3, ")),
        (Setup(bf16=True, layers=3, tp=2), "decoder.layers.", ("(1, ", "(3, ")),
    ],
    ids=["hidden", "layers", "layers-tp2"],
)
def test_model_of_another_shape(root: Path, setup: Setup, name: str, shapes: tuple[str, ...]) -> None:
    error = load_on_two(setup, load=str(root), load_optim=False)
    require(
        error, "CheckpointMismatchError", "rank 0:", name, f"{root}/iter_0000002", "configuration", *shapes
    )


def load_other_keys(rank: int, path: str, strict: str, ranks: list[int]) -> tuple[str, str]:
    """Request, on ``ranks`` only, a name that is not in the checkpoint."""
    with Run(SETUP) as run:
        scaffold = {"model": run.sharded_state_dict(True)["model"]}
        if rank in ranks:
            scaffold["model"]["output_layer.weight"].key = "lm_head.weight"
        return error_of(lambda: torch_dist.load(scaffold, path, strict=strict))


@pytest.mark.parametrize(
    "strict, ranks, fragments",
    [
        ("assume_ok_unexpected", [0, 1], ("has, for example", "linear_fc1.weight", "dist_ckpt_strictness")),
        ("raise_all", [0, 1], ("Unexpected keys", "configuration")),
        ("assume_ok_unexpected", [1], ("all ranks build the same model",)),
    ],
    ids=["missing", "strict", "ranks-disagree"],
)
def test_a_name_that_is_not_there(
    root: Path, strict: str, ranks: list[int], fragments: tuple[str, ...]
) -> None:
    directory = str(root / "iter_0000002")
    first, second = run_ranks(load_other_keys, 2, directory, strict, ranks)
    assert first == second
    require(first, "CheckpointMismatchError", "rank 0:", directory, "lm_head.weight", *fragments)
