# SPDX-License-Identifier: Apache-2.0
"""Factories of every kind load through our strategy as through stock megatron-core's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.glu.factory import interleaved
from tests.doors.megatron.test_torch_dist import save
from tests.helpers import run_ranks
from tests.interop.saved import needs_stock_lists
from tests.models import megatron_on_cpu

ROWS = torch.arange(1.0, 25).reshape(6, 4)
Merge = Callable[[Any], Any]


def halves(
    merge: Merge, data: torch.Tensor, copies: bool = False, rank: int = 0, ranks: int = 1
) -> ShardedTensorFactory:
    """Return a factory that splits a rank's rows in two, as views or copies."""

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                key,
                piece.clone() if copies else piece,
                (0, 2 * rank + number, 2 * ranks),
                replica_id=replica_id,
            )
            for number, piece in enumerate(data.chunk(2))
        ]

    return ShardedTensorFactory("w", data, build, merge)


def swiglu(data: torch.Tensor) -> ShardedTensorFactory:
    return apply_swiglu_sharded_factory(ShardedTensor.from_rank_offsets("w", data), ())


def sections(data: torch.Tensor) -> ShardedTensorFactory:
    mixer = pytest.importorskip("megatron.core.ssm.mamba_mixer", exc_type=ImportError)
    return mixer._split_tensor_factory(
        ShardedTensor.from_rank_offsets("w", data), [1, 3, 2], ["a", "b", "c"], 0
    )


@functools.wraps(swiglu(ROWS).merge_fn)
def disguised(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Return a function with the name of Megatron-Core's that does more."""
    return torch.cat(pieces) * 2


MERGES: dict[str, Merge] = {
    "joins": torch.cat,
    "swaps": lambda pieces: torch.cat(pieces[::-1]),
    "scales": lambda pieces: torch.cat(pieces) * 3,
    "casts": lambda pieces: torch.cat(pieces).double(),
    "reshapes": lambda pieces: torch.cat(pieces).reshape(3, 8),
    "stacks": torch.stack,
    "takes one": lambda pieces: pieces[1],
    "names them": lambda pieces: {"first": pieces[0], "second": pieces[1]},
    "disguised": disguised,
    "partial": functools.partial(lambda factor, pieces: torch.cat(pieces) * factor, 5),
}


def loaded(load: Callable[..., Any], factory: ShardedTensorFactory, directory: Path) -> Any:
    return load({"w": factory}, str(directory))["w"]


def merged(rank: int, ranks: int, root: str) -> dict[str, list[bool]]:
    """For every merge, with views and copies: whether ours and stock return its result for the pieces."""
    right: dict[str, list[bool]] = {}
    mine = ROWS + 100 * rank
    for name, merge in MERGES.items():
        directory, expected = f"{root}/{name}", merge(list(mine.chunk(2)))
        save({"w": halves(merge, mine, rank=rank, ranks=ranks)}, directory)
        for copies in (False, True):
            for load in (torch_dist.load, compat.dist_checkpointing.load):
                factory = halves(merge, torch.zeros_like(mine), copies, rank, ranks)
                with megatron_on_cpu():
                    value = loaded(load, factory, Path(directory))
                right.setdefault(name, []).append(same(expected, value))
    return right


def same(expected: Any, value: Any) -> bool:
    if isinstance(expected, dict):
        return isinstance(value, dict) and all(torch.equal(value[key], expected[key]) for key in expected)
    return (value.dtype, value.shape) == (expected.dtype, expected.shape) and torch.equal(value, expected)


@needs_stock_lists
@pytest.mark.parametrize("ranks", [1, 2])
def test_merge_is_called(ranks: int, tmp_path: Path) -> None:
    for right in run_ranks(merged, ranks, ranks, str(tmp_path)):
        assert right == {name: [True] * 4 for name in MERGES}


@pytest.mark.parametrize("make", [swiglu, sections])
def test_what_megatron_core_only_joins_stays_in_place(
    make: Callable[[torch.Tensor], ShardedTensorFactory], tmp_path: Path
) -> None:
    assert compat.only_joins(make(ROWS).merge_fn)
    save({"w": make(ROWS)}, str(tmp_path))
    into = torch.nn.Parameter(torch.zeros_like(ROWS))
    value = loaded(torch_dist.load, make(into), tmp_path)
    assert value.data_ptr() == into.data_ptr() and torch.equal(value, ROWS)
    assert not value.requires_grad
    apart = torch.zeros(4, 6).t()  # its pieces are not contiguous
    assert torch.equal(loaded(torch_dist.load, make(apart), tmp_path), ROWS)


def test_pieces_in_another_order_are_joined_so(tmp_path: Path) -> None:
    """Megatron-Core's merge, with someone else's build function that returns the pieces in reverse order."""
    merge = swiglu(ROWS).merge_fn

    def build(key: str, data: torch.Tensor, replica_id: Any, _: Any) -> list[ShardedTensor]:
        pieces = [(0, data[:3]), (1, data[3:])]
        return [
            ShardedTensor.from_rank_offsets(key, piece, (0, number, 2), replica_id=replica_id)
            for number, piece in reversed(pieces)
        ]

    save({"w": halves(merge, ROWS)}, str(tmp_path))
    value = loaded(torch_dist.load, ShardedTensorFactory("w", torch.zeros_like(ROWS), build, merge), tmp_path)
    assert torch.equal(value, ROWS.roll(3, 0))


@pytest.mark.parametrize("function", [torch.cat, MERGES["swaps"], disguised, MERGES["partial"], None])
def test_only_megatron_cores_own_are_known(function: Any) -> None:
    assert not compat.only_joins(function)


def test_interleaved_rows_of_a_factory_that_does_more(tmp_path: Path) -> None:
    """The merge gets rows in the checkpoint's order, and its result is interleaved."""
    save({"w": halves(torch.cat, ROWS)}, str(tmp_path))
    factory = interleaved(halves(MERGES["scales"], torch.zeros_like(ROWS)), 3)
    assert factory.in_place() is factory
    assert torch.equal(loaded(torch_dist.load, factory, tmp_path), ROWS * 3)
