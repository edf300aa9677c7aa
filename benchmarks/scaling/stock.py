# SPDX-License-Identifier: Apache-2.0
"""What Megatron-Core's coordinator gets from many ranks, and does with it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import rivals
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_fast import compat
from scaling.ours import ROWS, WIDTH, name


def messages(ranks: int, count: int) -> list[tuple[bytes, bytes]]:
    """Return what every rank sends: its plan before writing, its results afterwards."""
    sent = []
    for rank in range(ranks):
        state = rivals.sharded(
            {name(n): torch.empty(ROWS, WIDTH) for n in range(count)}, axis=0, fragments=ranks, rank=rank
        )
        by_key = {key: [tensor] for key, tensor in state.items()}
        plan = _planner(compat.torch_strategies.mcore_to_pyt_state_dict(by_key, False)).create_local_plan()
        results = [
            WriteResult(item.index, 4096, _StorageInfo(f"__{rank}_0.distcp", 4096 * number, 4096))
            for number, item in enumerate(plan.items)
        ]
        sent.append((pickle.dumps(plan), pickle.dumps(results)))
    return sent


def _planner(state: dict[str, Any]) -> Any:
    planner = compat.torch_strategies.MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False
    )
    planner.set_up_planner(state, is_coordinator=True)
    return planner


def coordinator(received: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the ``.metadata``."""
    plans = [pickle.loads(plan) for plan, _ in received]
    _, metadata = _planner({}).create_global_plan(plans)
    metadata.all_local_plans = plans
    results = [pickle.loads(written) for _, written in received]
    metadata.storage_data = {result.index: result.storage_data for written in results for result in written}
    buffer = io.BytesIO()
    pickle.dump(metadata, buffer)
    return buffer.getvalue()


def metadata(ranks: int, count: int) -> bytes:
    """Return the ``.metadata`` of these ranks without their plans, which not all versions keep in it."""
    tensors, storage = {}, {}
    for number in range(count):
        chunks = [
            ChunkStorageMetadata(torch.Size((rank * ROWS, 0)), torch.Size((ROWS, WIDTH)))
            for rank in range(ranks)
        ]
        properties = TensorProperties(dtype=torch.float32)
        tensors[name(number)] = TensorStorageMetadata(properties, torch.Size((ranks * ROWS, WIDTH)), chunks)
        for rank, chunk in enumerate(chunks):
            index = MetadataIndex(name(number), chunk.offsets, rank)
            storage[index] = _StorageInfo(f"__{rank}_0.distcp", 4096 * number, 4096)
    return pickle.dumps(Metadata(tensors, None, storage))
