# SPDX-License-Identifier: Apache-2.0
"""Paths that name no checkpoint, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast import CheckpointManager, FastStorageReader
from ckpt_fast.errors import CheckpointNotFoundError, CheckpointWriteError
from tests.helpers import run_ranks


def state() -> dict[str, Any]:
    return {"w": torch.ones(3), "step": 1}


def test_an_empty_path_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for save in (ckpt_fast.save, ckpt_fast.async_save):
        with pytest.raises(CheckpointWriteError, match="the path to save to is empty; nothing was saved"):
            save(state(), "")
    with pytest.raises(ValueError, match="directory is empty"):
        CheckpointManager("")
    assert not list(tmp_path.iterdir())
    ckpt_fast.save(state(), ".")
    ckpt_fast.load(state(), ".")


def save_where_only_rank_0_knows(rank: int, path: str) -> str:
    try:
        ckpt_fast.save(state(), path if rank == 0 else "")
    except CheckpointWriteError as error:
        return str(error)
    return "saved"


def test_a_rank_without_a_path_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    said = run_ranks(save_where_only_rank_0_knows, 2, str(tmp_path / "checkpoint"))
    assert all(text.startswith("rank 1: the path to save to is empty") for text in said)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saying = r"file is a file, and a checkpoint is a directory with a \.metadata file in it"
    with pytest.raises(CheckpointNotFoundError, match=saying):
        ckpt_fast.load(state(), tmp_path / "file")
    with pytest.raises(dcp.api.CheckpointException, match=saying):
        dcp.load(state(), storage_reader=FastStorageReader(tmp_path / "file"))
    with pytest.raises(CheckpointNotFoundError, match="the directory does not exist"):
        ckpt_fast.load(state(), tmp_path / "file" / "below")


def test_a_relative_path_where_the_current_directory_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError, match="the current directory has been deleted: 'checkpoint'"):
        ckpt_fast.save(state(), "checkpoint")
    ckpt_fast.save(state(), tmp_path / "checkpoint")
    ckpt_fast.load(state(), tmp_path / "checkpoint")
