# SPDX-License-Identifier: Apache-2.0
"""Save: plan, stage, encode, write, commit, in this order and on every rank."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.pipeline import commit, metrics
from ckpt_fast.pipeline.encode import encode_metadata, encode_sidecar, file_record
from ckpt_fast.pipeline.group import ControlGroup, Outcome
from ckpt_fast.pipeline.plan import file_prefix
from ckpt_fast.pipeline.types import FileRecord, RankRecord, SaveReport, Shard
from ckpt_fast.pipeline.waves import Waves

logger = logging.getLogger(__name__)

_last_report: SaveReport | None = None


def last_report() -> SaveReport | None:
    """The report of the newest save of this process that became durable; None before the first."""
    return _last_report


class Save:
    """One save in progress. Every rank calls ``stage``, ``write`` and ``commit``, in this order.

    ``stage`` and ``commit`` are collective; ``write`` is local and may run in another thread. The shards'
    memory must not change between ``stage`` and the end of ``write`` unless ``snapshot`` is set.

    What is staged goes to a thread that writes it. State that does not fit the bound on host buffers is
    staged in waves, each in files of its own: a wave is copied while the one before it is being written.

    Args:
        shards: what this rank saves. No two ranks save the same piece.
        directory: the checkpoint directory, the same on every rank; an older checkpoint in it is invalidated.
        process_group: the ranks that save together; None means all.
        writers: files (and so streams to the file system) per rank; None: as many as are fastest there.
        common_files: name to content, written durably by the coordinator before anything is published.
        keep_files: names that the caller has already put into the directory.
        seal_files: name to content, published after ``.metadata`` in the order given; the last is the seal.
        planner_data: torch DCP's name to path mapping, None for Megatron-Core.
        snapshot: copy CPU tensors while staging, so that training may go on during ``write``.
        host_buffer: bound on the host buffers in use, in bytes; None follows ``CKPT_FAST_HOST_BUFFER``.
            With a bound smaller than the state ``stage`` waits for the writes of all but the last waves.
        separate: shards whose name begins so get files of their own; see ``plan_save``.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        directory: str,
        *,
        process_group: dist.ProcessGroup | None = None,
        writers: int | None = None,
        common_files: Mapping[str, bytes] | None = None,
        keep_files: Collection[str] = (),
        seal_files: Mapping[str, bytes] | None = None,
        planner_data: Mapping[str, Any] | None = None,
        snapshot: bool = False,
        host_buffer: int | None = None,
        separate: str | None = None,
    ) -> None:
        self.directory = os.fspath(directory)
        self.report = SaveReport(self.directory)
        self._shards: Sequence[Shard] = shards
        self._group = ControlGroup(process_group)
        self._common_files = dict(common_files or {})
        self._keep_files = keep_files
        self._seal_files = dict(seal_files or {})
        self._planner_data = planner_data
        self._snapshot = snapshot
        self._waves = Waves(
            self.report,
            file_prefix(self._group.global_rank),
            writers,
            snapshot=snapshot,
            bound=host_buffer if host_buffer is not None else settings.host_buffer_bytes(),
            separate=separate,
        )
        self._written: Outcome[RankRecord] | None = None
        self._started = time.perf_counter()

    def stage(self) -> None:
        """Collective. Prepare the directory, plan, bring the bytes to host memory, and begin to write them.

        On return the shards' owners may change them, if ``snapshot`` is set.
        """
        with self.report.timed("prepare"):
            self._group.decide(lambda: commit.invalidate(self.directory, self._keep_files))
        outcome = self._group.attempt(self._stage_shards)
        if outcome.error is not None:
            self._written = Outcome(outcome.rank, error=outcome.error)
        self._shards = ()
        self.report.stall_s = time.perf_counter() - self._started

    def write(self) -> None:
        """Local. Return when this rank's files are written; ``commit`` raises what went wrong, everywhere."""
        outcome = self._group.attempt(self._finish_writing)
        self._written = self._written or outcome

    def commit(self) -> SaveReport:
        """Collective. Publish the checkpoint if every rank has written its part, else raise on every rank."""
        global _last_report
        assert self._written is not None, "commit before write"
        with self.report.timed("commit"):
            outcomes = self._group.gather(self._written)
            self._group.decide(lambda: self._publish(outcomes), outcomes)
        self.report.seconds = time.perf_counter() - self._started
        if not self._snapshot:
            self.report.stall_s = self.report.seconds
        _last_report = self.report
        metrics.publish(self.report, self._group.global_rank)
        logger.debug("saved %s", self.report)
        return self.report

    def _stage_shards(self) -> None:
        self._waves.stage(self._shards)
        if self._group.is_coordinator:
            self._waves.then(self._write_common_files)

    def _write_common_files(self) -> None:
        for name, content in self._common_files.items():
            commit.write_file_atomic(os.path.join(self.directory, name), content)

    def _finish_writing(self) -> RankRecord:
        record = self._waves.finish()
        if self._group.is_coordinator:
            common = [file_record(name, content) for name, content in self._common_files.items()]
            record.files.extend(common)
            self.report.count(common)
        return record

    def _publish(self, outcomes: Sequence[Outcome[RankRecord]]) -> None:
        records = [outcome.value for outcome in outcomes if outcome.value is not None]
        metadata = encode_metadata((item for record in records for item in record.items), self._planner_data)
        files = [file for record in records for file in record.files]
        files.append(file_record(commit.METADATA_FILE, metadata))
        self._require_all_present(files[:-1])
        commit.publish(
            self.directory,
            {
                commit.SIDECAR_FILE: encode_sidecar(files),
                commit.METADATA_FILE: metadata,
                **self._seal_files,
            },
        )

    def _require_all_present(self, files: Sequence[FileRecord]) -> None:
        """The coordinator must see what the others wrote, or the ranks do not share a file system."""
        for file in files:
            path = os.path.join(self.directory, file.path)
            try:
                nbytes = os.stat(path).st_size
            except FileNotFoundError:
                nbytes = None
            if nbytes != file.nbytes:
                found = "is missing" if nbytes is None else f"has {nbytes} bytes instead of {file.nbytes}"
                raise CheckpointWriteError(
                    f"{path} was written by another rank but {found} as this rank sees it. The checkpoint "
                    "was not published; the save directory must be on a file system that all ranks share.",
                    filename=path,
                )


def save(shards: Sequence[Shard], directory: str, **options: Any) -> SaveReport:
    """Collective. Save and return when the checkpoint is durable and published; see ``Save``."""
    job = Save(shards, directory, **options)
    job.stage()
    job.write()
    return job.commit()
