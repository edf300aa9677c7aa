# SPDX-License-Identifier: Apache-2.0
"""Tensors that are more than their bytes: subclasses with few operators, sparse and quantized tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import return_and_correct_aliasing

from ckpt_fast import FastStorageReader, FastStorageWriter
from tests.helpers import run_ranks

aten = torch.ops.aten
ROWS = 8


class Scaled(torch.Tensor):
    """Codes with one scale per row, with no more operators than the optimizer states of torchao have."""

    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], *_: Any) -> Scaled:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        first, *others = args
        if func is aten.copy_.default:
            source = others[0]
            assert isinstance(first, Scaled) and isinstance(source, Scaled)
            first.codes.copy_(source.codes)
            first.scale.copy_(source.scale)
            return first
        if func is aten._to_copy.default:
            device = (kwargs or {}).get("device")
            return cls(first.codes.to(device), first.scale.to(device))
        if func is aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(first.codes, first.scale))
        if func is aten.slice.Tensor and others[0] == 0:
            return cls(first.codes[others[1] : others[2]], first.scale[others[1] : others[2]])
        if func is aten.view.default:  # for DTensor.from_local
            return cls(first.codes.view(others[0]), first.scale)
        if func is aten.is_pinned.default:
            return False
        raise NotImplementedError(f"{func} with {others}")

    def values(self) -> torch.Tensor:
        return self.codes.float() * self.scale[:, None]


torch.serialization.add_safe_globals([Scaled])


def scaled(fill: int | None = None, rows: int = ROWS) -> Scaled:
    codes = torch.arange(3 * rows, dtype=torch.int8) if fill is None else torch.full((3 * rows,), fill)
    return Scaled(codes.to(torch.int8).reshape(rows, 3), torch.arange(1.0, rows + 1))


WRITERS = {"ours": FastStorageWriter, "stock": dcp.FileSystemWriter}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_subclass_that_can_only_be_cut_along_rows(tmp_path: Path, writer: str) -> None:
    dcp.save({"s": scaled()}, storage_writer=WRITERS[writer](tmp_path))
    state = {"s": scaled(0)}
    dcp.load(state, storage_reader=FastStorageReader(tmp_path))
    assert torch.equal(state["s"].values(), scaled().values())


def sharded(fill: int | None = None) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = ROWS // dist.get_world_size()
    whole, begin = scaled(fill), rows * dist.get_rank()
    local = Scaled(whole.codes[begin : begin + rows].clone(), whole.scale[begin : begin + rows].clone())
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size((ROWS, 3)), stride=(3, 1)
    )


def save_shards(rank: int, root: str) -> None:
    for name, writer in WRITERS.items():
        dcp.save({"s": sharded()}, storage_writer=writer(os.path.join(root, name)))


def load_shards(rank: int, root: str) -> list[bool]:
    found = []
    for name in WRITERS:
        state = {"s": sharded(0)}
        dcp.load(state, storage_reader=FastStorageReader(os.path.join(root, name)))
        local: Any = state["s"].to_local()
        begin = rank * ROWS // dist.get_world_size()
        expected = scaled().values()[begin : begin + ROWS // dist.get_world_size()]
        found.append(torch.equal(local.values(), expected))
    return found


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 2), (2, 1), (1, 2)])
def test_a_sharded_subclass(tmp_path: Path, saved_on: int, loaded_on: int) -> None:
    run_ranks(save_shards, saved_on, str(tmp_path))
    assert run_ranks(load_shards, loaded_on, str(tmp_path)) == [[True, True]] * loaded_on


def sparse(kind: str) -> torch.Tensor:
    dense = torch.tensor([[0.0, 3, 0, 4], [5, 0, 0, 0], [0, 0, 0, 6], [7, 0, 8, 0]])
    if kind == "uncoalesced":
        places = torch.tensor([[0, 1, 1], [2, 0, 0]])
        return torch.sparse_coo_tensor(places, torch.tensor([3.0, 4, 5]), (4, 4))
    if kind == "hybrid":
        return torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 3), (3, 3))
    conversions = {
        "coo": dense.to_sparse_coo,
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
    }
    return conversions[kind]()


SPARSE = ["coo", "uncoalesced", "hybrid", "csr", "csc", "bsr"]


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("into", ["as many elements", "none"])
def test_sparse_tensors(tmp_path: Path, kind: str, into: str) -> None:
    dcp.save({"s": sparse(kind)}, storage_writer=FastStorageWriter(tmp_path))
    destination = sparse(kind) * 0 if into == "as many elements" else sparse(kind).clone().zero_()
    state = {"s": destination}
    dcp.load(state, storage_reader=FastStorageReader(tmp_path))
    assert state["s"] is destination and destination.layout == sparse(kind).layout
    assert torch.equal(destination.to_dense(), sparse(kind).to_dense())


def test_sparse_tensors_do_not_become_dense_ones(tmp_path: Path) -> None:
    dcp.save({"s": sparse("coo")}, storage_writer=FastStorageWriter(tmp_path))
    with pytest.raises(CheckpointException, match=r"s in .* of layout torch.sparse_coo, .* cannot be copied"):
        dcp.load({"s": torch.zeros(4, 4)}, storage_reader=FastStorageReader(tmp_path))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_optimizer_states_of_torchao(tmp_path: Path, name: str, writer: str) -> None:
    optim = pytest.importorskip("torchao.optim")

    def trained(seed: int) -> tuple[dict[str, Any], list[torch.Tensor]]:
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = getattr(optim, name)([weight])
        weight.square().sum().backward()
        optimizer.step()
        state = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
        return state, [value.dequantize() for value in state.values()]

    state, expected = trained(0)
    dcp.save(state, storage_writer=WRITERS[writer](tmp_path))
    loaded, _ = trained(1)
    dcp.load(loaded, storage_reader=FastStorageReader(tmp_path))
    assert all(torch.equal(a.dequantize(), b) for a, b in zip(loaded.values(), expected, strict=True))
