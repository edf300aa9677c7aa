# SPDX-License-Identifier: Apache-2.0
"""A load through the torch DCP door fills everything it is asked to, from one save, or raises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastStorageReader
from tests.doors.dcp import reads as dcp_reads
from tests.doors.dcp.reads import Doubling, edit, lose
from tests.helpers import run_ranks


@pytest.mark.parametrize("partial", [False, True])
def test_a_piece_that_is_missing_fails_all_ranks(partial: bool, tmp_path: Path) -> None:
    """Of 8 rows in two halves, everything that the second rank requests is missing."""
    run_ranks(dcp_reads.save_stock, 2, str(tmp_path))
    edit(str(tmp_path), lambda metadata: lose(metadata, "rows", 1))
    for error, rest in run_ranks(dcp_reads.load_without_a_piece, 2, str(tmp_path), partial):
        assert "ranks:dict_keys([1])" in error
        assert "has only 0 of the 12 elements of rows at (4, 0), and none of (4, 3) at (4, 0)" in error
        assert rest == "[]"


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    """The same, if one rank requests all of it."""
    run_ranks(dcp_reads.save_stock, 2, str(tmp_path))
    edit(str(tmp_path), lambda metadata: lose(metadata, "columns", 0))
    (result,) = run_ranks(_load_columns, 1, str(tmp_path))
    assert "only 9 of the 18 elements of columns at (0, 0), and none of (3, 3) at (0, 0)" in result


def _load_columns(rank: int, directory: str) -> str:
    into = {"columns": torch.full((3, 6), -7.0)}
    return dcp_reads.error_of(lambda: dcp_reads.load(directory, into))


def test_ranks_that_see_different_metadata_are_named(tmp_path: Path) -> None:
    directory = str(tmp_path / "checkpoint")
    run_ranks(dcp_reads.save_stock, 2, directory)
    dcp_reads.copy_with_another_metadata(directory)
    for error in run_ranks(dcp_reads.load_with_two_views, 2, directory):
        assert f"rank 1 sees another .metadata in {directory} than the rank that coordinates" in error


def test_a_checkpoint_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    run_ranks(dcp_reads.save_stock, 2, str(tmp_path))
    for error in run_ranks(dcp_reads.load_while_replaced, 2, str(tmp_path)):
        assert "was replaced or removed while it was being read" in error


@pytest.mark.parametrize("implementation", ["engine", "fallback"])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_flipped_bits_of_stock_metadata(ranks: int, implementation: str, tmp_path: Path) -> None:
    """Only a sample of the bits; ``-m slow`` takes all of them."""
    _flip(ranks, implementation, tmp_path, step=151)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_flipped_bit_of_stock_metadata(ranks: int, tmp_path: Path) -> None:
    _flip(ranks, "engine", tmp_path, step=1)


def _flip(ranks: int, implementation: str, directory: Path, step: int) -> None:
    run_ranks(dcp_reads.save_stock, 2, str(directory))
    arguments = (str(directory), implementation, step // 3, step)
    results = run_ranks(dcp_reads.flip_every_bit, ranks, *arguments, timeout_s=3000, fresh=True)
    for outcomes in results:
        assert outcomes["wrong"] == []
        assert outcomes["error"] and outcomes["same"]


# --- one process ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save({"plain": torch.arange(5.0), "other": torch.ones(5), "step": 3}, checkpoint_id=tmp_path)
    return tmp_path


def load(directory: Path, into: dict[str, Any], **options: Any) -> dict[str, Any]:
    dcp.load(into, storage_reader=FastStorageReader(directory), **options)
    return into


def test_an_element_that_is_asked_for_twice(saved: Path) -> None:
    """Otherwise, the volume alone would seem right."""
    with pytest.raises(
        CheckpointException, match=r"plan for plain .*\(2,\) at \(0,\) and \(3,\) at \(1,\) overl"
    ):
        load(saved, {"plain": torch.zeros(5)}, planner=Doubling())


def test_a_planner_may_leave_a_tensor_out(saved: Path) -> None:
    class Some(dcp.DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            plan.items = [item for item in plan.items if item.storage_index.fqn != "other"]
            return plan

    found = load(saved, {"plain": torch.zeros(5), "other": torch.zeros(5)}, planner=Some())
    assert torch.equal(found["plain"], torch.arange(5.0)) and not found["other"].any()


def test_a_planner_without_a_state_dict(saved: Path) -> None:
    """Whatever it requests, no holes may be left."""

    class Holes(Doubling):
        holes = True

        def create_local_plan(self) -> Any:
            plan = super().create_local_plan()
            if self.holes:
                plan.items = [item for item in plan.items if item.lengths != (2,)]
            self.kept = self.state_dict
            return plan

        def finish_plan(self, new_plan: Any) -> Any:
            del self.state_dict
            return new_plan

        def lookup_tensor(self, index: Any) -> torch.Tensor:
            return self.kept[index.fqn]

    with pytest.raises(
        CheckpointException, match=r"only 3 of the 4 elements of plain .* none of \(1,\) at \(0,\)"
    ):
        load(saved, {"plain": torch.zeros(5)}, planner=Holes())


def test_a_replicated_piece_is_not_a_contradiction(saved: Path) -> None:
    def twice(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["plain"].chunks
        chunks.append(chunks[0])

    edit(str(saved), twice)
    assert torch.equal(load(saved, {"plain": torch.zeros(5)})["plain"], torch.arange(5.0))
