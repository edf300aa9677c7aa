# SPDX-License-Identifier: Apache-2.0
"""Stage: every shard's bytes at an address in host memory.

CPU tensors are read where they are, unless they lie in too short runs or a snapshot is wanted. Everything
else is copied into a host buffer: from the GPU in a batch of asynchronous copies, from the CPU by the
engine's threads.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.archive import ALIGNMENT
from ckpt_fast.format.types import Shard, TensorShard
from ckpt_fast.pipeline.memory import strided
from ckpt_fast.pipeline.memory.available import is_tight
from ckpt_fast.pipeline.memory.device_copy import BLOCKING, DeviceCopies, StagingPolicy, choose_gathered
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.memory.gpu import is_on_gpu
from ckpt_fast.pipeline.memory.host_buffer import HostBuffer, host_buffers
from ckpt_fast.pipeline.save.plan import FilePlan, PlannedItem, is_plain


@dataclass
class Staged:
    """The location of the planned items' raw data.

    Attributes:
        addresses: one entry per item, in plan order; 0 for items without raw data.
        runs: by position in ``addresses``, for items that are not in one stretch: where each of their runs
            begins, and how long one is.
        owners: tensors that own memory read in place.
        buffer: host buffer that holds the copies, until ``release``.
        device_copies: those from GPUs, which may be on their way.
        buffer_nbytes: length of the part of it that is used.
        copied_nbytes: bytes copied into it.
        allocated_nbytes: host memory that was new for it.
    """

    addresses: list[int] = field(default_factory=list)
    runs: dict[int, tuple[array[int], int]] = field(default_factory=dict)
    owners: list[torch.Tensor] = field(default_factory=list)
    buffer: HostBuffer | None = None
    device_copies: DeviceCopies = field(default_factory=DeviceCopies)
    buffer_nbytes: int = 0
    copied_nbytes: int = 0
    allocated_nbytes: int = 0

    def wait(self) -> None:
        """Wait until every byte is at its address."""
        self.device_copies.wait()

    def release(self) -> None:
        """The bytes are written, or never will be: give the memory back."""
        # A device that has failed copies no more; whoever waited for it has the error.
        with contextlib.suppress(RuntimeError):
            self.wait()
        self.owners.clear()
        if self.buffer is not None:
            host_buffers.give_back(self.buffer, keep=not is_tight())
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
    files: Sequence[FilePlan],
    snapshot: bool = False,
    bound: int | None = None,
    at_least: int = 0,
    policy: StagingPolicy = BLOCKING,
) -> Staged:
    """Make the raw bytes of every planned item readable by the engine, once ``wait`` has returned.

    On return the tensors may change, if there is a snapshot, as far as ``policy`` allows.

    Args:
        files: the plan.
        snapshot: copy contiguous CPU tensors too.
        bound: bytes of host buffers that may be in use; waits for other saves' buffers if need be.
        at_least: length of a host buffer that is allocated here, for later waves of the same save.
        policy: whether this waits for copies from GPUs.

    Raises:
        CheckpointError: the host memory cannot be had.
    """
    tensors = [_tensor_of(item) for file in files for item in file.items]
    is_copied = [tensor is not None and needs_copy(tensor, snapshot) for tensor in tensors]
    copied = [t for t, wanted in zip(tensors, is_copied, strict=True) if wanted and t is not None]
    nbytes = sum(_slot_nbytes(tensor) for tensor in copied)
    buffer = host_buffers.take(nbytes, bound, at_least) if nbytes else None
    staged = Staged(buffer=buffer, buffer_nbytes=nbytes)
    try:
        copies: Iterator[int] = iter(())
        if staged.buffer is not None:
            staged.copied_nbytes = sum(_nbytes(tensor) for tensor in copied)
            staged.allocated_nbytes = staged.buffer.nbytes if staged.buffer.is_new else 0
            copies = iter(copy_tensors(copied, staged.buffer, staged.device_copies, policy))
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
    tensors: Sequence[torch.Tensor],
    bound: int | None = None,
    when_unused: Callable[[], None] = lambda: None,
    device_copies: DeviceCopies | None = None,
    policy: StagingPolicy = BLOCKING,
) -> tuple[HostBuffer | None, list[torch.Tensor]]:
    """Contiguous copies of plain tensors in one host buffer.

    Those that ``policy`` lets go on are complete once ``device_copies.wait`` returns, the others on return.

    Each copy has a storage of its own. The caller gives the buffer back, after which the copies' values are
    undefined; None if there are no bytes to copy.

    Args:
        tensors: plain, on any device.
        bound: bytes of host buffers that this and all saves in flight may use together; None: no bound.
        when_unused: called when the last copy in the buffer is gone, with every view of it.
        device_copies: gets those from GPUs; None: nobody waits for them, and ``policy`` is to be BLOCKING.
        policy: whether this waits for copies from GPUs.

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
    device_copies = device_copies or DeviceCopies()
    try:
        base = buffer.memory.data_ptr()
        addresses = copy_tensors(tensors, buffer, device_copies, policy)
        with buffer.watched(when_unused):
            return buffer, [
                _as(tensor, buffer.slot(address - base, _nbytes(tensor)))
                for tensor, address in zip(tensors, addresses, strict=True)
            ]
    except BaseException:
        Staged(buffer=buffer, device_copies=device_copies).release()
        raise


def _tensor_of(item: PlannedItem) -> torch.Tensor | None:
    """The tensor whose raw bytes the item needs; None for ready-made and empty items."""
    if item.archive is None or not item.raw_nbytes or not isinstance(item.shard, TensorShard):
        return None
    return item.shard.tensor.detach()


def copy_tensors(
    tensors: Sequence[torch.Tensor],
    buffer: HostBuffer,
    device_copies: DeviceCopies,
    policy: StagingPolicy = BLOCKING,
) -> list[int]:
    """Copy plain tensors into the buffer; returns the address of each.

    The offsets in the buffer depend on the tensors' structure alone. Copies from GPUs may be on their way, as
    ``device_copies`` knows (after an error too).
    """
    by_device: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if is_on_gpu(tensor):
            by_device.setdefault(tensor.device, []).append(number)
    gathered: dict[torch.device, list[int]] = {
        device: list(compress(numbers, choose_gathered([tensors[i] for i in numbers])))
        for device, numbers in by_device.items()
    }
    first = [number for numbers in gathered.values() for number in numbers]
    offsets = _offsets(tensors, first)
    slots = [buffer.memory[at : at + _nbytes(tensor)] for tensor, at in zip(tensors, offsets, strict=True)]
    for device, numbers in by_device.items():
        order = gathered[device] + sorted(set(numbers).difference(gathered[device]))
        device_copies.enqueue(
            [tensors[i] for i in order], [slots[i] for i in order], len(gathered[device]), policy
        )
    on_gpu = {number for numbers in by_device.values() for number in numbers}
    on_cpu = [number for number in range(len(tensors)) if number not in on_gpu]
    _copy_on_cpu([tensors[i] for i in on_cpu], [slots[i] for i in on_cpu])
    base = buffer.memory.data_ptr()
    return [base + offset for offset in offsets]


def _offsets(tensors: Sequence[torch.Tensor], first: Sequence[int]) -> list[int]:
    """The offset of each tensor, back to back: those numbered in ``first``, then the others in order."""
    chosen = set(first)
    offsets, position = [0] * len(tensors), 0
    for number in chain(first, (i for i in range(len(tensors)) if i not in chosen)):
        offsets[number] = position
        position += _slot_nbytes(tensors[number])
    return offsets


def _copy_on_cpu(tensors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> None:
    copies: list[tuple[int, ...]] = []
    for tensor, slot in zip(tensors, slots, strict=True):
        if needs_copy(tensor, snapshot=False):
            _as(tensor, slot).copy_(tensor)
            continue
        address = slot.data_ptr()
        for series in strided.as_rows(tensor):
            copies.append((address, series.address, series.nbytes, series.number, series.pitch))
            address += series.nbytes * series.number
    if copies:
        to, origin, nbytes, number, pitch = (array("q", column) for column in zip(*copies, strict=True))
        native.copy_runs(to, origin, nbytes, number, pitch, settings.io_threads())


def _runs(tensor: torch.Tensor) -> tuple[array[int], int]:
    """The start of each run of a CPU tensor, and the length of one run."""
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
