# SPDX-License-Identifier: Apache-2.0
"""Which of the existing checkpoints is chosen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast.config import CheckpointConfig
from ckpt_fast.doors.megatron.common_state import open_checkpoint
from ckpt_fast.errors import CheckpointNotFoundError
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load import load as load_module
from ckpt_fast.trainer.load.located import Located
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places import locate, trackers
from ckpt_fast.trainer.places.catalog import Found
from ckpt_fast.trainer.places.locate import (
    _DIRECT_ITERATION_DIR_SENTINEL,
    _get_checkpoint_format,
    _get_global_non_persistent_checkpoint_dirs,
    _get_non_persistent_iteration,
    _has_global_non_persistent_checkpoint,
    _resolve_checkpoint_iteration,
    find_checkpoint_rank_0,
    newest_global_non_persistent_checkpoint,
)
from tests.helpers import RankError, run_ranks

SEAL = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def publish(root: Path, step: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    trackers.publish_trackers(str(root), step, trackers.snapshot_train_state(TrainState(step=step), 0))


def make_iteration(root: Path, step: int) -> Path:
    directory = root / f"iter_{step:07d}"
    directory.mkdir(parents=True)
    (directory / "metadata.json").write_text(SEAL)
    return directory


def test_constants() -> None:
    assert locate.TRACKER_PREFIX == "latest"
    assert locate._NON_PERSISTENT_CKPT_SUBDIR == "non_persistent"
    assert _DIRECT_ITERATION_DIR_SENTINEL == -2
    assert locate.read_metadata is trackers.read_metadata


# --- Format ----------------------------------------------------------------------------------------------


def test_format(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="Unknown checkpoint format"):
        _get_checkpoint_format(str(tmp_path))
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert _get_checkpoint_format(str(tmp_path)) == "hf"
    (tmp_path / ".metadata").touch()
    assert _get_checkpoint_format(str(tmp_path)) == "fsdp_dtensor"
    (tmp_path / "metadata.json").write_text(SEAL)
    assert _get_checkpoint_format(str(tmp_path)) == "torch_dist"


def test_find_checkpoint(tmp_path: Path) -> None:
    directory = make_iteration(tmp_path, 5)
    assert find_checkpoint_rank_0(str(tmp_path), 5) == str(directory)
    assert find_checkpoint_rank_0(str(tmp_path), 6) is None
    assert find_checkpoint_rank_0(str(tmp_path / "absent"), 5) is None
    assert find_checkpoint_rank_0(str(tmp_path), 5, release=True) is None
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "metadata.json").write_text(SEAL)
    assert find_checkpoint_rank_0(str(tmp_path), 5, release=True) == str(tmp_path / "release")


# --- Iteration -------------------------------------------------------------------------------------------


def test_nothing_to_resolve(tmp_path: Path) -> None:
    assert _resolve_checkpoint_iteration(None, None) == (-1, False)
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (-1, False)
    assert _resolve_checkpoint_iteration(str(tmp_path / "absent"), None) == (-1, False)


def test_a_root_that_cannot_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"is a file: checkpoint\.load must name a directory"):
        _resolve_checkpoint_iteration(str(tmp_path / "file"), None)
    with pytest.raises(ValueError, match=r"ckpt_step=3 specified but checkpoint\.load is None"):
        _resolve_checkpoint_iteration(None, 3)
    # An empty directory name is not the working directory.
    monkeypatch.chdir(tmp_path)
    publish(tmp_path, 9)
    assert _resolve_checkpoint_iteration("", None) == (-1, False)


def test_iterations_without_a_tracker_are_not_searched_for(tmp_path: Path) -> None:
    """An untracked directory may be an incomplete checkpoint."""
    make_iteration(tmp_path, 5)
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (-1, False)


def test_a_checkpoint_itself_beats_the_step(tmp_path: Path) -> None:
    directory = make_iteration(tmp_path, 5)
    assert _resolve_checkpoint_iteration(str(directory), 3) == (_DIRECT_ITERATION_DIR_SENTINEL, False)


def test_the_step_beats_the_tracker(tmp_path: Path) -> None:
    make_iteration(tmp_path, 5)
    publish(tmp_path, 9)
    assert _resolve_checkpoint_iteration(str(tmp_path), 5) == (5, False)
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (9, False)
    with pytest.raises(FileNotFoundError) as missing:
        _resolve_checkpoint_iteration(str(tmp_path), 6)
    directory = tmp_path / "iter_0000006"
    assert f"ckpt_step=6 specified but checkpoint directory does not exist: {directory}" in str(missing.value)
    assert f"ls {tmp_path}/iter_*" in str(missing.value)


def test_the_train_state_tracker_beats_that_of_megatron_lm(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("7")
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (7, False)
    tracker.write_text("release")
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (0, True)
    publish(tmp_path, 0)
    assert _resolve_checkpoint_iteration(str(tmp_path), None) == (0, False)


def test_the_tracker_is_read_again_after_a_save(tmp_path: Path) -> None:
    for step in (10, 20):
        publish(tmp_path, step)
        assert _resolve_checkpoint_iteration(str(tmp_path), None) == (step, False)


def resolve_own(rank: int, directory: str, step: int | None) -> tuple[int, bool]:
    return _resolve_checkpoint_iteration(os.path.join(directory, str(rank)), step)


def test_ranks_that_see_other_files_follow_rank_0(tmp_path: Path) -> None:
    """Rank 1 has no tracker yet; deciding for itself, it would not take part in reading the tracker."""
    publish(tmp_path / "0", 30)
    assert run_ranks(resolve_own, 2, str(tmp_path), None) == [(30, False), (30, False)]


def test_a_missing_step_is_missing_on_every_rank(tmp_path: Path) -> None:
    make_iteration(tmp_path / "1", 4)
    with pytest.raises(RankError) as failure:
        run_ranks(resolve_own, 2, str(tmp_path), 4)
    assert failure.value.errors == {0: "CheckpointNotFoundError", 1: "CheckpointNotFoundError"}


# --- Non-persistent --------------------------------------------------------------------------------------


def test_iteration_of_each_type(tmp_path: Path) -> None:
    class LocalManager:
        def find_latest(self) -> int:
            return 44

    assert _get_non_persistent_iteration(str(tmp_path)) == -1
    assert _get_non_persistent_iteration(str(tmp_path), "global") == -1
    publish(tmp_path, 33)
    assert _get_non_persistent_iteration(str(tmp_path), "global") == 33
    context = {"local_checkpoint_manager": LocalManager()}
    assert _get_non_persistent_iteration("", "local", context) == 44
    with pytest.raises(ValueError, match="init_checkpointing_context"):
        _get_non_persistent_iteration("", "local", None)
    in_memory: Any = "in_memory"
    with pytest.raises(ValueError, match="Must be 'local' or 'global'"):
        _get_non_persistent_iteration("", in_memory)


def test_roots_of_global_ones() -> None:
    config = CheckpointConfig(save="/save")
    dirs = _get_global_non_persistent_checkpoint_dirs
    assert dirs("/load", config) == ("/save/non_persistent", "/load/non_persistent")
    assert dirs("/save", config) == ("/save/non_persistent",)
    assert dirs(None, CheckpointConfig()) == ()
    assert dirs("", CheckpointConfig()) == ()
    explicit = CheckpointConfig(save="/save", non_persistent_global_ckpt_dir="/elsewhere")
    assert dirs("/load", explicit) == ("/elsewhere",)


def test_presence_of_global_ones(tmp_path: Path) -> None:
    config = CheckpointConfig(save=str(tmp_path / "save"), non_persistent_ckpt_type="global")
    load = str(tmp_path / "load")
    assert not _has_global_non_persistent_checkpoint(load, config)
    publish(tmp_path / "load" / "non_persistent", 3)
    assert _has_global_non_persistent_checkpoint(load, config)
    config.non_persistent_ckpt_type = None
    assert not _has_global_non_persistent_checkpoint(load, config)


def test_the_newest_root_wins_and_a_tie_goes_to_save(tmp_path: Path) -> None:
    config = CheckpointConfig(save=str(tmp_path / "save"), non_persistent_ckpt_type="global")
    load = str(tmp_path / "load")
    assert newest_global_non_persistent_checkpoint(load, config) == ("", -1)
    publish(tmp_path / "load" / "non_persistent", 3)
    assert newest_global_non_persistent_checkpoint(load, config) == (f"{load}/non_persistent", 3)
    publish(tmp_path / "save" / "non_persistent", 3)
    assert newest_global_non_persistent_checkpoint(load, config) == (f"{config.save}/non_persistent", 3)
    publish(tmp_path / "load" / "non_persistent", 4)
    assert newest_global_non_persistent_checkpoint(load, config) == (f"{load}/non_persistent", 4)


def presence(rank: int, directory: str) -> tuple[bool, tuple[str, int]]:
    config = CheckpointConfig(
        non_persistent_ckpt_type="global",
        non_persistent_global_ckpt_dir=os.path.join(directory, str(rank)),
    )
    return (
        _has_global_non_persistent_checkpoint(None, config),
        newest_global_non_persistent_checkpoint(None, config),
    )


def test_rank_0_decides_about_presence(tmp_path: Path) -> None:
    publish(tmp_path / "0", 2)
    answers = run_ranks(presence, 2, str(tmp_path))
    assert [(found, step) for found, (_, step) in answers] == [(True, 2), (True, 2)]


def find_own_run_config(rank: int, directory: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(OpenCheckpoint, "holds", lambda self, name: False)
        found = Found("persistent", "", 1, directory)
        run = LoadRun(CheckpointConfig(finetune=True), None, None, None)
        with open_checkpoint(directory) as checkpoint:
            located = Located(found, CheckpointType.FSDP_DTENSOR, checkpoint)
            return load_module._read_history(run, located)[0]


def test_a_rank_that_does_not_see_the_configuration_gets_it(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text("model: {hidden_size: 8}")
    assert run_ranks(find_own_run_config, 2, str(tmp_path)) == [{"model": {"hidden_size": 8}}] * 2
