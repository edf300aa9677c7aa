# SPDX-License-Identifier: Apache-2.0
"""Sharded state dicts of every kind through our door, compared with stock megatron-core on the same files."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)
from tests.helpers import RankError, run_ranks
from tests.interop.saved import needs_stock_lists
from tests.models import identical, megatron_on_cpu

from_rank_offsets = ShardedTensor.from_rank_offsets


def save(state: dict[str, Any], directory: str, **options: Any) -> None:
    os.makedirs(directory, exist_ok=True)
    job = torch_dist.start_save(state, directory, torch_dist.FastSaveStrategy(), **options)
    job.write()
    job.commit()


def filled(*shape: int, dtype: torch.dtype = torch.float32, start: int = 1) -> torch.Tensor:
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(start, start + count).reshape(shape).to(dtype)


# --- one process, no torch.distributed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    + [getattr(torch, name) for name in ("float8_e4m3fn", "uint16", "complex64") if hasattr(torch, name)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (2, 1, 4)], ids=str)
def test_dtypes_and_shapes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = filled(*shape, dtype=dtype)
    save({"t": from_rank_offsets("t", value)}, str(tmp_path))
    for destination in (torch.zeros(shape, dtype=dtype), None):
        entry = from_rank_offsets("t", torch.zeros(shape, dtype=dtype))
        entry.data = destination
        loaded = torch_dist.load({"t": entry}, str(tmp_path))
        assert identical(loaded["t"], value)
        # A tensor passed in is filled, not replaced.
        assert destination is None or identical(destination, value)


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor.t(),
        lambda tensor: tensor[:, ::2],
        lambda tensor: tensor[1:, 1:],
        lambda tensor: tensor.flip(0),
        lambda tensor: tensor[:1].expand(4, 6),
    ],
    ids=["transposed", "strided", "inner", "flipped", "expanded"],
)
def test_views_are_saved_and_filled_by_value(tmp_path: Path, view: Callable[[Any], torch.Tensor]) -> None:
    value = view(filled(4, 6))
    save({"t": from_rank_offsets("t", value)}, str(tmp_path))
    destination = torch.zeros(value.shape[::-1]).t()
    assert identical(torch_dist.load({"t": from_rank_offsets("t", destination)}, str(tmp_path))["t"], value)


def test_requires_grad_and_parameters(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(filled(3, 2))
    save({"p": from_rank_offsets("p", parameter)}, str(tmp_path))
    target = torch.nn.Parameter(torch.zeros(3, 2))
    loaded = torch_dist.load({"p": from_rank_offsets("p", target)}, str(tmp_path))
    assert identical(target.detach(), parameter.detach())
    assert not loaded["p"].requires_grad


def test_another_dtype_is_converted(tmp_path: Path) -> None:
    save({"t": from_rank_offsets("t", filled(3, 2) / 3)}, str(tmp_path))
    entry = from_rank_offsets("t", torch.zeros(3, 2, dtype=torch.bfloat16))
    assert identical(torch_dist.load({"t": entry}, str(tmp_path))["t"], (filled(3, 2) / 3).bfloat16())


def test_nesting_common_state_and_local_objects(tmp_path: Path) -> None:
    state = {
        "layers": {0: {"w": from_rank_offsets("w", filled(2))}, 1: {"kept": "common"}},
        "own": LocalNonpersistentObject({"of": "the process"}),
        "object": ShardedObject("o", {"any": [1, (2, 3)]}, (1,), (0,)),
        "number": 3,
    }
    save(state, str(tmp_path), content_metadata={"version": 1})
    scaffold = {
        "layers": {0: {"w": from_rank_offsets("w", torch.zeros(2))}},
        "own": LocalNonpersistentObject("mine"),
        "object": ShardedObject("o", None, (1,), (0,)),
    }
    loaded = torch_dist.load(scaffold, str(tmp_path))
    assert loaded["layers"][1] == {"kept": "common"}
    assert identical(loaded["layers"][0]["w"], filled(2))
    assert loaded["own"] == "mine"
    assert loaded["object"] == {"any": [1, (2, 3)]}
    assert (loaded["number"], loaded["content_metadata"]) == (3, {"version": 1})


def test_factories(tmp_path: Path) -> None:
    """One tensor in memory, two in the checkpoint, as in Megatron-Core's SwiGLU."""

    def factory(data: torch.Tensor) -> ShardedTensorFactory:
        def build(key: str, tensor: torch.Tensor, *_: Any) -> dict[str, Any]:
            return {
                name: from_rank_offsets(f"{key}.{name}", half)
                for name, half in zip("wv", tensor.chunk(2), strict=True)
            }

        return ShardedTensorFactory("fc1", data, build, lambda halves: torch.cat([halves["w"], halves["v"]]))

    save({"fc1": factory(filled(4, 2))}, str(tmp_path))
    loaded = torch_dist.load({"fc1": factory(torch.zeros(4, 2))}, str(tmp_path))
    assert identical(loaded["fc1"], filled(4, 2))
    index = torch_dist.FastLoadStrategy().load_tensors_metadata(str(tmp_path))
    assert index.keys() == {"fc1.w", "fc1.v"}


def test_prepended_axes(tmp_path: Path) -> None:
    """A stack of layers is one tensor in the checkpoint, with each layer as a piece."""
    state = {
        str(layer): from_rank_offsets("w", filled(2, 3, start=layer * 6), (0, layer, 3), prepend_axis_num=1)
        for layer in range(3)
    }
    save(state, str(tmp_path))
    whole = torch_dist.load({"w": from_rank_offsets("w", torch.zeros(3, 2, 3))}, str(tmp_path))
    assert identical(whole["w"], filled(3, 2, 3, start=0))
    last = from_rank_offsets("w", torch.zeros(2, 3), (0, 2, 3), prepend_axis_num=1)
    assert identical(torch_dist.load({"w": last}, str(tmp_path))["w"], filled(2, 3, start=12))


def test_shape_mismatch_where_it_is_allowed(tmp_path: Path) -> None:
    """Vocabularies are padded depending on the layout: padding that only one side has stays zero."""
    save({"v": from_rank_offsets("v", filled(5, 2), allow_shape_mismatch=True)}, str(tmp_path))
    longer = from_rank_offsets("v", torch.full((8, 2), 7.0), allow_shape_mismatch=True)
    expected = torch.cat([filled(5, 2), torch.zeros(3, 2)])
    assert identical(torch_dist.load({"v": longer}, str(tmp_path))["v"], expected)
    shorter = from_rank_offsets("v", torch.full((3, 2), 7.0), allow_shape_mismatch=True)
    assert identical(torch_dist.load({"v": shorter}, str(tmp_path))["v"], filled(5, 2)[:3])
    with pytest.raises(CheckpointMismatchError, match=r"v has shape \(5, 2\) .* but \(8, 2\)"):
        torch_dist.load({"v": from_rank_offsets("v", torch.zeros(8, 2))}, str(tmp_path))


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    entry = from_rank_offsets("t", filled(2))
    entry.data = None
    with pytest.raises(CheckpointMismatchError, match="t is to be saved but has no data"):
        save({"t": entry}, str(tmp_path))
    whole = {str(n): from_rank_offsets("t", filled(2), (0, n, 3)) for n in (0, 2)}
    with pytest.raises(CheckpointMismatchError, match=r"4 of the 6 elements of t \(6,\)"):
        save(whole, str(tmp_path))
    twice = {str(n): from_rank_offsets("t", filled(2)) for n in range(2)}
    with pytest.raises(CheckpointMismatchError, match=r"t at .* is written by two ranks"):
        save(twice, str(tmp_path))
    assert not dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path))


def test_objects_that_carry_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_ON_UNLOADABLE", "warn")
    save({"o": ShardedObject("o", print, (1,), (0,))}, str(tmp_path))
    with pytest.raises(UnsafeCheckpointError, match=r"(?s)o/shard_0_1 .*CKPT_FAST_ALLOW_PICKLE=1"):
        torch_dist.load({"o": ShardedObject("o", None, (1,), (0,))}, str(tmp_path))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere.*does not exist"):
        torch_dist.load({}, nowhere)
    save({"t": from_rank_offsets("t", filled(2))}, str(tmp_path / "c"))
    with pytest.raises(CheckpointMismatchError, match=r"has no o/shard_0_1"):
        torch_dist.load({"o": ShardedObject("o", None, (1,), (0,))}, str(tmp_path / "c"))
    (tmp_path / "c/metadata.json").write_text("{")
    with pytest.raises(CheckpointCorruptError, match=r"metadata\.json cannot be parsed"):
        torch_dist.load({}, str(tmp_path / "c"))


# --- ranks -----------------------------------------------------------------------------------------------


def grid(rank: int, shape: tuple[int, int] = (4, 6)) -> dict[str, Any]:
    """Return tensors sharded by columns, by rows and replicated, and one object per rank."""
    whole = filled(*shape)
    rows, columns = shape[0] // 2, shape[1] // 2
    return {
        "columns": from_rank_offsets(
            "columns", whole[:, rank * columns : (rank + 1) * columns].clone(), (1, rank, 2)
        ),
        "rows": from_rank_offsets("rows", whole[rank * rows : (rank + 1) * rows].clone(), (0, rank, 2)),
        "same": from_rank_offsets("same", whole.clone(), replica_id=rank),
        "object": ShardedObject("object", {"rank": rank}, (2,), (rank,)),
        "shared": ShardedObject("shared", [1, 2], (1,), (0,), replica_id=rank),
        "step": 5,
    }


def empty(state: dict[str, Any]) -> dict[str, Any]:
    """Return the scaffold that requests ``state``."""
    for entry in state.values():
        if isinstance(entry, ShardedTensor):
            entry.data.zero_()
        elif isinstance(entry, ShardedObject):
            entry.data = None
    state.pop("step", None)
    return state


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.data if isinstance(value, compat.ShardedBase) else value for key, value in state.items()
    }


def through_every_door(rank: int, root: str, parallel: bool) -> None:
    def strategy(base: Any) -> Any:
        return compat.FullyParallelSaveStrategyWrapper(base) if parallel else base

    paths = {name: os.path.join(root, name) for name in ("ours", "strategy", "stock")}
    if rank == 0:
        for path in paths.values():
            os.mkdir(path)
    torch.distributed.barrier()
    job = torch_dist.start_save(grid(rank), paths["ours"], strategy(torch_dist.FastSaveStrategy()))
    job.write()
    job.commit()
    # Stock code with our strategy needs no CUDA; with its own it does.
    dist_checkpointing.save(grid(rank), paths["strategy"], strategy(torch_dist.FastSaveStrategy()))
    with megatron_on_cpu():
        stock = compat.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(grid(rank), paths["stock"], strategy(stock))

    for path in paths.values():
        for load in (
            torch_dist.load,
            dist_checkpointing.load,
            lambda *args: dist_checkpointing.load(*args, torch_dist.FastLoadStrategy()),
        ):
            assert identical(load(empty(grid(rank)), path), plain(grid(rank))), path
    described = [describe(strategy_class(), path) for path in paths.values() for strategy_class in LOADERS]
    assert described == described[:1] * len(described)


LOADERS = (torch_dist.FastLoadStrategy, compat.TorchDistLoadShardedStrategy)


def describe(strategy: Any, path: str) -> Any:
    """Return the strategy's description of a checkpoint, without the common state, which stock may list."""
    tensors = strategy.load_tensors_metadata(path)
    everything = strategy.load_sharded_metadata(path)
    return (
        {key: (entry.key, entry.global_shape, entry.dtype, entry.data) for key, entry in tensors.items()},
        sorted(key for key in everything if not key.startswith("common_state")),
    )


@needs_stock_lists
@pytest.mark.parametrize("parallel", [False, True], ids=["plain", "parallel"])
def test_every_door_on_two_ranks(tmp_path: Path, parallel: bool) -> None:
    run_ranks(through_every_door, 2, str(tmp_path), parallel)


def reshard(rank: int, directory: str) -> None:
    """Load columns as rows, and rows as columns."""
    save(grid(rank), directory)
    whole = filled(4, 6)
    crossed = {
        "rows": from_rank_offsets("rows", torch.zeros(4, 3), (1, rank, 2)),
        "columns": from_rank_offsets("columns", torch.zeros(2, 6), (0, rank, 2)),
    }
    loaded = torch_dist.load(crossed, directory)
    assert identical(loaded["rows"], whole[:, 3 * rank : 3 * rank + 3].clone())
    assert identical(loaded["columns"], whole[2 * rank : 2 * rank + 2])


def test_another_cut_of_the_same_tensors(tmp_path: Path) -> None:
    run_ranks(reshard, 2, str(tmp_path))


def claim_the_same(rank: int, directory: str) -> None:
    save({"t": from_rank_offsets("t", filled(2))}, directory)


def test_two_main_replicas_are_refused_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"nothing was saved to .*key='t'") as caught:
        run_ranks(claim_the_same, 2, str(tmp_path))
    assert caught.value.errors == {0: "CheckpointMismatchError", 1: "CheckpointMismatchError"}
    assert not (tmp_path / "metadata.json").exists()


def save_what_one_rank_cannot(rank: int, directory: str) -> None:
    entry = from_rank_offsets("t", filled(2), (0, rank, 2))
    if rank == 1:
        entry.data = torch.empty(2, device="meta")
    save({"t": entry}, directory)


def test_a_rank_that_cannot_stage_stops_all(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1:") as caught:
        run_ranks(save_what_one_rank_cannot, 2, str(tmp_path))
    assert set(caught.value.errors) == {0, 1}
    assert not (tmp_path / "metadata.json").exists()


STRICTNESS = {
    "assume_ok_unexpected": None,
    "log_unexpected": None,
    "log_all": None,
    "ignore_all": None,
    "return_unexpected": ({"extra"}, set()),
    "return_all": ({"extra"}, {"columns", "object", "shared"}),
}


def ask_for_less_and_more(rank: int, directory: str, strict: str) -> Any:
    """Request ``rows`` and ``same``, which exist, and ``extra``, which does not; omit the rest."""
    if rank == 0 and not os.path.exists(directory):
        os.mkdir(directory)
    torch.distributed.barrier()
    save(grid(rank), directory)
    wanted = {key: entry for key, entry in empty(grid(rank)).items() if key in ("rows", "same")}
    if strict != "assume_ok_unexpected":
        wanted["extra"] = from_rank_offsets("extra", torch.zeros(2), replica_id=rank)
    results = [
        load(dict(wanted), directory, strict=strict) for load in (torch_dist.load, dist_checkpointing.load)
    ]
    assert identical(results[0], results[1])
    return results[0][1:] if isinstance(results[0], tuple) else None


@needs_stock_lists
@pytest.mark.parametrize("strict", STRICTNESS)
def test_strictness_means_what_it_means_in_stock(tmp_path: Path, strict: str) -> None:
    expected = STRICTNESS[strict]
    for found in run_ranks(ask_for_less_and_more, 2, str(tmp_path / "c"), strict):
        if expected is None:
            assert found is None
        else:
            missing, unexpected = found
            assert (unexpected, missing) == expected


@needs_stock_lists
def test_plain_helpers_of_stock_read_ours(tmp_path: Path) -> None:
    run_ranks(read_with_helpers, 1, str(tmp_path))


def read_with_helpers(rank: int, directory: str) -> None:
    save({"t": from_rank_offsets("t", filled(3, 2)), "step": 4}, directory, content_metadata={"a": 1})
    assert identical(dist_checkpointing.load_plain_tensors(directory)["t"], filled(3, 2))
    assert dist_checkpointing.load_common_state_dict(directory)["step"] == 4
    assert dist_checkpointing.load_content_metadata(directory) == {"a": 1}


def test_nothing_is_said_to_be_deprecated(tmp_path: Path) -> None:
    """Megatron-Core from 0.19 on warns of common.pt, which is there on purpose."""
    assert run_ranks(deprecations, 1, str(tmp_path)) == [[]]


def deprecations(rank: int, directory: str) -> list[str]:
    heard: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listening = Listening()
    logging.getLogger().addHandler(listening)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save({"t": from_rank_offsets("t", filled(3, 2)), "step": 4}, directory)
            wanted = {"t": from_rank_offsets("t", filled(3, 2))}
            assert dist_checkpointing.load(wanted, directory, FastLoadStrategy())["step"] == 4
            heard += [str(each.message) for each in caught]
    finally:
        logging.getLogger().removeHandler(listening)
    return [message for message in heard if "deprecated" in message]
