# SPDX-License-Identifier: Apache-2.0
"""Stage: every shard's bytes at an address in host memory.

CPU tensors are read where they are, unless they lie in too short runs or a snapshot is wanted. Everything
else is copied into a host buffer: from the GPU in one batch of asynchronous copies, from the CPU by the
engine's threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline import strided
from ckpt_fast.pipeline.archive import ALIGNMENT
from ckpt_fast.pipeline.device_rows import copy_across
from ckpt_fast.pipeline.garbage import without_collections
from ckpt_fast.pipeline.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.plan import FilePlan, PlannedItem, is_plain
from ckpt_fast.pipeline.types import Shard, TensorShard


@dataclass
class Staged:
    """Where the raw data of the planned items is.

    Attributes:
        addresses: one entry per item, in plan order; 0 for items without raw data.
        runs: by position in ``addresses``, for items that are not in one stretch: where each of their runs
            begins, and how long one is.
        owners: tensors that own memory read in place.
        buffer: host buffer that holds the copies, until ``release``.
        allocated_nbytes: host memory that was new for it.
    """

    addresses: list[int] = field(default_factory=list)
    runs: dict[int, tuple[array[int], int]] = field(default_factory=dict)
    owners: list[torch.Tensor] = field(default_factory=list)
    buffer: HostBuffer | None = None
    allocated_nbytes: int = 0

    def release(self) -> None:
        """The bytes are written: give the memory back."""
        self.owners.clear()
        if self.buffer is not None:
            host_buffers.give_back(self.buffer)
            self.buffer = None


def needs_copy(tensor: torch.Tensor, snapshot: bool) -> bool:
    """Whether the engine cannot read a plain tensor's values where they are (or must not, for a snapshot)."""
    return (
        snapshot
        or tensor.device.type != "cpu"
        or not (tensor.is_contiguous() or strided.has_long_runs(tensor))
        or tensor.is_conj()
        or tensor.is_neg()
    )


def copied_nbytes(shard: Shard, snapshot: bool) -> int:
    """Host buffer that staging this shard takes."""
    if not isinstance(shard, TensorShard) or not is_plain(shard.tensor):
        return 0
    return _slot_nbytes(shard.tensor) if needs_copy(shard.tensor, snapshot) else 0


@without_collections
def stage(
    files: Sequence[FilePlan], snapshot: bool = False, bound: int | None = None, at_least: int = 0
) -> Staged:
    """Make the raw bytes of every planned item readable by the engine.

    On return all copies are complete: with ``snapshot`` the tensors may change at once.

    Args:
        files: the plan.
        snapshot: copy contiguous CPU tensors too.
        bound: bytes of host buffers that may be in use; waits for other saves' buffers if need be.
        at_least: length of a host buffer that is allocated here, for later waves of the same save.

    Raises:
        CheckpointError: the host memory cannot be had.
    """
    tensors = [_tensor_of(item) for file in files for item in file.items]
    is_copied = [tensor is not None and needs_copy(tensor, snapshot) for tensor in tensors]
    copied = [t for t, wanted in zip(tensors, is_copied, strict=True) if wanted and t is not None]
    nbytes = sum(_slot_nbytes(tensor) for tensor in copied)
    staged = Staged(buffer=host_buffers.take(nbytes, bound, at_least) if nbytes else None)
    try:
        copies: Iterator[int] = iter(())
        if staged.buffer is not None:
            staged.allocated_nbytes = staged.buffer.nbytes if staged.buffer.is_new else 0
            copies = iter(_copy(copied, staged.buffer))
        for tensor, wanted in zip(tensors, is_copied, strict=True):
            if tensor is None:
                staged.addresses.append(0)
            elif wanted:
                staged.addresses.append(next(copies))
            else:
                if not tensor.is_contiguous():
                    staged.runs[len(staged.addresses)] = _runs(tensor)
                staged.addresses.append(tensor.data_ptr())
                staged.owners.append(tensor)
    except BaseException:
        staged.release()
        raise
    return staged


def copy_to_host(
    tensors: Sequence[torch.Tensor], bound: int | None = None
) -> tuple[HostBuffer | None, list[torch.Tensor]]:
    """Contiguous copies of plain tensors in one host buffer, complete on return.

    Each copy has a storage of its own. The caller gives the buffer back, after which the copies' values are
    undefined; None if there are no bytes to copy.

    Args:
        tensors: plain, on any device.
        bound: bytes of host buffers that this and all saves in flight may use together.

    Raises:
        CheckpointError: the host memory cannot be had, or not within the bound now.
    """
    tensors = [tensor.detach() for tensor in tensors]
    nbytes = sum(_slot_nbytes(tensor) for tensor in tensors)
    if not nbytes:
        return None, [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    if bound is not None and nbytes > bound:
        raise CheckpointError(
            f"a snapshot of {nbytes} bytes exceeds the {bound} that CKPT_FAST_HOST_BUFFER allows. Raise the "
            "bound, or save synchronously: that goes through a smaller buffer in waves."
        )
    buffer = host_buffers.take(nbytes, bound, wait_s=0.0)
    try:
        base = buffer.memory.data_ptr()
        return buffer, [
            _as(tensor, buffer.slot(address - base, _nbytes(tensor)))
            for tensor, address in zip(tensors, _copy(tensors, buffer), strict=True)
        ]
    except BaseException:
        host_buffers.give_back(buffer)
        raise


def _tensor_of(item: PlannedItem) -> torch.Tensor | None:
    """The tensor whose raw bytes the item needs; None for ready-made and empty items."""
    if item.archive is None or not item.raw_nbytes or not isinstance(item.shard, TensorShard):
        return None
    return item.shard.tensor.detach()


def _copy(tensors: Sequence[torch.Tensor], buffer: HostBuffer) -> list[int]:
    """Copy the tensors, one behind the other, into the buffer; returns where, once all is there."""
    addresses = []
    destinations, sources, sizes = array("q"), array("q"), array("q")
    devices: set[torch.device] = set()
    base = buffer.memory.data_ptr()
    offset = 0
    for tensor in tensors:
        addresses.append(base + offset)
        if needs_copy(tensor, snapshot=False):
            slot = buffer.memory[offset : offset + _nbytes(tensor)]
            copy_across(_as(tensor, slot), tensor)
            devices.add(tensor.device)
        else:
            starts, nbytes = _runs(tensor)
            destinations.extend([base + offset + run * nbytes for run in range(len(starts))])
            sources.extend(starts)
            sizes.extend(array("q", [nbytes]) * len(starts))
        offset += _slot_nbytes(tensor)
    native.copy_extents(destinations, sources, sizes, settings.io_threads())
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return addresses


def _runs(tensor: torch.Tensor) -> tuple[array[int], int]:
    """Where each run of a CPU tensor begins, and how long one is."""
    if tensor.is_contiguous():
        return array("q", [tensor.data_ptr()]), _nbytes(tensor)
    return strided.column(strided.run_addresses(tensor)), strided.run_nbytes(tensor)


def _as(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Bytes as a contiguous tensor of the other's dtype and shape."""
    return memory.view(tensor.dtype).view(tensor.shape)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _slot_nbytes(tensor: torch.Tensor) -> int:
    return -(-_nbytes(tensor) // ALIGNMENT) * ALIGNMENT
