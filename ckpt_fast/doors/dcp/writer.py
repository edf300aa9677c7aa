# SPDX-License-Identifier: Apache-2.0
"""The storage writer of the torch DCP door, for ``dcp.save`` and ``dcp.async_save``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ckpt_fast.doors.dcp.places import Place, StrPath, is_served, located, place_of, require_own, torch_path
from ckpt_fast.doors.dcp.plan_items import leaves_of, planned_nbytes, results_of, shards_of
from ckpt_fast.doors.dcp.planning.columns import ColumnPlan, SavedMetadata, TakesColumns, programs
from ckpt_fast.doors.dcp.planning.planners import FastSavePlanner
from ckpt_fast.doors.dcp.snapshot import snapshots
from ckpt_fast.doors.dcp.steps import hold, last_step, let_go, step, written_by
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.manifest import Manifest, new_save_id
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save import seal
from ckpt_fast.pipeline.save.encode import pickle_metadata, share_parts
from ckpt_fast.pipeline.save.plan import file_prefix
from ckpt_fast.pipeline.save.waves import Waves
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.settings import Settings
from ckpt_fast.storage import commit
from ckpt_fast.storage.files import Claim

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Save:
    """The parameters of one save: destination, name, rank, and how the ranks are coordinated."""

    path: str
    save_id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    rank: int | None = None
    use_collectives: bool = True
    is_coordinator: bool = True

    @property
    def publishes(self) -> bool:
        """Whether this rank will learn that the save is published: torch tells no other."""
        return self.is_coordinator or not self.use_collectives

    @property
    def lone_rank(self) -> int | None:
        """The rank that saves without the others, with metadata of its own; None if they act together."""
        return None if self.use_collectives else self.rank

    @property
    def name(self) -> str:
        """What no two saves may have at the same time."""
        lone = self.lone_rank
        return self.path if lone is None else os.path.join(self.path, file_prefix(lone))

    @property
    def seal(self) -> str:
        """The file that makes it a checkpoint."""
        lone = self.lone_rank
        return METADATA_FILE if lone is None else commit.rank_metadata_file(lone)


class FastStorageWriter(FileSystemWriter):
    """Writes torch DCP checkpoints: parallel, checksummed, fsynced, published atomically.

    It is a FileSystemWriter for code that asks, and shares nothing with it but ``fs`` and ``path``.

    Saves in the background may overlap: each goes to the directory it was started for, from its own copy of
    the state dict. (With several ranks they need a process group each, as in torch.)

    The arguments are those of torch's FileSystemWriter, in its order.

    Args:
        path: checkpoint directory, or its ``msc://`` URL in object storage. An older checkpoint of torch DCP
            in a directory is one until this one is published, which then has other data files; any other ends
            before anything is written, and so it does where there is no room for both.
        single_file_per_rank: no effect: a rank writes ``thread_count`` files, never one for each tensor.
        sync_files: no effect: files are durable before the checkpoint is published. ``CKPT_FAST_FSYNC=0``
            gives that up.
        thread_count: files per rank; None: as many as are fastest there.
        per_thread_copy_ahead: no effect; ``CKPT_FAST_HOST_BUFFER`` limits host memory.
        cache_staged_state_dict: keep the host memory that ``dcp.async_save`` copies into, for the next save
            of this process; False frees it once it is written.
        overwrite: False refuses a directory that holds a complete checkpoint.
        _extensions: stream transforms (compression): none.
        serialization_format: torch's own, which is also the default.

    Attributes:
        report: of the newest save that this rank has begun to write; None before.

    Raises:
        ValueError: stream transforms, or another serialization format, are asked for.
    """

    # ``stage`` returns when the copy is complete.
    _synchronize_after_execute = False

    def __init__(
        self,
        path: StrPath,
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int | None = None,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = True,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: Any = None,
    ) -> None:
        super().__init__(path, single_file_per_rank, sync_files)
        if _extensions:
            raise ValueError(
                f"FastStorageWriter applies no stream transforms, and {len(_extensions)} are asked for in "
                "_extensions: leave them out, or save with torch's FileSystemWriter"
            )
        if getattr(serialization_format, "value", "torch_save") != "torch_save":
            raise ValueError(
                f"FastStorageWriter cannot write {serialization_format}: leave it out, or save with torch's "
                "FileSystemWriter"
            )
        self._thread_count = thread_count
        self.overwrite = overwrite
        self._keep_buffer = cache_staged_state_dict
        self._latest = _Save(located(path))
        self.path = torch_path(self.fs, path)
        # Where the program was when it staged a save that another thread will begin, and the staging thread.
        self._staged_in: tuple[str, int] | None = None
        # torch makes all calls for one save in one thread.
        self._of_thread = threading.local()
        self.report: SaveReport | None = None

    # --- the storage writer protocol, in the order of the calls ---------------------------------------

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin a new save, to ``checkpoint_id`` if one is given."""
        let_go()
        staged_in = self._take_staged_in()
        path = located(checkpoint_id, staged_in) if checkpoint_id else self._latest.path
        self.path = torch_path(self.fs, path)
        self._latest = self._of_thread.announced = _Save(path)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called on every rank; ``rank`` and ``use_collectives`` may be among the keywords."""
        self._of_thread.begin = time.perf_counter()
        announced = self._announced()
        self._of_thread.announced = None
        self._take_staged_in()
        self._of_thread.save = self._latest = dataclasses.replace(
            announced,
            rank=kwargs.get("rank"),
            use_collectives=kwargs.get("use_collectives", True),
            is_coordinator=is_coordinator,
        )

    @step
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Every rank. Settings and options are checked; without collectives every rank names its own files.

        Raises:
            ValueError: a setting, or an option of this writer, makes no sense. All ranks raise it.
            UnavailableError, StorageError: see ``files_of``. All ranks raise it.
            CheckpointWriteError: see ``Spool.room``. All ranks raise it.
        """
        save = self._save
        self._of_thread.settings = chosen = Settings.read()
        self._of_thread.place = place = place_of(save.path)
        self._waves(SaveReport(save.path), "", chosen)
        if not place.files.durable:  # on all ranks, as each has uploads that may still arrive
            hold(save.name, chosen.timeout_s)
        lone_rank, room = save.lone_rank, place.room()
        if lone_rank is not None:
            return dataclasses.replace(plan, storage_data=_StoragePrefix(file_prefix(lone_rank)))
        return plan if room is None else dataclasses.replace(plan, storage_data=room)

    @step
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator only (without collectives: every rank), before writing: make room.

        A save of this process to the same directory that is not over is waited for.

        Raises:
            CheckpointWriteError: the directory cannot be prepared, has too little room, holds a checkpoint
                and must not, or another save to it does not end.
        """
        save = self._save
        hold(save.name, self._settings.timeout_s)
        if not self.overwrite:
            self._place.refuse_overwriting(save.seal)
        self._place.make_room([self._claim(plan) for plan in plans], save.seal, save.lone_rank)
        return [
            plan
            if isinstance(plan.storage_data, _StoragePrefix)
            else dataclasses.replace(plan, storage_data=_StoragePrefix(file_prefix(rank)))
            for rank, plan in enumerate(plans)
        ]

    def _claim(self, plan: SavePlan) -> Claim:
        """What the rank whose plan it is writes, and where, if ``prepare_local_plan`` has said it there."""
        room = self._place.room() if self._save.lone_rank is not None else plan.storage_data
        return (room if isinstance(room, Claim) else Claim(0))._replace(nbytes=planned_nbytes(plan))

    @step
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write this rank's items; on return they are durable.

        Returns:
            What ``finish`` needs to know of them: torch's write results, or for a plan of FastSavePlanner a
            record of bytes.

        Raises:
            CheckpointWriteError: naming file, offset and cause.
        """
        self.report = self._of_thread.report = report = SaveReport(self._save.path)
        report.count_from(getattr(self._of_thread, "begin", time.perf_counter()))
        prefix = self._of_thread.prefix = plan.storage_data.prefix
        first = self._place.first_number(prefix, self._save.seal)
        columns = planner.columns if isinstance(planner, FastSavePlanner) else None
        waves = self._waves(report, prefix, self._settings, first, columns)
        files = self._place.files
        written_by(waves.progress, None if files.durable else waves.worker)
        leaves = columns.leaves if columns is not None else leaves_of(planner)
        with contextlib.closing(files), snapshots.read(leaves) as snapshot:
            if snapshot is not None:
                report.count_from(snapshot.began)
            files.claim(0)  # ``prepare_global_plan`` has looked whether there is room
            if columns is None:
                record = waves.run(shards_of(plan, planner))
            else:
                options = (prefix, first, self._thread_count)
                record = waves.run(columns.shards(plan, self._settings.host_buffer_bytes, options))
        report.seconds = report.stall_s = report.since_call()
        if snapshot is not None:
            report.stall_s = snapshot.seconds
            report.host_memory_allocated += snapshot.allocated_nbytes
        if not self._save.publishes:
            seal.report(report, ControlGroup().global_rank, is_published=False)
        future: Future[Any] = Future()
        written = results_of(plan, record) if columns is None else columns.written(record, waves.structure)
        future.set_result(written)
        return future

    @last_step
    @without_collections
    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """Coordinator only: publish the checkpoint, ``.metadata`` last."""
        save = self._save
        if isinstance(metadata, SavedMetadata):
            metadata.storage_meta = StorageMeta(checkpoint_id=save.path, save_id=save.save_id)
            pickled, manifest = metadata.seal(results)
        else:
            pickled, manifest = self._table_of(metadata, results)
        place = self._place
        # Another process that saves to the directory may have mistaken this rank's files for dead ones. Of
        # objects, one request tells of those of all ranks.
        prefix = self._of_thread.prefix if place.files.durable else ""
        require_own(place.files, [each for each in manifest.files.values() if each.path.startswith(prefix)])
        before = place.superseded(save.seal, save.lone_rank)
        seal.seal(place.files, pickled, manifest, name=save.seal)
        try:
            place.remove(before - set(manifest.files))
        except CheckpointWriteError as error:
            logger.warning("%s", error)
        seal.report(self._of_thread.report, ControlGroup().global_rank)

    def _table_of(self, metadata: Metadata, results: list[list[WriteResult]]) -> tuple[bytes, Manifest]:
        """Complete the metadata of one of torch's planners; returns it as it is stored."""
        save = self._save
        written = [(result.index, result.storage_data) for rank in results for result in rank]
        metadata.storage_data = {index: data.info for index, data in written}
        metadata.storage_meta = StorageMeta(checkpoint_id=save.path, save_id=save.save_id)
        share_parts(metadata)
        manifest = Manifest(
            new_save_id(),
            {data.file for _, data in written},
            [digests for _, data in written for digests in data.digests],
        )
        return pickle_metadata(metadata), manifest

    def storage_meta(self) -> StorageMeta:
        """The entry in ``.metadata`` for the save that is about to begin."""
        announced = self._announced()
        return TakesColumns(checkpoint_id=announced.path, save_id=announced.save_id)

    @property
    def checkpoint_id(self) -> str:
        """The directory written to."""
        return self._announced().path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether this writer can write there: to a local path, or an ``msc://`` URL."""
        return is_served(checkpoint_id)

    # --- the async stager protocol ---------------------------------------------------------------------

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state dict in host memory; training may continue as soon as this returns.

        All of it is one host buffer, which later saves of this process use again. An error is raised by the
        save, on all ranks.
        """
        let_go()
        with contextlib.suppress(FileNotFoundError):  # the current directory may have been deleted
            self._staged_in = os.getcwd(), threading.get_native_id()
        return snapshots.take(state_dict, self._keep_buffer)

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for when ``stage`` has returned."""

    def close(self) -> None:
        """Nothing to release: host memory is the process's, see ``cache_staged_state_dict``."""

    # --- -----------------------------------------------------------------------------------------------

    def _take_staged_in(self) -> str | None:
        """For a save that was staged in another thread, the directory that its relative id is meant in."""
        if self._staged_in is None or self._staged_in[1] == threading.get_native_id():
            return None
        (directory, _), self._staged_in = self._staged_in, None
        return directory

    def _waves(
        self,
        report: SaveReport,
        prefix: str,
        chosen: Settings,
        first: int = 0,
        columns: ColumnPlan | None = None,
    ) -> Waves:
        return Waves(
            report,
            prefix,
            self._thread_count,
            bound=chosen.host_buffer_bytes,
            settings=chosen,
            files=self._place.files,
            first=first,
            programs=programs() if columns is not None else None,
        )

    @property
    def _settings(self) -> Settings:
        """Those of the save that this thread is working on."""
        return getattr(self._of_thread, "settings", None) or Settings.read()

    @property
    def _place(self) -> Place:
        """Where the save goes that this thread is working on."""
        place: Place = self._of_thread.place
        return place

    @property
    def _save(self) -> _Save:
        """The save that this thread is at."""
        return getattr(self._of_thread, "save", self._latest)

    def _announced(self) -> _Save:
        """The save that the next calls in this thread are for."""
        return getattr(self._of_thread, "announced", None) or self._latest

    def __getstate__(self) -> dict[str, Any]:
        # To the process that writes, with AsyncCheckpointerType.PROCESS.
        return {name: value for name, value in self.__dict__.items() if name != "_of_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _of_thread=threading.local())
