# SPDX-License-Identifier: Apache-2.0
"""Save: plan, stage, encode, write, commit, in this order and on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch.distributed as dist

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.pipeline import commit
from ckpt_fast.pipeline.encode import WriteProgram, encode_metadata, encode_sidecar, file_record
from ckpt_fast.pipeline.group import ControlGroup, Outcome
from ckpt_fast.pipeline.host_buffer import host_buffers
from ckpt_fast.pipeline.plan import FilePlan, cut_waves, file_prefix, item_records, plan_save
from ckpt_fast.pipeline.stage import Staged, copied_nbytes, stage
from ckpt_fast.pipeline.types import FileRecord, RankRecord, SaveReport, Shard
from ckpt_fast.pipeline.write import write

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
        writers: files (and so streams to the file system) per rank.
        common_files: name to content, written durably by the coordinator before anything is published.
        keep_files: names that the caller has already put into the directory.
        seal_files: name to content, published after ``.metadata`` in the order given; the last is the seal.
        planner_data: torch DCP's name to path mapping, None for Megatron-Core.
        snapshot: copy CPU tensors while staging, so that training may go on during ``write``.
        host_buffer: bound on the host buffers in use, in bytes; None follows ``CKPT_FAST_HOST_BUFFER``.
            With a bound smaller than the state ``stage`` waits for the writes of all but the last waves.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        directory: str,
        *,
        process_group: dist.ProcessGroup | None = None,
        writers: int = 1,
        common_files: Mapping[str, bytes] | None = None,
        keep_files: Collection[str] = (),
        seal_files: Mapping[str, bytes] | None = None,
        planner_data: Mapping[str, Any] | None = None,
        snapshot: bool = False,
        host_buffer: int | None = None,
    ) -> None:
        self.directory = os.fspath(directory)
        self.report = SaveReport(self.directory)
        self._shards: Sequence[Shard] = shards
        self._group = ControlGroup(process_group)
        self._writers = writers
        self._common_files = dict(common_files or {})
        self._keep_files = keep_files
        self._seal_files = dict(seal_files or {})
        self._planner_data = planner_data
        self._snapshot = snapshot
        self._bound = host_buffer if host_buffer is not None else settings.host_buffer_bytes()
        self._record = RankRecord([], [])
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="ckpt_fast-write")
        self._waves: list[Future[None]] = []
        self._written: Outcome[RankRecord] | None = None
        self._started = time.perf_counter()

    def stage(self) -> None:
        """Collective. Prepare the directory, plan, bring the bytes to host memory, and begin to write them.

        On return the shards' owners may change them, if ``snapshot`` is set.
        """
        with self._timed("prepare"):
            self._group.decide(lambda: commit.invalidate(self.directory, self._keep_files))
        outcome = self._group.attempt(self._stage_waves)
        if outcome.error is not None:
            self._written = Outcome(outcome.rank, error=outcome.error)
        self._writer.shutdown(wait=False)
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
        with self._timed("commit"):
            outcomes = self._group.gather(self._written)
            self._group.decide(lambda: self._publish(outcomes), outcomes)
        self.report.seconds = time.perf_counter() - self._started
        _last_report = self.report
        logger.debug("saved %s", self.report)
        return self.report

    def _stage_waves(self) -> None:
        sizes = [copied_nbytes(shard, self._snapshot) for shard in self._shards]
        fits = self._bound is None or sum(sizes) <= self._bound
        allocated = host_buffers.allocated_nbytes
        number = 0
        # Two waves share the bound: one is copied while the other is being written.
        for wave in cut_waves(self._shards, sizes, None if fits else (self._bound or 0) // 2):
            with self._timed("plan"):
                files = plan_save(wave, file_prefix(self._group.global_rank), self._writers, number)
                number += len(files)
            with self._timed("stage"):
                staged = stage(files, self._snapshot, None if fits else self._bound)
            self._waves.append(self._writer.submit(self._write_wave, files, staged))
        self.report.host_memory_allocated = host_buffers.allocated_nbytes - allocated
        if self._group.is_coordinator:
            self._waves.append(self._writer.submit(self._write_common_files))

    def _write_wave(self, files: Sequence[FilePlan], staged: Staged) -> None:
        try:
            if self._has_failed():
                return
            with self._timed("encode"):
                program = WriteProgram(files, staged)
            with self._timed("write"):
                self._record.files.extend(write(program, self.directory))
            self._record.items.extend(item_records(files))
        finally:
            staged.release()

    def _has_failed(self) -> bool:
        return any(wave.done() and wave.exception() for wave in self._waves)

    def _write_common_files(self) -> None:
        if self._has_failed():
            return
        for name, content in self._common_files.items():
            commit.write_file_atomic(os.path.join(self.directory, name), content)
            self._record.files.append(file_record(name, content))

    def _finish_writing(self) -> RankRecord:
        # A save that has failed must not go on writing: the next one may use the directory at once.
        wait(self._waves)
        for wave in self._waves:
            wave.result()
        self.report.files = len(self._record.files)
        self.report.nbytes = sum(file.nbytes for file in self._record.files)
        return self._record

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

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.report.steps[step] = self.report.steps.get(step, 0.0) + time.perf_counter() - begin


def save(shards: Sequence[Shard], directory: str, **options: Any) -> SaveReport:
    """Collective. Save and return when the checkpoint is durable and published; see ``Save``."""
    job = Save(shards, directory, **options)
    job.stage()
    job.write()
    report = job.commit()
    report.stall_s = report.seconds
    return report
