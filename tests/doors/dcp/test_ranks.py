# SPDX-License-Identifier: Apache-2.0
"""The torch DCP door on several ranks: FSDP2, resharding, each of torch's modes, and failing ranks."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from tests.doors.dcp import ranks as dcp_ranks
from tests.helpers import run_ranks
from tests.manifests import manifest_lies

needs_modes = pytest.mark.skipif(
    "use_collectives" not in inspect.signature(dcp.save).parameters, reason="torch knows no use_collectives"
)


@pytest.fixture(scope="module")
def saved_by_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not dcp_ranks.FSDP2_ON_CPU:
        pytest.skip("FSDP2 of this torch needs a GPU")
    root = tmp_path_factory.mktemp("by_4")
    run_ranks(dcp_ranks.save_with_all, 4, str(root))
    return root


@pytest.mark.parametrize("world_size", [4, pytest.param(2, marks=pytest.mark.long), 1])
def test_fsdp2_on_as_many_ranks_and_fewer(world_size: int, saved_by_4: Path) -> None:
    pairs = [(writer, reader) for writer in (*dcp_ranks.WRITERS, "async") for reader in dcp_ranks.READERS]
    results = run_ranks(dcp_ranks.load_all, world_size, str(saved_by_4))
    assert results == [{pair: [] for pair in pairs}] * world_size


@pytest.mark.skipif(not dcp_ranks.FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")
def test_fsdp2_on_more_ranks(tmp_path: Path) -> None:
    run_ranks(dcp_ranks.save_with_all, 2, str(tmp_path))
    results = run_ranks(dcp_ranks.load_all, 4, str(tmp_path))
    assert [wrong for result in results for wrong in result.values() if wrong] == []


def test_sidecar_names_the_files_of_all_ranks(saved_by_4: Path) -> None:
    for name, files in (("ours", 4), ("ours-2-files", 8), ("async", 4)):
        assert manifest_lies(saved_by_4 / name) == []
        assert len(list((saved_by_4 / name).glob("*.distcp"))) == files


@pytest.mark.skipif(
    "enable_plan_caching" not in inspect.signature(dcp.DefaultSavePlanner).parameters,
    reason="torch caches no plans",
)
def test_plans_cached_by_torch(tmp_path: Path) -> None:
    assert run_ranks(dcp_ranks.cached_plans, 2, str(tmp_path)) == [[[]] * 8] * 2


@pytest.mark.skipif("no_dist" not in inspect.signature(dcp.save).parameters, reason="torch knows no no_dist")
def test_one_rank_alone(tmp_path: Path) -> None:
    assert run_ranks(dcp_ranks.alone, 2, str(tmp_path)) == [[], []]


@needs_modes
def test_without_collectives(tmp_path: Path) -> None:
    """A rank must not remove what a faster one has already written."""
    assert run_ranks(dcp_ranks.without_collectives, 2, str(tmp_path)) == [[], []]


@needs_modes
def test_one_mode_ends_the_checkpoint_of_the_other(tmp_path: Path) -> None:
    data = ["__0_0.distcp", "__1_0.distcp"]
    by_rank = sorted([*data, "__0.metadata", "__1.metadata"])
    together = sorted([*data[:1], ".metadata"])
    expected = [by_rank, together, by_rank]
    assert run_ranks(dcp_ranks.modes_in_turn, 2, str(tmp_path)) == [expected, expected]


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    first, second = run_ranks(dcp_ranks.failing_write, 2, str(tmp_path))
    for sync, in_background, published, afterwards in (first, second):
        for text in (sync, in_background):
            assert "ranks:dict_keys([1])" in text
            assert f"CheckpointWriteError: open {tmp_path}/file1/below/__1_0.distcp" in text
            assert "Not a directory" in text
        assert (published, afterwards) == ("True", "[]")


def test_a_directory_that_cannot_be_prepared_fails_all(tmp_path: Path) -> None:
    for text in run_ranks(dcp_ranks.failing_preparation, 2, str(tmp_path)):
        assert f"cannot prepare the checkpoint directory {tmp_path}/file0" in text


def test_a_rank_that_cannot_copy_fails_all(tmp_path: Path) -> None:
    for text in run_ranks(dcp_ranks.failing_snapshot, 2, str(tmp_path)):
        assert "ranks:dict_keys([1])" in text
        assert "could not be copied to host memory" in text and "CKPT_FAST_HOST_BUFFER" in text
    assert not (tmp_path / ".metadata").exists()


def test_a_rank_that_reads_damaged_data_fails_all(tmp_path: Path) -> None:
    for text in run_ranks(dcp_ranks.failing_read, 2, str(tmp_path)):
        assert "ranks:dict_keys([1])" in text
        assert f"CheckpointCorruptError: w in {tmp_path}/__1_0.distcp" in text


def test_objects_of_ranks(tmp_path: Path) -> None:
    assert run_ranks(dcp_ranks.objects_of_ranks, 2, str(tmp_path)) == [[], []]


def test_flipped_bits_that_ranks_read_in_halves(tmp_path: Path) -> None:
    assert run_ranks(dcp_ranks.flipped_bits_read_in_halves, 2, str(tmp_path)) == [10, 10]
