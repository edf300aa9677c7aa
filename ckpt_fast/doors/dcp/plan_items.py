# SPDX-License-Identifier: Apache-2.0
"""Between the save plans of torch DCP and the shards and items of the pipeline."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_fast.doors.dcp.planning.columns import OwnPart
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.types import BlockDigests, FileRecord, ObjectShard, RankRecord, Shard, TensorShard
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.objects import require_loadable, unsaved
from ckpt_fast.pipeline.save.plan import require_values


class _Written(NamedTuple):
    """Travels to the coordinator as a write result's storage data: the item, and what is for the manifest.

    The digests are those of all items of the rank; its first result brings them.
    """

    info: _StorageInfo
    file: FileRecord
    digests: list[BlockDigests]


def planned_nbytes(plan: SavePlan) -> int:
    """Bytes of the tensors in a plan; how large objects are is not known before they are pickled."""
    if isinstance(plan.planner_data, OwnPart):
        return plan.planner_data.nbytes
    return sum(
        math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        for item in plan.items
        if item.tensor_data is not None
    )


def leaves_of(planner: SavePlanner) -> Iterable[Any]:
    """The tensors and objects that a planner was given, if it keeps them where torch's planners do."""
    state_dict = getattr(planner, "state_dict", None)
    return state_dict.values() if isinstance(state_dict, Mapping) else ()


@without_collections
def shards_of(plan: SavePlan, planner: SavePlanner) -> list[Shard]:
    """The items that a plan assigns to this rank, with the planner's data.

    Raises:
        UnsafeCheckpointError: an object could not be loaded again.
    """
    return [
        _object_shard(item, planner)
        if item.type == WriteItemType.BYTE_IO
        else _tensor_shard(item, planner.resolve_data(item))
        for item in plan.items
    ]


def _object_shard(item: WriteItem, planner: SavePlanner) -> ObjectShard:
    name = item.index.fqn
    try:
        data = planner.resolve_data(item)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise unsaved(name, str(error)) from error
    assert isinstance(data, io.BytesIO)
    payload = data.getvalue()
    require_loadable(payload, name)
    return ObjectShard(name, payload)


def _tensor_shard(item: WriteItem, data: torch.Tensor | io.BytesIO) -> TensorShard:
    assert isinstance(data, torch.Tensor) and item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if data.shape != chunk.sizes:
        raise CheckpointMismatchError(
            f"the save plan has a piece of {item.index.fqn} of shape {tuple(chunk.sizes)}, but the planner "
            f"gave a tensor of shape {tuple(data.shape)} for it; what it would write could not be loaded"
        )
    require_values(item.index.fqn, data)
    return TensorShard(item.index.fqn, data.detach(), tuple(chunk.offsets), tuple(item.tensor_data.size))


@without_collections
def results_of(plan: SavePlan, record: RankRecord) -> list[WriteResult]:
    """The information about the written items that torch's coordinator needs."""
    index_of = {_place(item): item.index for item in plan.items}
    file_of = {file.path: file for file in record.files}
    return [
        WriteResult(
            index=index_of[item.fqn, None if item.dtype is None else item.offsets],
            size_in_bytes=item.extent.nbytes,
            storage_data=_Written(
                _StorageInfo(*item.extent), file_of[item.extent.path], [] if number else record.digests
            ),
        )
        for number, item in enumerate(record.items)
    ]


def _place(item: WriteItem) -> tuple[str, tuple[int, ...] | None]:
    chunk = item.tensor_data.chunk if item.tensor_data is not None else None
    return item.index.fqn, tuple(chunk.offsets) if chunk is not None else None
