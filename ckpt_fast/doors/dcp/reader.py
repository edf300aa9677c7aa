# SPDX-License-Identifier: Apache-2.0
"""The storage reader of the torch DCP door, for ``dcp.load``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ckpt_fast import settings
from ckpt_fast.doors.dcp.agreement import report_unasked, require_same_save
from ckpt_fast.doors.dcp.coverage import require_covered
from ckpt_fast.doors.dcp.places import StrPath, files_of, is_served, located, torch_path
from ckpt_fast.doors.dcp.planning.planners import FastLoadPlanner
from ckpt_fast.doors.dcp.planning.wanted import ReadFrom, Wanted
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.names import METADATA_FILE, SIDECAR_FILE
from ckpt_fast.pipeline.load.decode import Contents, decode_object, read_contents
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_parts
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.load.parts import Part, require_memory
from ckpt_fast.pipeline.load.place import Box
from ckpt_fast.pipeline.load.report import one_load
from ckpt_fast.pipeline.load.unasked import Unasked
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.objects import encoded
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.storage.files import Files
from ckpt_fast.storage.versions import FileVersions

# Takes the place of the identity where every rank has a ``.metadata`` of its own.
_OF_ONE_RANK = "of one rank"


class LocatedData(NamedTuple):
    """What a load plan asks for, found in the checkpoint, and the memory it goes to.

    Attributes:
        planner: the plan's.
        objects: the plan's items that are objects.
        items: the others, which are regions of tensors.
        targets: their destinations.
        parts: where they lie.
    """

    planner: LoadPlanner
    objects: list[ReadItem]
    items: list[ReadItem]
    targets: list[torch.Tensor]
    parts: list[Part]


class FastStorageReader(FileSystemReader):
    """Reads torch DCP checkpoints straight into the tensors, checking what is read whole.

    It is a FileSystemReader for code that asks, and shares nothing with it but ``fs`` and ``path``.

    A load is of one save: ranks that see another ``.metadata`` than rank 0, and files that are replaced while
    they are read, are errors. Of a tensor that is loaded no element is left as it was.
    Whole sections of the checkpoint that no rank asks for (a top-level key, an optimizer's moments) are one
    line of warning, unless the load is partial on purpose.

    Attributes:
        partial: the load leaves out parts of the checkpoint on purpose; as with a planner that has
            ``allow_partial_load`` or loads certain keys.
        unasked: what no rank asked for, after a load, on the rank that coordinates it.

    Args:
        path: checkpoint directory, or its ``msc://`` URL in object storage, written by FastStorageWriter or
            by torch's own writer. In object storage, each rank fetches the whole of every file that it needs.
        _extension_registry: torch DCP's registry of stream transforms (compression), where torch's writer has
            used some that torch itself does not know.
        checkpoint: the checkpoint at ``path``, if it is open already.
    """

    def __init__(
        self, path: StrPath, _extension_registry: Any = None, checkpoint: OpenCheckpoint | None = None
    ) -> None:
        super().__init__(path)
        self._path = located(path)
        self.path = torch_path(self.fs, path)
        self._extensions = _extension_registry
        self._opened = checkpoint
        self._index: CheckpointIndex | None = None
        self._contents: Contents | None = None
        self._files: Files | None = None
        self._identity: str | None = None
        self._versions: FileVersions | None = None
        self._asked: set[str] | None = None
        self._unreadable: Exception | None = None
        self.partial = False
        self.unasked: Unasked | None = None

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin a new load, from ``checkpoint_id`` if one is given."""
        if checkpoint_id:
            self._path = located(checkpoint_id)
            self.path = torch_path(self.fs, checkpoint_id)
            self._opened = None
        self._index = self._contents = self._identity = self._versions = self._asked = self.unasked = None
        self._files = self._unreadable = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata; with ``rank`` that of one rank, saved without collectives.

        torch asks for the second where it cannot have the first, and hides what either raises. So if neither
        can be read, the second is empty, and ``set_up_storage_reader`` raises the error of the first.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError.
            UnavailableError, StorageError: see ``files_of``.
        """
        rank = kwargs.get("rank")
        try:
            return self._read_metadata(rank)
        except Exception as error:
            if rank is not None and self._unreadable is not None:
                return Metadata({})
            self._unreadable = error
            raise

    def _read_metadata(self, rank: int | None) -> Metadata:
        prefix = "" if rank is None else f"__{rank}"
        if self._opened is not None and rank is None:
            self._contents, self._versions = self._opened.contents, self._opened.versions
            self._files = self._opened.files
        else:
            self._read_contents(prefix)
        assert self._contents is not None
        self._unreadable = None
        self._identity = self._contents.identity if rank is None else _OF_ONE_RANK
        metadata = self._contents.metadata
        metadata.storage_meta = ReadFrom(getattr(metadata, "storage_meta", None), self)
        return metadata

    def _read_contents(self, prefix: str) -> None:
        name = prefix + METADATA_FILE
        self._files = files_of(self._path)
        # Of objects nothing is noted: checksums tell whether the data is of another save.
        self._versions = FileVersions(self._path)
        self._versions.note([name])
        with self._files as files:
            files.fetch((name, SIDECAR_FILE))
            self._contents = read_contents(files.directory, prefix)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Called on every rank with the metadata to load by.

        Raises:
            CheckpointError: there is none; see ``read_metadata``.
        """
        if self._unreadable is not None:
            raise self._unreadable
        contents = self._contents
        if contents is None or contents.metadata is not metadata:
            contents = Contents.of(metadata)
        files = self._files or files_of(self._path)
        versions = self._versions or FileVersions(self._path)
        self._index = CheckpointIndex(self._path, contents, self._extensions, files, versions)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, with what identifies the save that it was made for."""
        return dataclasses.replace(plan, storage_data=self._identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are. Called on the coordinator; its error is raised on all ranks.

        Raises:
            CheckpointError: ranks see another save.
        """
        of_ranks = {
            rank: plan.storage_data for rank, plan in enumerate(plans) if isinstance(plan.storage_data, str)
        }
        require_same_save(self._path, self._identity, of_ranks)
        self._asked = {item.storage_index.fqn for plan in plans for item in plan.items}
        for plan in plans:
            if isinstance(plan.planner_data, Wanted):
                names = plan.planner_data.asked
                self._asked.update(self.index.names if names is None else names)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan asks for: ``locate_data``, then ``fill``; or what FastLoadPlanner has prepared.

        Raises:
            CheckpointCorruptError, CheckpointMismatchError, UnsafeCheckpointError.
        """
        direct = planner.direct if isinstance(planner, FastLoadPlanner) else None
        files = self.index.files
        with files.named(), contextlib.closing(files) if self._opened is None else contextlib.nullcontext():
            if direct is None:
                self.fill(self.locate_data(plan, planner))
            else:
                with one_load(self._path, ControlGroup().global_rank):
                    direct.read()
                direct.place()
                self._report_unasked(planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @without_collections
    def locate_data(self, plan: LoadPlan, planner: LoadPlanner) -> LocatedData:
        """Local. Find everything that the plan asks for. Reads no data file, touches no destination.

        Raises:
            CheckpointCorruptError: a part of a tensor is missing.
            CheckpointMismatchError: the plan does not fit the checkpoint or the destinations.
        """
        index = self.index
        require_covered(plan, planner, index.metadata, self._path)
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        for item in objects:
            index.object_extent(item.storage_index.fqn)
        items = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        targets = [_detached(planner.resolve_tensor(item)) for item in items]
        parts = [_part(index, item, target) for item, target in zip(items, targets, strict=True)]
        return LocatedData(planner, objects, items, targets, parts)

    def fill(self, located: LocatedData) -> None:
        """Local. Fill what ``locate_data`` has found a place for.

        Raises:
            CheckpointCorruptError: a checksum differs, a file is short, or the checkpoint was replaced
                meanwhile.
            UnsafeCheckpointError: an object is more than tensors and plain data.
        """
        with one_load(self._path, ControlGroup().global_rank):
            self._fill(self.index, located)
        # A save ends the checkpoint that it overwrites before it touches the data files.
        self.index.versions.require_unchanged()
        self._report_unasked(located.planner)

    def _report_unasked(self, planner: LoadPlanner) -> None:
        """On the coordinator: report the parts that no rank requests."""
        if self._asked is None or self._index is None:
            return
        by_planner = (
            getattr(planner, "allow_partial_load", False) or getattr(planner, "keys", None) is not None
        )
        is_partial = self.partial or by_planner
        self.unasked = report_unasked(self._path, self._index.metadata, self._asked, is_partial=is_partial)
        self._asked = None

    @without_collections
    def _fill(self, index: CheckpointIndex, located: LocatedData) -> None:
        planner = located.planner
        names = [item.storage_index.fqn for item in located.objects]
        _, payloads = load_parts(index, located.parts, names)
        for item, fqn in zip(located.objects, names, strict=True):
            planner.load_bytes(item, io.BytesIO(_harmless(payloads[fqn], f"{fqn} in {self._path}")))
        for item, target in zip(located.items, located.targets, strict=True):
            planner.commit_tensor(item, target)

    @property
    def index(self) -> CheckpointIndex:
        """The table of contents, once ``set_up_storage_reader`` was called."""
        assert self._index is not None, "set_up_storage_reader comes first"
        return self._index

    @property
    def checkpoint_id(self) -> str:
        """The directory read from."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether this reader can read there: from a local path, or an ``msc://`` URL."""
        return is_served(checkpoint_id)


def _detached(target: torch.Tensor) -> torch.Tensor:
    """The target without its history. A sparse one itself: what its alias grows to, the alias alone has."""
    return target.detach() if target.layout == torch.strided else target


def _harmless(payload: bytes, where: str) -> bytes:
    """An object as this process pickles it; torch's planner unpickles without restriction.

    Raises:
        CheckpointCorruptError, UnsafeCheckpointError: see ``decode_object``.
    """
    # Elsewhere the tensors of a GPU could not be restored to it.
    device = None if torch.cuda.is_available() else "cpu"
    value = decode_object(payload, where, verify=True, device=device)
    return payload if settings.pickle_allowed() else encoded(value)


def _part(index: CheckpointIndex, item: ReadItem, target: torch.Tensor) -> Part:
    """The region of a saved piece that a planner wants in ``target``.

    Raises:
        CheckpointMismatchError: the region is not inside the piece, or not of the target's shape; or the
            target is on the meta device.
    """
    lengths, start = tuple(item.lengths), tuple(item.storage_offsets)
    tensor, piece = index.piece(
        item.storage_index.fqn, tuple(item.storage_index.offset or (0,) * len(lengths))
    )
    require_memory(tensor.fqn, target)
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
