# SPDX-License-Identifier: Apache-2.0
"""Entries with interleaved rows: what they build and merge, by copying and in place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu import factory as glu_factory
from ckpt_fast.glu.factory import RowShard, interleaved
from ckpt_fast.glu.model import _deinterleave_glu_tensor, _interleave_glu_tensor
from ckpt_fast.jobs.report import SaveReport

K = 4
# How expert, layer and tensor-parallel axes are arranged around the rows of an fc1 weight.
PLACES = {
    "dense": ((), (0, 0, 1)),
    "tensor parallel": ((), (0, 1, 2)),
    "expert": (((0, 3, 8),), (1, 0, 1)),
    "layer and expert, tensor parallel": (((0, 1, 2), (1, 3, 8)), (2, 1, 2)),
}


def entry(data: torch.Tensor, place: str, singleton: bool | None) -> Any:
    """Return a factory as megatron-core's MLPs build it; with None, the ShardedTensor itself."""
    offsets, rows = PLACES[place]
    tensor = compat.ShardedTensor.from_rank_offsets(
        "experts.linear_fc1.weight", data, *offsets, rows, replica_id=(0, 0, 0), prepend_axis_num=len(offsets)
    )
    return tensor if singleton is None else apply_swiglu_sharded_factory(tensor, offsets, singleton)


def built(factory: Any) -> list[Any]:
    pieces = factory.build()
    return pieces if isinstance(pieces, list) else [pieces]


def weight(width: int = 3) -> torch.Tensor:
    return torch.arange(16.0 * K * width).reshape(-1, width)


@pytest.mark.parametrize("singleton", [None, False, True], ids=["tensor", "factory", "singleton"])
@pytest.mark.parametrize("place", PLACES)
def test_the_same_pieces_as_without_interleaving(place: str, singleton: bool | None) -> None:
    data = weight()
    plain = entry(_deinterleave_glu_tensor(data, K), place, singleton)
    expected = [plain] if singleton is None else plain.build()
    factory = interleaved(entry(data, place, singleton), K)
    # As an optimizer describes a moment of the parameter.
    moment = dataclasses.replace(factory, key=f"optimizer.{factory.key}", data=data.double())
    for prefix, described in (("", factory), ("optimizer.", moment)):
        copies, views = built(described), built(described.in_place())
        assert all(isinstance(view, RowShard) for view in views) and len(copies) == len(views)
        for copy, view, piece in zip(copies, views, expected, strict=True):
            assert torch.equal(copy.data, piece.data)
            assert torch.equal(view.rows.reshape(view.local_shape), piece.data)
            assert view.rows.untyped_storage().data_ptr() == described.data.untyped_storage().data_ptr()
            for each in (copy, view):
                assert (each.key, each.global_shape) == (prefix + piece.key, piece.global_shape)
                assert (each.global_offset, each.local_shape) == (piece.global_offset, piece.local_shape)
                assert (each.replica_id, each.dtype) == (piece.replica_id, described.data.dtype)
            assert view.without_data() == copy.without_data()
            assert type(view.without_data()) is compat.ShardedTensor
        loaded = copies[0].data if singleton is None else [copy.data for copy in copies]
        assert torch.equal(described.merge_fn(loaded), described.data)
        assert described.in_place().merge_fn(None) is described.data


def test_what_cannot_be_seen_in_place_is_copied() -> None:
    """A builder that does more than split rows, and data that only torch can read."""

    def transposed(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> list[Any]:
        return [compat.ShardedTensor.from_rank_offsets(f"{key}.{n}", data.t()) for n in range(2)]

    factory = interleaved(compat.ShardedTensorFactory("fc1", weight(), transposed, torch.cat), K)
    assert factory.in_place() is factory
    assert torch.equal(factory.build()[0].data, _deinterleave_glu_tensor(weight(), K).t())
    rows = compat.ShardedTensor.from_rank_offsets("fc1", torch.zeros(8, 0))
    empty = interleaved(rows, K)
    assert empty.in_place() is empty


@pytest.mark.parametrize("rows", [6, 4 * K + K])
def test_rows_that_cannot_be_paired_are_refused(rows: int) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"linear_fc1\.weight: dim 0 of shape"):
        interleaved(entry(torch.zeros(rows, 3), "dense", None), K)


def test_cut_optimizer_state_is_refused() -> None:
    factory = interleaved(entry(weight(), "dense", False), K)
    cut = dataclasses.replace(factory, data=torch.zeros(7), flattened_range=slice(0, 7))
    with pytest.raises(CheckpointMismatchError, match="fully_reshardable"):
        cut.build()


def _save(state: dict[str, Any], directory: str) -> SaveReport:
    job = torch_dist.start_save(state, directory, torch_dist.FastSaveStrategy())
    job.write()
    return job.commit()


@pytest.mark.parametrize("implementation", ["engine", "fallback"])
def test_no_copy_on_the_way_to_disk_and_back(
    tmp_path: Path, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_NATIVE", "1" if implementation == "engine" else "0")
    data, zeros = torch.randn(64 * K, 256), torch.zeros(64 * K, 256)
    directory = str(tmp_path)

    def state(values: torch.Tensor) -> dict[str, Any]:
        return {"model": {"w": interleaved(entry(values, "dense", False), K)}}

    with mock.patch.object(glu_factory, "permute_rows", side_effect=AssertionError("a copy")):
        report = _save(state(data), directory)
        loaded = torch_dist.load(state(zeros), directory)["model"]["w"]
    assert report.host_memory_allocated == 0
    assert loaded is zeros and torch.equal(zeros, data)
    stored = torch_dist.load({"w": entry(torch.zeros_like(data), "dense", None)}, directory)["w"]
    assert torch.equal(stored, _deinterleave_glu_tensor(data, K))


@pytest.mark.parametrize("saved_k, loaded_k", [(4, 2), (2, 16), (None, 4), (4, None), (1, 32)])
def test_pieces_of_other_ranks_fill_any_interleaving(
    tmp_path: Path, saved_k: int | None, loaded_k: int | None
) -> None:
    """Two tensor-parallel ranks' halves, saved as one checkpoint, into one rank's weight, and the reverse."""
    gate, up = torch.randn(2, 64, 300).unbind()

    def state(ranks: int, k: int | None, fill: bool) -> tuple[dict[str, Any], list[torch.Tensor]]:
        entries, memory = {}, []
        for rank in range(ranks):
            rows = torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
            data = rows if k is None else _interleave_glu_tensor(rows, k)
            memory.append(data if fill else torch.zeros_like(data))
            tensor = compat.ShardedTensor.from_rank_offsets("fc1", memory[-1], (0, rank, ranks))
            factory = apply_swiglu_sharded_factory(tensor, ())
            entries[f"rank {rank}"] = factory if k is None else interleaved(factory, k)
        return entries, memory

    for saving, loading in ((2, 1), (1, 2)):
        directory = tmp_path / f"{saving} to {loading}"
        directory.mkdir()
        _save(state(saving, saved_k, True)[0], str(directory))
        wanted, memory = state(loading, loaded_k, False)
        loaded = torch_dist.load(wanted, str(directory))
        _, expected = state(loading, loaded_k, True)
        for rank in range(loading):
            assert torch.equal(loaded[f"rank {rank}"], expected[rank])
            assert loaded_k is None or torch.equal(memory[rank], expected[rank])
