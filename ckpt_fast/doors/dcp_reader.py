# SPDX-License-Identifier: Apache-2.0
"""The storage reader of the torch DCP door, for ``dcp.load``."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.pipeline.decode import Contents, decode_object, read_contents
from ckpt_fast.pipeline.garbage import without_collections
from ckpt_fast.pipeline.index import CheckpointIndex
from ckpt_fast.pipeline.load import Part, load_parts, load_payloads
from ckpt_fast.pipeline.place import Box

StrPath = str | os.PathLike[str]


class FastStorageReader(StorageReader):
    """Reads torch DCP checkpoints straight into the tensors, checking what is read whole.

    Args:
        path: checkpoint directory, written by FastStorageWriter or by torch's own writer.
        extension_registry: torch DCP's registry of stream transforms (compression), where torch's writer has
            used some that torch itself does not know.
    """

    def __init__(self, path: StrPath, extension_registry: Any = None) -> None:
        super().__init__()
        self._path = os.fspath(path)
        self._extensions = extension_registry
        self._contents: Contents | None = None
        self._index: CheckpointIndex | None = None

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin a new load, from ``checkpoint_id`` if one is given."""
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._contents = self._index = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata; with ``rank`` that of one rank, saved without collectives.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError.
        """
        rank = kwargs.get("rank")
        self._contents = read_contents(self._path, "" if rank is None else f"__{rank}")
        metadata = self._contents.metadata
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Called on every rank with the metadata to load by."""
        contents = self._contents
        if contents is None or contents.metadata is not metadata:
            # Somebody else has read it; no manifest is known to belong to it.
            contents = Contents(metadata, None, "")
        self._index = CheckpointIndex(self._path, contents, self._extensions)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for.

        Raises:
            CheckpointCorruptError: a checksum differs or a file is short.
            UnsafeCheckpointError: an object is more than tensors and plain data.
        """
        assert self._index is not None, "read_data before set_up_storage_reader"
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        payloads = load_payloads(self._index, {item.storage_index.fqn for item in objects})
        for item in objects:
            payload = payloads[item.storage_index.fqn]
            # torch's planner unpickles without restriction; what is not plain data must not reach it.
            decode_object(payload, f"{item.storage_index.fqn} in {self._path}", verify=True)
            planner.load_bytes(item, io.BytesIO(payload))
        self._read_tensors([item for item in plan.items if item.type != LoadItemType.BYTE_IO], planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @without_collections
    def _read_tensors(self, items: list[ReadItem], planner: LoadPlanner) -> None:
        assert self._index is not None
        targets = [planner.resolve_tensor(item).detach() for item in items]
        load_parts(
            self._index, [_part(self._index, item, to) for item, to in zip(items, targets, strict=True)]
        )
        for item, target in zip(items, targets, strict=True):
            planner.commit_tensor(item, target)

    @property
    def checkpoint_id(self) -> str:
        """The directory read from."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether this reader can read there: from a local path."""
        return is_local_path(checkpoint_id)


def _part(index: CheckpointIndex, item: ReadItem, target: torch.Tensor) -> Part:
    """The region of a saved piece that a planner wants in ``target``.

    Raises:
        CheckpointMismatchError: the region is not inside the piece, or not of the target's shape.
    """
    lengths, start = tuple(item.lengths), tuple(item.storage_offsets)
    tensor, piece = index.piece(
        item.storage_index.fqn, tuple(item.storage_index.offset or (0,) * len(lengths))
    )
    inside = (lengths == piece.sizes and not any(start)) or (
        len(lengths) == len(start) == len(piece.sizes)
        and all(
            offset >= 0 and offset + length <= size
            for offset, length, size in zip(start, lengths, piece.sizes, strict=True)
        )
    )
    # The engine writes through addresses: nothing but this check stands between a planner's mistake and
    # memory that belongs to somebody else.
    if not inside or tuple(target.shape) != lengths:
        raise CheckpointMismatchError(
            f"{tensor.fqn} in {index.directory} is a piece of shape {piece.sizes}, of which the load plan "
            f"wants {lengths} at {start} in a tensor of shape {tuple(target.shape)}. The planner and the "
            "state dict disagree; load into tensors of the shapes that were saved."
        )
    return Part(tensor, piece, Box(piece.sizes, start, lengths, tensor.dtype.itemsize), target)


def is_local_path(checkpoint_id: StrPath) -> bool:
    """Whether the door serves this checkpoint: not one on object storage."""
    return isinstance(checkpoint_id, os.PathLike) or "://" not in checkpoint_id
