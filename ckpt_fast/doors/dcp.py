# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint's storage writer and reader on the ckpt_fast pipeline.

    dcp.save(state_dict, storage_writer=FastStorageWriter(path))
    dcp.load(state_dict, storage_reader=FastStorageReader(path))

Planning stays with torch: DTensors, FSDP2, flattened state dicts, partial loads and plan caching work as they
do with torch's own file system writer, and each side reads what the other has written.
"""

from __future__ import annotations

import dataclasses
import io
import os
import threading
import uuid
from typing import Any, NamedTuple

import torch
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.pipeline import commit
from ckpt_fast.pipeline.decode import decode_object, read_metadata
from ckpt_fast.pipeline.encode import WriteProgram, encode_sidecar, file_record, pickle_metadata
from ckpt_fast.pipeline.index import CheckpointIndex
from ckpt_fast.pipeline.load import Part, load_parts, load_payloads
from ckpt_fast.pipeline.place import Box
from ckpt_fast.pipeline.plan import file_prefix, plan_save
from ckpt_fast.pipeline.stage import stage
from ckpt_fast.pipeline.types import FileRecord, ObjectShard, Shard, TensorShard
from ckpt_fast.pipeline.write import write

_Path = str | os.PathLike[str]


class _Written(NamedTuple):
    """Travels to the coordinator as a write result's storage data: the item, and its file for the sidecar."""

    info: _StorageInfo
    file: FileRecord


class FastStorageWriter(BlockingAsyncStager, StorageWriter):
    """Writes torch DCP checkpoints: parallel, checksummed, fsynced, published atomically.

    Args:
        path: checkpoint directory; an older checkpoint in it is invalidated before anything is written.
        thread_count: files per rank.
        overwrite: False refuses a directory that holds a complete checkpoint.
        cache_staged_state_dict: keep the host copy that ``dcp.async_save`` stages into for the next save.
    """

    def __init__(
        self,
        path: _Path,
        thread_count: int = 1,
        overwrite: bool = True,
        cache_staged_state_dict: bool = True,
    ) -> None:
        super().__init__(cache_staged_state_dict=cache_staged_state_dict)
        self._path = os.fspath(path)
        self._thread_count = thread_count
        self._overwrite = overwrite
        # Held from staging until the bytes are written: the host copy belongs to that save.
        self._staging = threading.Lock()
        self._staged_structure: list[Any] = []
        self._rank: int | None = None
        self._use_collectives = True
        self._is_coordinator = True
        self._save_id = str(uuid.uuid4())

    # --- the storage writer protocol, in the order of the calls ---------------------------------------

    def reset(self, checkpoint_id: _Path | None = None) -> None:
        """Begin a new save, to ``checkpoint_id`` if one is given."""
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._save_id = str(uuid.uuid4())

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called on every rank; ``rank`` and ``use_collectives`` may be among the keywords."""
        self._is_coordinator = is_coordinator
        self._rank = kwargs.get("rank")
        self._use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Without collectives every rank is its own coordinator, with files of its own."""
        if self._use_collectives or self._rank is None:
            return plan
        os.makedirs(self._path, exist_ok=True)
        self._refuse_overwriting()
        return dataclasses.replace(plan, storage_data=_StoragePrefix(file_prefix(self._rank)))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator only, before any rank writes: the older checkpoint ends here.

        Raises:
            CheckpointWriteError: the directory cannot be prepared, or holds a checkpoint and must not.
        """
        self._refuse_overwriting()
        commit.invalidate(self._path)
        return [
            plan
            if plan.storage_data is not None
            else dataclasses.replace(plan, storage_data=_StoragePrefix(file_prefix(rank)))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; on return they are durable.

        Raises:
            CheckpointWriteError: naming file, offset and cause.
        """
        shards = [_shard(item, planner.resolve_data(item)) for item in plan.items]
        files = plan_save(shards, plan.storage_data.prefix, self._thread_count)
        staged = stage(files)
        try:
            records = write(WriteProgram(files, staged), self._path)
        finally:
            staged.release()
            if self._staging.locked():
                self._staging.release()
        index_of = {id(shard): item.index for shard, item in zip(shards, plan.items, strict=True)}
        results = [
            WriteResult(
                index=index_of[id(item.shard)],
                size_in_bytes=item.nbytes,
                storage_data=_Written(_StorageInfo(file.path, item.offset, item.nbytes), record),
            )
            for file, record in zip(files, records, strict=True)
            for item in file.items
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator only: publish the checkpoint, ``.metadata`` last."""
        written = [(result.index, result.storage_data) for rank in results for result in rank]
        metadata.storage_data = {index: data.info for index, data in written}
        metadata.storage_meta = self.storage_meta()
        content = pickle_metadata(metadata)
        name = commit.METADATA_FILE
        if not self._use_collectives and self._rank is not None:
            commit.publish(self._path, {f"__{self._rank}{name}": content})
            return
        files = sorted({data.file for _, data in written})
        sidecar = encode_sidecar([*files, file_record(name, content)])
        commit.publish(self._path, {commit.SIDECAR_FILE: sidecar, name: content})

    def storage_meta(self) -> StorageMeta:
        """What ``.metadata`` says of this save."""
        return StorageMeta(checkpoint_id=self._path, save_id=self._save_id)

    @property
    def checkpoint_id(self) -> str:
        """The directory written to."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: _Path) -> bool:
        """Whether this writer can write there: to a local path."""
        return _is_local_path(checkpoint_id)

    # --- the async stager protocol ---------------------------------------------------------------------

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state dict in host memory; training may go on as soon as this returns.

        The memory is kept for the next call, unless the save before is still being written from it.
        """
        pinned = torch.cuda.is_available()
        if not self.cache_staged_state_dict or not self._staging.acquire(blocking=False):
            return _copy_state_dict(state_dict, _create_cpu_state_dict(state_dict, pin_memory=pinned))
        structure = _structure(state_dict)
        if self.state_dict_cache is None or structure != self._staged_structure:
            self.state_dict_cache = _create_cpu_state_dict(state_dict, pin_memory=pinned)
            self._staged_structure = structure
        return _copy_state_dict(state_dict, self.state_dict_cache)

    def _refuse_overwriting(self) -> None:
        if not self._overwrite and os.path.exists(os.path.join(self._path, commit.METADATA_FILE)):
            raise CheckpointWriteError(
                f"{self._path} holds a checkpoint and overwrite is False; choose another directory",
                filename=self._path,
            )


def _structure(value: Any, path: tuple[Any, ...] = ()) -> list[Any]:
    """Paths, shapes and dtypes of all tensors: a host copy fits another state dict if these are equal."""
    if isinstance(value, torch.Tensor):
        return [(path, tuple(value.shape), value.dtype, type(value))]
    if isinstance(value, dict):
        return [entry for key, child in value.items() for entry in _structure(child, (*path, key))]
    if isinstance(value, (list, tuple)):
        return [entry for key, child in enumerate(value) for entry in _structure(child, (*path, key))]
    return [(path, type(value))]


def _shard(item: WriteItem, data: torch.Tensor | io.BytesIO) -> Shard:
    if item.type == WriteItemType.BYTE_IO:
        assert isinstance(data, io.BytesIO)
        return ObjectShard(item.index.fqn, data.getvalue())
    assert isinstance(data, torch.Tensor) and item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return TensorShard(item.index.fqn, data.detach(), tuple(chunk.offsets), tuple(item.tensor_data.size))


class FastStorageReader(StorageReader):
    """Reads torch DCP checkpoints straight into the tensors, checking what is read whole.

    Args:
        path: checkpoint directory, written by FastStorageWriter or by torch's own writer.
    """

    def __init__(self, path: _Path) -> None:
        super().__init__()
        self._path = os.fspath(path)
        self._index: CheckpointIndex | None = None

    def reset(self, checkpoint_id: _Path | None = None) -> None:
        """Begin a new load, from ``checkpoint_id`` if one is given."""
        if checkpoint_id:
            self._path = os.fspath(checkpoint_id)
        self._index = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata; with ``rank`` that of one rank, saved without collectives.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError.
        """
        rank = kwargs.get("rank")
        metadata = read_metadata(self._path, "" if rank is None else f"__{rank}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Called on every rank with the metadata to load by."""
        self._index = CheckpointIndex(self._path, metadata)

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
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        load_parts(self._index, [_part(self._index, i, t) for i, t in zip(tensors, targets, strict=True)])
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def checkpoint_id(self) -> str:
        """The directory read from."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: _Path) -> bool:
        """Whether this reader can read there: from a local path."""
        return _is_local_path(checkpoint_id)


def _part(index: CheckpointIndex, item: Any, target: torch.Tensor) -> Part:
    storage: MetadataIndex = item.storage_index
    tensor, piece = index.piece(storage.fqn, tuple(storage.offset or (0,) * target.dim()))
    box = Box(piece.sizes, tuple(item.storage_offsets), tuple(item.lengths), tensor.dtype.itemsize)
    return Part(tensor, piece, box, target)


def _is_local_path(checkpoint_id: _Path) -> bool:
    return isinstance(checkpoint_id, os.PathLike) or "://" not in checkpoint_id
