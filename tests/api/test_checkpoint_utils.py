# SPDX-License-Identifier: Apache-2.0
"""``ckpt_fast.checkpoint_utils`` has the documented names, here and where newer programs import them from."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import checkpoint_utils, checkpointing
from ckpt_fast.checkpoint_utils import (
    checkpoint_exists,
    ensure_directory_exists,
    file_exists,
    get_checkpoint_name,
    get_checkpoint_run_config_filename,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    is_checkpoint_iteration_directory,
    read_run_config,
    read_train_state,
)
from tests.helpers import run_ranks
from tests.models import Run, Setup

# Transcribed from the documentation of megatron.bridge.training.utils.checkpoint_utils.
DOCUMENTED: dict[str, list[tuple[str, object]]] = {
    "file_exists": [("path", ...)],
    "ensure_directory_exists": [("filename", ...), ("check_parent", True)],
    "get_checkpoint_name": [("checkpoints_path", ...), ("iteration", ...), ("release", False)],
    "get_checkpoint_train_state_filename": [("checkpoints_path", ...), ("prefix", None)],
    "get_checkpoint_run_config_filename": [("checkpoints_path", ...)],
    "get_checkpoint_tracker_filename": [("checkpoints_path", ...)],
    "checkpoint_exists": [("checkpoints_path", ...)],
}
DATA = {"TRAIN_STATE_FILE": "train_state.pt", "TRACKER_PREFIX": "latest", "CONFIG_FILE": "run_config.yaml"}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(checkpoint_utils, name)).parameters.values()
    found = [(each.name, ... if each.default is each.empty else each.default) for each in parameters]
    assert found == DOCUMENTED[name]


@pytest.mark.parametrize("name", [name for name in checkpoint_utils.__all__ if name != "logger"])
def test_names_are_the_same_in_both_modules(name: str) -> None:
    value = getattr(checkpoint_utils, name)
    assert getattr(checkpointing, name, value) is value
    assert DATA.get(name, value) == value
    assert isinstance(value, str) or (value.__doc__ or "").strip()


def save(rank: int, directory: str) -> None:
    with Run(Setup(), save=directory) as run:
        run.train(2)
        run.save()


def read(rank: int, directory: str) -> tuple[Any, ...]:
    root = directory
    checkpoint = get_checkpoint_name(root, 2)
    train_state = read_train_state(get_checkpoint_train_state_filename(checkpoint))
    newest = read_train_state(get_checkpoint_train_state_filename(root, prefix="latest"))
    config = read_run_config(get_checkpoint_run_config_filename(checkpoint))
    train_state.step = 99
    again = read_train_state(get_checkpoint_train_state_filename(checkpoint))
    return newest.step, again.step, config["checkpoint"]["save"]


def test_they_describe_what_is_saved(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    assert not checkpoint_exists(root) and not checkpoint_exists(None)
    run_ranks(save, 1, root)
    checkpoint = get_checkpoint_name(root, 2)
    assert checkpoint_exists(root) and checkpoint_exists(checkpoint)
    assert is_checkpoint_iteration_directory(checkpoint) and not is_checkpoint_iteration_directory(root)
    assert Path(get_checkpoint_tracker_filename(root)).read_text() == "2"
    assert run_ranks(read, 2, root) == [(2, 2, root)] * 2


def test_directories(tmp_path: Path) -> None:
    assert get_checkpoint_name("/runs/a", 1000) == "/runs/a/iter_0001000"
    assert get_checkpoint_name("/runs/a", 1000, release=True) == "/runs/a/release"
    ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    assert file_exists(str(tmp_path / "a" / "b")) and not file_exists(str(tmp_path / "a" / "b" / "file"))
    ensure_directory_exists(str(tmp_path / "c"), check_parent=False)
    assert (tmp_path / "c").is_dir()
