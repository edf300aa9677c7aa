# SPDX-License-Identifier: Apache-2.0
"""Plan: which bytes go where. Decided from dtypes and shapes alone, before any data moves."""

from __future__ import annotations

import heapq
import io
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.archive import ALIGNMENT, PAGE, Archive, item_nbytes, tensor_archive
from ckpt_fast.format.names import DATA_SUFFIX
from ckpt_fast.format.types import Extent, ItemRecord, ObjectShard, Shard, TensorShard
from ckpt_fast.pipeline.memory.forms import describe, has_own_memory
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.memory.strided import has_storage

# From this size on, raw data starts on a page: it can be mapped, or read past the page cache without copying.
# Below, the gap that costs would be worth more than 1.6 % of the file.
_PAGE_ALIGN_FROM = 64 * PAGE


class PlannedItem(NamedTuple):
    """One archive with its place in a file.

    Attributes:
        shard: what is stored.
        archive: head and tail around the raw data; None when ``payload`` is the whole item.
        payload: a ready-made item; None when the item is ``archive`` around the shard's tensor.
        offset: where the item starts in its file.
        raw_nbytes: length of the raw data (0 for a ready-made item).
    """

    shard: Shard
    archive: Archive | None
    payload: bytes | None
    offset: int
    raw_nbytes: int

    @property
    def nbytes(self) -> int:
        if self.archive is None:
            return len(self.payload or b"")
        return item_nbytes(self.archive, self.raw_nbytes)


class FilePlan(NamedTuple):
    """One ``.distcp`` file; ``path`` is relative to the checkpoint directory, items are in file order."""

    path: str
    nbytes: int
    items: list[PlannedItem]


@without_collections
def plan_save(
    shards: Sequence[Shard], prefix: str, writers: int, first: int = 0, separate: str | None = None
) -> list[FilePlan]:
    """Lay this rank's shards out in at most ``writers`` files of about equal size.

    A rank without shards writes no file. Objects come first in a file, then tensors in the order given.

    Args:
        shards: what this rank saves.
        prefix: start of the file names, different on every rank; ``file_prefix`` makes the usual one.
        writers: how many files may be written at once.
        first: number of the first file.
        separate: shards whose name begins so get files of their own, whose names begin so as well.

    Raises:
        ValueError: ``writers`` is not positive.
    """
    if writers < 1:
        raise ValueError(f"storage_writers_per_rank is {writers}; it must be at least 1")
    groups = {prefix: shards}
    if separate is not None:
        groups = {
            prefix: [shard for shard in shards if not shard.fqn.startswith(separate)],
            separate + prefix: [shard for shard in shards if shard.fqn.startswith(separate)],
        }
    files: list[FilePlan] = []
    for start, group in groups.items():
        for bucket in _balance([_unplaced(shard) for shard in group], writers):
            items, end = _place(bucket)
            files.append(FilePlan(f"{start}{first + len(files)}{DATA_SUFFIX}", end, items))
    return files


def require_values(fqn: str, tensor: torch.Tensor) -> None:
    """Raise if a tensor that is to be saved has no values.

    Raises:
        CheckpointMismatchError: it is on the meta device, or its storage has been freed or cut short, or it
            has none.
    """
    if tensor.is_meta:
        raise CheckpointMismatchError(
            f"{fqn} is on the meta device and has no values to save. Give the model memory and weights "
            "first, with module.to_empty(device=...) and a load."
        )
    if tensor._is_zerotensor():
        raise CheckpointMismatchError(
            f"{fqn} is a ZeroTensor, which stands for zeros and has no memory. Save torch.zeros_like of it."
        )
    if has_own_memory(tensor) and not has_storage(tensor):
        raise CheckpointMismatchError(
            f"{fqn} has {tensor.numel()} elements, but its storage has only "
            f"{tensor.untyped_storage().nbytes()} bytes: it was freed, or is shared with something that "
            "resized it. Save while the tensor has its memory."
        )


def require_all_values(names: Sequence[str], tensors: Sequence[torch.Tensor]) -> None:
    """``require_values`` of many tensors, with one look at most of them.

    Args:
        names: of the tensors.
        tensors: to be saved.

    Raises:
        CheckpointMismatchError: see ``require_values``; of the first that has no values.
    """
    described = describe(list(tensors))
    doubtful = torch.tensor([form.is_meta or not form.has_storage for form in described.table] + [True])
    for number in doubtful[described.forms].nonzero().flatten().tolist():
        require_values(names[number], tensors[number])


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the values are bytes in a storage of the tensor's own, and nothing else."""
    return has_own_memory(tensor) and not tensor.is_quantized


def object_room(nbytes: int) -> int:
    """The room that a file has for an object of this length.

    Pickled numbers have different lengths. With some room to spare, the next save's objects do not move what
    follows them.
    """
    spare = nbytes // 16 + ALIGNMENT
    return -(-(nbytes + spare) // ALIGNMENT) * ALIGNMENT


def file_prefix(rank: int) -> str:
    """The prefix of a rank's data file names, the same as stock writers use."""
    return f"__{rank}_"


@without_collections
def item_records(files: Sequence[FilePlan]) -> list[ItemRecord]:
    """The data that ``.metadata`` needs for the planned items; computed without their bytes."""
    records = []
    for file in files:
        for item in file.items:
            extent = Extent(file.path, item.offset, item.nbytes)
            shard = item.shard
            if isinstance(shard, ObjectShard):
                records.append(ItemRecord(shard.fqn, extent, None, (), (), ()))
            else:
                dtype = shard.tensor.dtype
                records.append(
                    ItemRecord(shard.fqn, extent, dtype, shard.offsets, shard.shape, shard.global_shape)
                )
    return records


def _unplaced(shard: Shard) -> PlannedItem:
    if isinstance(shard, ObjectShard):
        return PlannedItem(shard, None, shard.payload, 0, 0)
    tensor = shard.tensor
    if not is_plain(tensor):
        return PlannedItem(shard, None, _torch_saved(tensor.detach().cpu()), 0, 0)
    try:
        archive = tensor_archive(tensor.dtype, shard.shape)
    except TypeError:
        whole = tensor.detach().cpu().contiguous().view(shard.shape)
        return PlannedItem(shard, None, _torch_saved(whole), 0, 0)
    return PlannedItem(shard, archive, None, 0, tensor.numel() * tensor.dtype.itemsize)


def _torch_saved(tensor: torch.Tensor) -> bytes:
    """Tensors that are more than their bytes (sparse, quantized, complex32) are stored by torch itself."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _balance(items: list[PlannedItem], writers: int) -> list[list[PlannedItem]]:
    """Largest first into the emptiest bucket; the order within a bucket is the order given."""
    buckets = min(writers, len(items))
    if buckets <= 1:
        return [items] if items else []
    # The count comes second, so that items without bytes do not all go to the same file.
    load = [(0, 0, number) for number in range(buckets)]
    chosen: list[list[int]] = [[] for _ in range(buckets)]
    for index in sorted(range(len(items)), key=lambda i: -items[i].nbytes):
        nbytes, count, number = load[0]
        chosen[number].append(index)
        heapq.heapreplace(load, (nbytes + items[index].nbytes, count + 1, number))
    return [[items[index] for index in sorted(indices)] for indices in chosen]


def _place(bucket: list[PlannedItem]) -> tuple[list[PlannedItem], int]:
    """Give each item of one file its offset; returns the items in file order and the file's length."""
    placed, end = [], 0
    for item in sorted(bucket, key=lambda item: isinstance(item.shard, TensorShard)):
        head = len(item.archive.head) if item.archive is not None else 0
        alignment = PAGE if item.raw_nbytes >= _PAGE_ALIGN_FROM else ALIGNMENT
        offset = end + (-(end + head) % alignment)
        placed.append(item._replace(offset=offset))
        end = offset + (object_room(item.nbytes) if isinstance(item.shard, ObjectShard) else item.nbytes)
    return placed, end
