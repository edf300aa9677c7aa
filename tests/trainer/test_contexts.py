# SPDX-License-Identifier: Apache-2.0
"""Contexts, and what local checkpoints need before the first save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import compat
from ckpt_fast.config import CheckpointConfig
from ckpt_fast.trainer.contexts import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    CheckpointType,
    init_checkpointing_context,
)
from tests.helpers import run_ranks

needs_nvrx = pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")


def test_types() -> None:
    assert [(kind.name, kind.value) for kind in CheckpointType] == [
        ("LOCAL", 1),
        ("GLOBAL", 2),
        ("FSDP_DTENSOR", 3),
    ]


def test_contexts_default_to_a_persistent_strict_checkpoint() -> None:
    nothing: Any = None
    save = CheckpointSaveContext(nothing, [], None, None, 0)
    assert (save.train_data_iterator, save.non_persistent_ckpt) == (None, False)
    load = CheckpointLoadContext(nothing, [], None, None)
    assert (load.strict, load.skip_load_to_model_and_opt) == (True, False)
    assert save.pg_collection is save.module_name is load.pg_collection is load.module_name is None


@pytest.mark.parametrize("kind", [None, "global"])
def test_other_types_need_nothing_and_get_a_dict_of_their_own(kind: Any) -> None:
    config = CheckpointConfig(non_persistent_ckpt_type=kind)
    first = init_checkpointing_context(config)
    assert first == {}
    assert init_checkpointing_context(config) is not first


def test_local_without_nvrx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "HAVE_RESIL", False)
    with pytest.raises(RuntimeError, match="nvidia_resiliency_ext"):
        init_checkpointing_context(CheckpointConfig(non_persistent_ckpt_type="local"))


@needs_nvrx
def test_local_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="non_persistent_local_ckpt_dir"):
        init_checkpointing_context(CheckpointConfig(non_persistent_ckpt_type="local"))


def local_manager(rank: int, directory: str, replication: bool) -> tuple[str, bool]:
    config = CheckpointConfig(
        non_persistent_ckpt_type="local",
        non_persistent_local_ckpt_dir=directory,
        replication=replication,
        replication_factor=2,
    )
    manager = init_checkpointing_context(config)["local_checkpoint_manager"]
    assert manager.find_latest() == -1
    return manager.local_ckpt_dir, manager.repl_strategy is not None


@needs_nvrx
@pytest.mark.parametrize("replication", [False, True])
def test_local_manager_of_each_rank(tmp_path: Path, replication: bool) -> None:
    """``replication_jump`` is unset: the number of ranks per node is the sensible default."""
    answers = run_ranks(local_manager, 2, str(tmp_path), replication)
    directories = [str(directory) for directory, _ in answers]
    assert len(set(directories)) == 2
    assert all(directory.startswith(str(tmp_path)) for directory in directories)
    assert [replicated for _, replicated in answers] == [replication, replication]
