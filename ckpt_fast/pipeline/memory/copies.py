# SPDX-License-Identifier: Apache-2.0
"""Copies of tensors into host memory: from GPUs in batches, from the CPU by the engine's threads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, compress, pairwise

import torch

from ckpt_fast import native, settings
from ckpt_fast.format.archive import ALIGNMENT
from ckpt_fast.pipeline.memory import strided
from ckpt_fast.pipeline.memory.device_copy import BLOCKING, DeviceCopies, StagingPolicy, choose_gathered
from ckpt_fast.pipeline.memory.device_rows import as_copied
from ckpt_fast.pipeline.memory.gpu import is_on_gpu


def needs_copy(tensor: torch.Tensor, snapshot: bool) -> bool:
    """Whether the engine cannot read a plain tensor's values where they are (or must not, for a snapshot)."""
    return (
        snapshot
        or tensor.device.type != "cpu"
        or not (tensor.is_contiguous() or strided.has_long_runs(tensor))
        or tensor.is_conj()
        or tensor.is_neg()
    )


def copy_tensors(
    tensors: Sequence[torch.Tensor],
    memory: torch.Tensor,
    device_copies: DeviceCopies,
    policy: StagingPolicy = BLOCKING,
    offsets: Sequence[int] | None = None,
) -> list[int]:
    """Copy plain tensors into host memory (uint8), to the offsets of ``offsets_of``; returns the addresses.

    Copies from GPUs may be on their way, as ``device_copies`` knows (after an error too).

    Args:
        tensors: to copy.
        memory: for all of them.
        device_copies: gets those from GPUs.
        policy: whether this waits for copies from GPUs.
        offsets: what ``offsets_of`` gave for such tensors, perhaps when others of them were to be gathered.
    """
    by_device, gathered = _by_device(tensors)
    if offsets is None:
        offsets, _ = _offsets(tensors, gathered)
    else:
        gathered = {
            device: numbers if _follow_each_other(tensors, offsets, numbers) else []
            for device, numbers in gathered.items()
        }
    slots = [memory[at : at + nbytes_of(tensor)] for tensor, at in zip(tensors, offsets, strict=True)]
    for device, numbers in by_device.items():
        order = gathered[device] + sorted(set(numbers).difference(gathered[device]))
        device_copies.enqueue(
            [tensors[i] for i in order], [slots[i] for i in order], len(gathered[device]), policy
        )
    on_gpu = {number for numbers in by_device.values() for number in numbers}
    on_cpu = [number for number in range(len(tensors)) if number not in on_gpu]
    _copy_on_cpu([tensors[i] for i in on_cpu], [slots[i] for i in on_cpu])
    base = memory.data_ptr()
    return [base + offset for offset in offsets]


def offsets_of(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where ``copy_tensors`` puts each tensor, and the bytes of memory that all of them take.

    Both depend on the tensors' structure alone.
    """
    return _offsets(tensors, _by_device(tensors)[1])


def _by_device(
    tensors: Sequence[torch.Tensor],
) -> tuple[dict[torch.device, list[int]], dict[torch.device, list[int]]]:
    """The tensors on each GPU, and those of them that are to be gathered, by number."""
    by_device: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        if is_on_gpu(tensor):
            by_device.setdefault(tensor.device, []).append(number)
    gathered = {
        device: list(compress(numbers, choose_gathered([tensors[i] for i in numbers])))
        for device, numbers in by_device.items()
    }
    return by_device, gathered


def _follow_each_other(
    tensors: Sequence[torch.Tensor], offsets: Sequence[int], numbers: Sequence[int]
) -> bool:
    return all(
        offsets[first] + slot_nbytes(tensors[first]) == offsets[second] for first, second in pairwise(numbers)
    )


def _offsets(
    tensors: Sequence[torch.Tensor], gathered: dict[torch.device, list[int]]
) -> tuple[list[int], int]:
    """The offset of each tensor, back to back, and the end: first the gathered ones, the others in order."""
    first = [number for numbers in gathered.values() for number in numbers]
    chosen = set(first)
    offsets, position = [0] * len(tensors), 0
    for number in chain(first, (i for i in range(len(tensors)) if i not in chosen)):
        offsets[number] = position
        position += slot_nbytes(tensors[number])
    return offsets, position


def _copy_on_cpu(tensors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> None:
    copies: list[tuple[int, ...]] = []
    for tensor, slot in zip(tensors, slots, strict=True):
        if needs_copy(tensor, snapshot=False):
            values = as_copied(tensor)
            as_tensor(values, slot).copy_(values)
            continue
        address = slot.data_ptr()
        for series in strided.as_rows(tensor):
            copies.append((address, series.address, series.nbytes, series.number, series.pitch))
            address += series.nbytes * series.number
    if copies:
        to, origin, nbytes, number, pitch = (array("q", column) for column in zip(*copies, strict=True))
        native.copy_runs(to, origin, nbytes, number, pitch, settings.io_threads())


def as_tensor(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Bytes as a contiguous tensor of the other's dtype and shape."""
    return memory.view(tensor.dtype).view(tensor.shape)


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a plain tensor's values."""
    return tensor.numel() * tensor.dtype.itemsize


def slot_nbytes(tensor: torch.Tensor) -> int:
    """Host memory that a copy of the tensor takes."""
    return -(-nbytes_of(tensor) // ALIGNMENT) * ALIGNMENT
