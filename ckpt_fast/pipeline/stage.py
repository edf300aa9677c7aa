# SPDX-License-Identifier: Apache-2.0
"""Stage: every shard's bytes at an address in host memory.

Contiguous CPU tensors are read where they are, unless a snapshot is wanted. Everything else is copied into a
host buffer: from the GPU in one batch of asynchronous copies, from the CPU by the engine's threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ckpt_fast import native, settings
from ckpt_fast.pipeline.archive import ALIGNMENT
from ckpt_fast.pipeline.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.plan import FilePlan
from ckpt_fast.pipeline.types import Shard, TensorShard


@dataclass
class Staged:
    """Where the raw data of the planned items is.

    Attributes:
        addresses: one entry per item, in plan order; 0 for items without raw data.
        owners: tensors that own memory read in place.
        buffer: host buffer that holds the copies, until ``release``.
    """

    addresses: list[int] = field(default_factory=list)
    owners: list[torch.Tensor] = field(default_factory=list)
    buffer: HostBuffer | None = None

    def release(self) -> None:
        """The bytes are written: give the memory back."""
        self.owners.clear()
        if self.buffer is not None:
            host_buffers.give_back(self.buffer)
            self.buffer = None


def needs_copy(tensor: torch.Tensor, snapshot: bool) -> bool:
    """Whether the engine cannot read the tensor's values where they are (or must not, for a snapshot)."""
    return (
        snapshot
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or tensor.is_conj()
        or tensor.is_neg()
    )


def copied_nbytes(shard: Shard, snapshot: bool) -> int:
    """Host buffer that staging this shard takes."""
    if not isinstance(shard, TensorShard) or not needs_copy(shard.tensor, snapshot):
        return 0
    return _slot_nbytes(shard.tensor)


def stage(files: Sequence[FilePlan], snapshot: bool = False, bound: int | None = None) -> Staged:
    """Make the raw bytes of every planned item readable by the engine.

    On return all copies are complete: with ``snapshot`` the tensors may change at once.

    Args:
        files: the plan.
        snapshot: copy contiguous CPU tensors too.
        bound: bytes of host buffers that may be in use; waits for other saves' buffers if need be.

    Raises:
        CheckpointError: the host memory cannot be had.
    """
    tensors = [_tensor_of(item) for file in files for item in file.items]
    nbytes = sum(_slot_nbytes(t) for t in tensors if t is not None and needs_copy(t, snapshot))
    staged = Staged(buffer=host_buffers.take(nbytes, bound) if nbytes else None)
    try:
        _fill(staged, tensors, snapshot)
    except BaseException:
        staged.release()
        raise
    return staged


def _tensor_of(item: object) -> torch.Tensor | None:
    """The tensor whose raw bytes the item needs; None for ready-made and empty items."""
    shard = item.shard  # type: ignore[attr-defined]
    if item.archive is None or not item.raw_nbytes or not isinstance(shard, TensorShard):  # type: ignore[attr-defined]
        return None
    return shard.tensor.detach()


def _fill(staged: Staged, tensors: Sequence[torch.Tensor | None], snapshot: bool) -> None:
    destinations, sources, sizes = array("q"), array("q"), array("q")
    devices: set[torch.device] = set()
    offset = 0
    for tensor in tensors:
        if tensor is None:
            staged.addresses.append(0)
            continue
        if not needs_copy(tensor, snapshot):
            staged.addresses.append(tensor.data_ptr())
            staged.owners.append(tensor)
            continue
        assert staged.buffer is not None
        nbytes = tensor.numel() * tensor.dtype.itemsize
        slot = staged.buffer.memory[offset : offset + nbytes]
        staged.addresses.append(slot.data_ptr())
        offset += _slot_nbytes(tensor)
        if not needs_copy(tensor, snapshot=False):
            destinations.append(slot.data_ptr())
            sources.append(tensor.data_ptr())
            sizes.append(nbytes)
        else:
            slot.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
            devices.add(tensor.device)
    native.copy_extents(destinations, sources, sizes, settings.io_threads())
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _slot_nbytes(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.dtype.itemsize // ALIGNMENT) * ALIGNMENT
