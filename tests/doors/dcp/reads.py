# SPDX-License-Identifier: Apache-2.0
"""What the ranks of ``test_coverage`` and ``test_refusals`` do, and the planners they use."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckpt_fast
from ckpt_fast import FastStorageReader, native
from ckpt_fast.doors.dcp.together import load_together
from ckpt_fast.errors import CheckpointError
from tests.doors.dcp.states import differences
from tests.helpers import memory_limit

ROWS = 8


def state(fill: float | None = None) -> dict[str, Any]:
    """Return tensors sharded in every way that two ranks, or one, can."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def values(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        tensor = torch.arange(1.0, count + 1).reshape(shape) if fill is None else torch.full(shape, fill)
        return tensor + 1000 * len(shape) * (fill is None)

    return {
        "rows": distribute_tensor(values(ROWS, 3), mesh, [Shard(0)]),
        "columns": distribute_tensor(values(3, 6), mesh, [Shard(1)]),
        "few": distribute_tensor(values(1, 2), mesh, [Shard(0)]),
        "plain": values(5),
        "scalar": values(),
        "none": values(0, 3),
        "step": 17 if fill is None else -1,
    }


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    return {key: whole(child) for key, child in value.items()} if isinstance(value, dict) else value


def save_stock(rank: int, directory: str) -> None:
    dcp.save(state(), checkpoint_id=directory)


def edit(directory: str, change: Callable[[Metadata], None]) -> None:
    """Rewrite ``.metadata`` as a stock writer would."""
    path = Path(directory) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def lose(metadata: Metadata, fqn: str, number: int) -> None:
    """Remove one piece of a tensor from the metadata, as if it had never existed."""
    chunk = metadata.state_dict_metadata[fqn].chunks.pop(number)
    for index in list(metadata.storage_data):
        if index.fqn == fqn and index.offset == chunk.offsets:
            del metadata.storage_data[index]


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except CheckpointException as error:
        return str(error)
    return "no error"


def load(directory: str, into: dict[str, Any], **options: Any) -> None:
    dcp.load(into, storage_reader=FastStorageReader(directory), **options)


def load_without_a_piece(rank: int, directory: str, partial: bool) -> tuple[str, str]:
    """Return the errors of a load that lacks a piece of the second rank, and of a complete one."""
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
    into = state(-7.0)
    if partial:
        into["unheard of"] = torch.zeros(3)
    error = error_of(lambda: load(directory, into, planner=planner))
    rest = {key: value for key, value in state(-7.0).items() if key != "rows"}
    right = error_of(lambda: load(directory, rest))
    wrong = differences({key: whole(state()[key]) for key in rest}, whole(rest))
    return error, right if right != "no error" else str(wrong)


class Views:
    """Makes ``.metadata`` a different file on one rank."""

    def __init__(self, directory: str, rank: int) -> None:
        self.reader = FastStorageReader(directory)
        read = self.reader.read_metadata
        other = f"{directory}-other"

        def read_other(*args: Any, **options: Any) -> Metadata:
            self.reader._path = other
            try:
                return read(*args, **options)
            finally:
                self.reader._path = directory

        if rank == 1:
            self.reader.read_metadata = read_other  # type: ignore[method-assign]


def load_with_two_views(rank: int, directory: str) -> str:
    return error_of(lambda: dcp.load(state(-7.0), storage_reader=Views(directory, rank).reader))


class Replacing(dcp.DefaultLoadPlanner):
    """Lets another save replace the checkpoint during the load."""

    def __init__(self, directory: str, replace: bool) -> None:
        super().__init__()
        self.path, self.replace = Path(directory) / ".metadata", replace

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        if self.replace and read_item.storage_index.fqn == "plain":
            content = self.path.read_bytes()
            self.path.unlink()
            self.path.write_bytes(content)


def load_while_replaced(rank: int, directory: str) -> str:
    return error_of(lambda: load(directory, state(-7.0), planner=Replacing(directory, rank == 0)))


class Doubling(dcp.DefaultLoadPlanner):
    """Requests the first row of a tensor twice, as a buggy planner might, and never the last."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = []
        for item in plan.items:
            if item.storage_index.fqn == "plain":
                first = dataclasses.replace(item, lengths=torch.Size([2]))
                second = dataclasses.replace(
                    item,
                    dest_offsets=torch.Size([1]),
                    storage_offsets=torch.Size([1]),
                    lengths=torch.Size([3]),
                )
                items += [first, second]
            else:
                items.append(item)
        return dataclasses.replace(plan, items=items)


def flip_every_bit(rank: int, directory: str, implementation: str, first: int, step: int) -> dict[str, Any]:
    """Load with every bit of ``.metadata`` flipped in turn; return the outcomes and what was wrong."""
    path = Path(directory) / ".metadata"
    content = path.read_bytes()
    expected = whole(state())
    outcomes: dict[str, Any] = {"error": 0, "same": 0, "wrong": []}
    logging.disable()  # torch reports each .metadata that it cannot read
    with native.using(implementation), memory_limit(2 << 30):
        for bit in range(first, 8 * len(content), step):
            _show(rank, path, content, bit)
            into = state(-7.0)
            try:
                load(directory, into)
            except BaseException:
                outcomes["error"] += 1
                continue
            wrong = differences(expected, whole(into))
            outcomes["same"] += not wrong
            outcomes["wrong"] += [(bit, wrong)] if wrong else []
        _show(rank, path, content, None)
    logging.disable(logging.NOTSET)
    return outcomes


def _show(rank: int, path: Path, content: bytes, bit: int | None) -> None:
    """Show all ranks the file with this bit flipped."""
    dist.barrier()
    if rank == 0:
        damaged = bytearray(content)
        if bit is not None:
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
    dist.barrier()


def copy_with_another_metadata(directory: str) -> None:
    """Make a sibling directory whose ``.metadata`` differs in one byte after the pickle."""
    other = f"{directory}-other"
    os.makedirs(other)
    (Path(other) / ".metadata").write_bytes((Path(directory) / ".metadata").read_bytes() + b" ")


def load_what_one_rank_cannot(rank: int, directory: str, door: str, wrong: str) -> tuple[str, list[str]]:
    """Load what fits on rank 0 only; return the error, and what it has changed of this rank's values.

    Doors: "direct" for ``ckpt_fast.load``, "planned" for ``load_together``, "torch" for ``dcp.load``.
    """
    into = state(-7.0)
    if rank == 1 and wrong == "a shape":
        into["plain"] = torch.full((6,), -7.0)
    elif rank == 1 and wrong == "a name":
        into["unheard of"] = torch.full((2,), -7.0)
    before = {key: _own(value) for key, value in into.items()}
    doors: dict[str, Callable[[], Any]] = {
        "direct": lambda: ckpt_fast.load(into, directory),
        "planned": lambda: load_together(into, FastStorageReader(directory), dcp.DefaultLoadPlanner()),
        "torch": lambda: load(directory, into),
    }
    try:
        doors[door]()
        error = "no error"
    except (CheckpointError, CheckpointException) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, differences(before, {key: _own(value) for key, value in into.items()})


def _own(value: Any) -> Any:
    """Return a copy of this rank's part of a value."""
    return copy.deepcopy(value.to_local() if isinstance(value, DTensor) else value)
