# SPDX-License-Identifier: Apache-2.0
"""Saves of several ranks: one checkpoint from all, or the same error on all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.format.types import ObjectShard, TensorShard
from tests.helpers import run_ranks
from tests.pipeline.layouts import same, whole
from tests.pipeline.save.test_save import FILES, assert_not_published, loaded
from tests.saves import save
from tests.storage.test_commit import file_size_limit


def save_rows(rank: int, directory: str, value: int, failing: int | None = None, **options: Any) -> Any:
    """Save this rank's row of ``w``; return the error, if any. Rank ``failing`` has a full disk."""
    world = dist.get_world_size()
    row = torch.full((1, 3000), value * 100 + rank, dtype=torch.int32)
    shards = [TensorShard("w", row, (rank, 0), (world, 3000))]
    with file_size_limit(4096 if rank == failing else -1):
        try:
            save(shards, directory, **FILES, **options)
        except CheckpointError as error:
            return type(error).__name__, str(error), getattr(error, "errno", None)
    return None


def rows(world: int, value: int) -> torch.Tensor:
    return torch.tensor([[value * 100 + rank] * 3000 for rank in range(world)], dtype=torch.int32)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank_fails_the_save_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, native: str
) -> None:
    monkeypatch.setenv("CKPT_FAST_NATIVE", native)
    old, new = tmp_path / "old", tmp_path / "new"
    assert run_ranks(save_rows, 2, str(old), 1) == [None, None]
    first, second = run_ranks(save_rows, 2, str(new), 2, failing)
    assert first == second
    name, text, number = first
    assert (name, number) == ("CheckpointWriteError", errno.EFBIG)
    assert text.startswith(f"rank {failing}: write ") and f"{new}/__{failing}_0.distcp" in text
    assert_not_published(new)
    assert same(loaded(old, "w", rows(2, 1)), rows(2, 1))
    assert run_ranks(save_rows, 2, str(new), 3) == [None, None]
    assert same(loaded(new, "w", rows(2, 3)), rows(2, 3))


def test_a_smaller_world_leaves_no_file_of_the_larger_one(tmp_path: Path) -> None:
    run_ranks(save_rows, 3, str(tmp_path), 1)
    assert len(list(tmp_path.glob("*.distcp"))) == 3
    run_ranks(save_rows, 2, str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert same(loaded(tmp_path, "w", rows(2, 2)), rows(2, 2))


def save_copies(rank: int, directory: str) -> Any:
    """Make both ranks claim to have the main replica."""
    try:
        save([whole("w", torch.zeros(4))], directory, **FILES)
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return None


def test_two_main_replicas(tmp_path: Path) -> None:
    first, second = run_ranks(save_copies, 2, str(tmp_path))
    assert first == second
    assert first[0] == "CheckpointMismatchError" and "w at (0,) is written by two ranks" in first[1]
    assert_not_published(tmp_path)


def save_in_subgroup(rank: int, directory: str) -> None:
    process_group = dist.new_group([1, 2])
    if rank > 0:
        row = torch.full((1, 5), float(rank))
        save([TensorShard("w", row, (rank - 1, 0), (2, 5))], directory, process_group=process_group)
        assert os.path.exists(os.path.join(directory, METADATA_FILE))


def test_a_group_of_some_ranks(tmp_path: Path) -> None:
    run_ranks(save_in_subgroup, 3, str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.distcp")) == ["__1_0.distcp", "__2_0.distcp"]
    expected = torch.tensor([[1.0] * 5, [2.0] * 5])
    assert same(loaded(tmp_path, "w", expected), expected)


def save_unevenly(rank: int, directory: str) -> int:
    """More ranks than rows: the last rank has none; rank 0 also has objects."""
    row = torch.full((1 if rank < 2 else 0, 4), rank, dtype=torch.int16)
    shards: list[Any] = [TensorShard("w", row, (rank, 0), (2, 4))]
    if rank == 0:
        shards.append(ObjectShard("o", b"payload"))
    return save(shards, directory).files


def test_a_rank_with_nothing_to_save(tmp_path: Path) -> None:
    run_ranks(save_unevenly, 3, str(tmp_path))
    expected = torch.tensor([[0] * 4, [1] * 4], dtype=torch.int16)
    assert same(loaded(tmp_path, "w", expected), expected)
