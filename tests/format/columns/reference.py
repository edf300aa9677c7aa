# SPDX-License-Identifier: Apache-2.0
"""What ``.metadata`` says of items, made of torch DCP's own objects, one by one: columns must equal it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.consistency import Region, require_apart, tile
from ckpt_fast.format.types import ItemRecord


def metadata_of(
    records: Iterable[ItemRecord], planner_data: Mapping[str, Any] | None = None, partial: bool = False
) -> tuple[Metadata, list[bool]]:
    """Return the metadata, and for each record whether it is not mentioned.

    Raises:
        CheckpointMismatchError: the ranks contradict each other, or leave out something.
    """
    tensors: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    left_out = []
    for record in records:
        entry = _entry(tensors, record)
        left_out.append(
            record.dtype is not None
            and 0 in record.sizes
            and bool(entry.chunks or 0 not in record.global_shape)
        )
        if record.dtype is None:
            index = MetadataIndex(record.fqn)
        else:
            if left_out[-1]:
                continue
            chunk = ChunkStorageMetadata(torch.Size(record.offsets), torch.Size(record.sizes))
            index = MetadataIndex(record.fqn, chunk.offsets, len(entry.chunks))
            entry.chunks.append(chunk)
        info = _StorageInfo(*record.extent)
        other = storage.setdefault(index, info)
        if other is not info:
            raise CheckpointMismatchError(
                f"{record.fqn} at {record.offsets or 'no offset'} is written by two ranks, in "
                f"{other.relative_path} and {record.extent.path}. Each piece needs exactly one main "
                "replica: check replica_id of the sharded state dict."
            )
    _require_complete(tensors, partial)
    planner = dict(planner_data) if planner_data is not None else None
    return Metadata(tensors, planner, storage), left_out


def _entry(tensors: dict[str, Any], record: ItemRecord) -> Any:
    """The metadata entry of the record's tensor or object, new or known from an earlier record."""
    entry = tensors.get(record.fqn)
    if entry is None:
        if record.dtype is None:
            entry = BytesStorageMetadata()
        else:
            properties = TensorProperties(dtype=record.dtype)
            size = torch.Size(record.global_shape)
            entry = TensorStorageMetadata(properties, size, [])
        tensors[record.fqn] = entry
    elif isinstance(entry, BytesStorageMetadata) != (record.dtype is None):
        raise CheckpointMismatchError(
            f"{record.fqn} is a tensor on one rank and an object on another (file {record.extent.path}). "
            "Nothing was published; check that all ranks build the same model."
        )
    elif record.dtype is not None and (
        tuple(entry.size) != record.global_shape or entry.properties.dtype != record.dtype
    ):
        raise CheckpointMismatchError(
            f"ranks disagree on {record.fqn}: {tuple(entry.size)} of {entry.properties.dtype} on one, "
            f"{record.global_shape} of {record.dtype} on another (file {record.extent.path}). "
            "Nothing was published; check that all ranks build the same model."
        )
    return entry


def _require_complete(tensors: Mapping[str, Any], partial: bool) -> None:
    for fqn, entry in tensors.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        if (
            len(entry.chunks) == 1
            and entry.chunks[0].sizes == entry.size
            and not any(entry.chunks[0].offsets)
        ):
            continue
        shape = tuple(entry.size)
        wanted, written = math.prod(shape), sum(chunk.sizes.numel() for chunk in entry.chunks)
        if wanted == 0:
            continue
        if written > wanted or (written < wanted and not partial):
            problem = f"the ranks wrote {written} of the {wanted} elements of {fqn} {shape}"
        elif not (tile if written == wanted else _are_apart)(shape, entry.chunks):
            problem = f"the pieces that the ranks wrote do not cover {fqn} {shape}: some overlap"
        else:
            continue
        raise CheckpointMismatchError(
            f"{problem}. Nothing was published; check the sharding that model and optimizer declare for it."
        )


def _are_apart(shape: Sequence[int], chunks: Iterable[ChunkStorageMetadata]) -> bool:
    try:
        require_apart(shape, [Region(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks])
    except ValueError:
        return False
    return True
