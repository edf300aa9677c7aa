# SPDX-License-Identifier: Apache-2.0
"""Our strategies, called by Megatron-Core's own code: options, removal, and what is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

from ckpt_fast import FastLoadStrategy, FastSaveStrategy, compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.errors import CheckpointMismatchError
from tests.helpers import RankError, run_ranks
from tests.interop.saved import needs_stock_lists
from tests.manifests import find_damage
from tests.models import megatron_on_cpu
from tests.trainer.training import error_of

from_rank_offsets = ShardedTensor.from_rank_offsets


def state(rank: int, filled: bool = True) -> dict[str, Any]:
    value = float(rank + 1) if filled else 0.0
    return {
        "kept": from_rank_offsets("kept", torch.full((3,), value), (0, rank, 2)),
        "extra.a": from_rank_offsets("extra.a", torch.full((5,), value), (0, rank, 2)),
        "extra.b": from_rank_offsets("extra.b", torch.full((2,), 7.0 if filled else 0.0), replica_id=rank),
        "extra.o": ShardedObject("extra.o", rank if filled else None, (2,), (rank,)),
    }


def save_separately(rank: int, root: str, hint: str | None) -> None:
    dist_checkpointing.save(state(rank), root, FastSaveStrategy(separation_hint=hint))
    with megatron_on_cpu():
        wrapper = FullyParallelLoadStrategyWrapper(FastLoadStrategy())
        loaded = dist_checkpointing.load(state(rank, filled=False), root, wrapper)
    assert loaded["kept"].tolist() == [rank + 1.0] * 3
    assert loaded["extra.a"].tolist() == [rank + 1.0] * 5
    assert (loaded["extra.b"].tolist(), loaded["extra.o"]) == ([7.0, 7.0], rank)


def files(root: Path) -> set[str]:
    return {path.name for path in root.glob("*.distcp")}


@needs_stock_lists
@pytest.mark.parametrize("hint", ["extra", None])
def test_tensors_can_be_removed(tmp_path: Path, hint: str | None) -> None:
    """If they have files of their own, the files go; otherwise, only their entries in the metadata."""
    run_ranks(save_separately, 2, str(tmp_path), hint)
    common = {"__0_0.distcp", "__1_0.distcp"}
    if hint is not None:
        assert files(tmp_path) > {"extra__0_1.distcp", "extra__1_1.distcp"}
    FastLoadStrategy().remove_sharded_tensors(str(tmp_path), "extra")
    assert files(tmp_path) == common or hint is None
    assert not list(tmp_path.glob("*.partial"))
    assert find_damage(str(tmp_path)) == []
    for strategy in (FastLoadStrategy(), compat.TorchDistLoadShardedStrategy()):
        found = strategy.load_sharded_metadata(str(tmp_path))
        assert {key for key in found if not key.startswith("common_state")} == {"kept"}
    run_ranks(load_kept, 2, str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    FastLoadStrategy().remove_sharded_tensors(str(tmp_path), "no such")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def load_kept(rank: int, root: str) -> None:
    for options in ({}, {"sharded_strategy": FastLoadStrategy()}):
        wanted = {"kept": state(rank, filled=False)["kept"]}
        assert dist_checkpointing.load(wanted, root, **options)["kept"].tolist() == [rank + 1.0] * 3
    with pytest.raises(CheckpointMismatchError, match=r"has no extra\.a"):
        wanted = {"extra.a": state(rank)["extra.a"]}
        dist_checkpointing.load(wanted, root, FastLoadStrategy(), validate_access_integrity=False)


def test_arguments_are_those_of_the_stock_strategies() -> None:
    for ours, stock in (
        (FastSaveStrategy, compat.TorchDistSaveShardedStrategy),
        (FastLoadStrategy, compat.TorchDistLoadShardedStrategy),
    ):
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(stock.__init__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        if "stream_ckpt_dequant" in defaults:
            assert ours(*defaults.values()).stream_ckpt_dequant is False
        built = ours(**defaults)
        assert {name: getattr(built, name) for name in ("thread_count",) if name in defaults} == {
            name: defaults[name] for name in ("thread_count",) if name in defaults
        }
    assert FastSaveStrategy("torch_dist", 1, True, 3).writers == 3
    with pytest.raises(TypeError, match="no_such_option"):
        FastSaveStrategy(no_such_option=1)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"backend": "zarr"}, r"'torch_dist', version 1; asked for 'zarr', version 1"),
        ({"version": 2}, "version 2"),
        ({"keep_only_main_replica": False}, "keep_only_main_replica=False is not available"),
    ],
    ids=["backend", "version", "replicas"],
)
def test_what_cannot_be_written_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FastSaveStrategy(**arguments)


def test_a_checkpoint_of_another_backend_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(
        json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1})
    )
    with pytest.raises(CheckpointMismatchError, match=r"written with the backend 'zarr'; only 'torch_dist'"):
        FastLoadStrategy().load({}, str(tmp_path))


def numbered(number: float) -> dict[str, Any]:
    return {"w": from_rank_offsets("w", torch.full((3,), number)), "iteration": number}


def save_over(rank: int, root: str) -> tuple[str, str, list[float]]:
    """Save, and let a second save get no further than to Megatron-Core's own ``common.pt``.

    Returns:
        The error of a load, and what it has made of a tensor.
    """
    with megatron_on_cpu():
        dist_checkpointing.save(numbered(1.0), root, FastSaveStrategy())
        torch.save({"iteration": 2.0}, Path(root, "common.pt"))
        wanted = numbered(-1.0)
        tensor = wanted["w"].data
        error = error_of(lambda: dist_checkpointing.load(wanted, root, FastLoadStrategy())["iteration"])
    return (*error, tensor.tolist())


def test_a_common_state_of_another_save_is_refused(tmp_path: Path) -> None:
    """Megatron-Core before 0.19 replaces it before it asks the strategy to save the rest."""
    ((kind, text, tensor),) = run_ranks(save_over, 1, str(tmp_path))
    assert kind == "CheckpointCorruptError" and "common.pt is damaged, or of another save" in text
    assert tensor == [-1.0] * 3


def save_with_the_wrong_object(rank: int, root: str) -> list[str]:
    messages = []
    for save in (True, False):
        try:
            if save:
                torch_dist.start_save(state(rank), root, FastLoadStrategy())
            else:
                torch_dist.load(state(rank), root, strategy=FastSaveStrategy())
        except TypeError as error:
            messages.append(str(error))
    return messages


def test_the_wrong_class_is_named(tmp_path: Path) -> None:
    (messages,) = run_ranks(save_with_the_wrong_object, 1, str(tmp_path))
    assert "takes a FastSaveStrategy" in messages[0] and "got a FastLoadStrategy" in messages[0]
    assert "takes a FastLoadStrategy" in messages[1] and "got a FastSaveStrategy" in messages[1]


def save_what_one_rank_cannot(rank: int, root: str) -> None:
    mine = state(rank)
    if rank == 1:
        mine["kept"].data = None
    dist_checkpointing.save(mine, root, FastSaveStrategy())


def test_a_rank_without_data_stops_all(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1: kept is to be saved but has no data") as caught:
        run_ranks(save_what_one_rank_cannot, 2, str(tmp_path))
    assert caught.value.errors == {0: "CheckpointMismatchError", 1: "CheckpointMismatchError"}
    assert not (tmp_path / "metadata.json").exists()
