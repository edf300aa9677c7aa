# SPDX-License-Identifier: Apache-2.0
"""Save: plan, stage, encode, write, commit, in this order and on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.pipeline import commit, metrics, owners, progress, untold
from ckpt_fast.pipeline.device_copy import BLOCKING, StagingPolicy
from ckpt_fast.pipeline.encode import encode_metadata, file_record
from ckpt_fast.pipeline.files import Claim, Directory, Files
from ckpt_fast.pipeline.group import ControlGroup, Outcome
from ckpt_fast.pipeline.manifest import Manifest, append_manifest, new_save_id
from ckpt_fast.pipeline.plan import file_prefix
from ckpt_fast.pipeline.types import FileRecord, RankRecord, SaveReport, Shard, shard_nbytes
from ckpt_fast.pipeline.waves import Waves
from ckpt_fast.pipeline.worker import LEAVE_S
from ckpt_fast.settings import Settings

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
        seal_files: name to content, published after ``.metadata`` in the order given; the last is the seal.
        planner_data: torch DCP's name to path mapping, None for Megatron-Core.
        notes: what the manifest is to say besides.
        beside: what this rank has written for the checkpoint elsewhere.
        finish: run by the coordinator once all ranks have written, before the checkpoint is sealed: writes
            what else belongs to it, durably, and returns what that is.
        snapshot: copy CPU tensors while staging, so that training may go on during ``write``.
        staging: how tensors on GPUs are copied for a snapshot; None follows ``CKPT_FAST_STAGING``.
        when_written: called in the writing thread once this rank has written its last byte, or has failed.
        host_buffer: bound on the host buffers in use, in bytes; None follows ``CKPT_FAST_HOST_BUFFER``.
            With a bound smaller than the state ``stage`` waits for the writes of all but the last waves.
        separate: shards whose name begins so get files of their own; see ``plan_save``.
        files: where the checkpoint's files go, if that is not a directory; closed once they are written.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        directory: str,
        *,
        process_group: dist.ProcessGroup | None = None,
        writers: int | None = None,
        common_files: Mapping[str, bytes] | None = None,
        seal_files: Mapping[str, bytes] | None = None,
        planner_data: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        beside: Sequence[FileRecord] = (),
        finish: Callable[[], Sequence[FileRecord]] | None = None,
        snapshot: bool = False,
        staging: StagingPolicy | None = None,
        when_written: Callable[[], None] | None = None,
        host_buffer: int | None = None,
        separate: str | None = None,
        files: Files | None = None,
    ) -> None:
        self.directory = os.fspath(directory)
        self.report = SaveReport(self.directory)
        self._files = files if files is not None else Directory(self.directory)
        self._shards: Sequence[Shard] = shards
        self._group = ControlGroup(process_group)
        self._common_files = dict(common_files or {})
        self._seal_files = dict(seal_files or {})
        self._planner_data = planner_data
        self._notes = dict(notes or {})
        self._beside = list(beside)
        self._finish = finish
        self._snapshot = snapshot
        self._when_written = when_written
        self._writers, self._separate = writers, separate
        self._staging, self._host_buffer = staging, host_buffer
        # Made in ``stage``, where a rank may fail without leaving the others alone.
        self._waves_or_none: Waves | None = None
        self._is_over = False
        self._nbytes = sum(shard_nbytes(shard) for shard in shards)
        self._written: Outcome[RankRecord] | None = None
        self._started = time.perf_counter()

    def stage(self) -> None:
        """Collective. Prepare the directory, plan, bring the bytes to host memory, and begin to write them.

        On return the shards' owners may change them, if ``snapshot`` is set.

        Raises:
            CheckpointError: on every rank, naming the rank that failed. If what was asked for can be refused
                beforehand (settings, options, room, a save to the same directory that is not over), an older
                checkpoint is as before.
        """
        with self._abandoned_if_left():
            self._stage()

    def _stage(self) -> None:
        with self.report.timed("prepare"):
            self._prepare()
        outcome = self._group.attempt(self._stage_shards)
        if outcome.error is not None:
            self._written = Outcome(outcome.rank, error=outcome.error)
        self._shards = ()
        self.report.stall_s = time.perf_counter() - self._started

    @property
    def ranks(self) -> int:
        """How many ranks save together."""
        return self._group.size

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that this rank has handed to the file system, and those it will have in the end, roughly."""
        return min(self._waves.written_nbytes, self._nbytes), self._nbytes

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write (or has failed)."""
        return self._waves.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until this rank has nothing left to write; returns whether that was in time."""
        return self._waves.wait(timeout_s)

    def wait_staged(self) -> None:
        """Local. What the calling thread does to the shards from now on no longer reaches the checkpoint."""
        self._waves.order_behind_copies()

    @property
    def failure(self) -> BaseException | None:
        """What went wrong on this rank while it wrote; None until then."""
        return self._waves.error

    def cancel(self) -> None:
        """Local. Stop writing soon. ``commit`` will raise on every rank, and nothing is published."""
        self._waves.cancel()

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Local. Give the save up without the other ranks; returns whether nothing of it is under way."""
        ended = self._waves_or_none is None or self._waves.abandon(wait_s)
        self._is_over = True
        return ended

    def is_over(self) -> bool:
        """Whether this will not be published any more, and gives no file its name."""
        waves = self._waves_or_none
        stopped = waves is not None and waves.progress.stopped
        return (self._is_over or stopped) and not (waves is not None and waves.progress.renaming)

    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when this rank's files are written; ``commit`` raises what went wrong, everywhere.

        Args:
            timeout_s: longer than this counts as a failure.
        """
        watched = self._group.is_coordinator and not self.is_written()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._abandoned_if_left())
            if watched:
                stack.enter_context(progress.shown(self.directory, lambda: self.progress))
            outcome = self._group.attempt(lambda: self._finish_writing(timeout_s))
        self._written = self._written or outcome

    def commit(self) -> SaveReport:
        """Collective. Publish the checkpoint if every rank has written its part, else raise on every rank."""
        global _last_report
        assert self._written is not None, "commit before write"
        with self.report.timed("commit"), self._abandoned_if_left():
            outcomes = self._group.gather(self._written)
            self._group.decide(lambda: self._publish(outcomes), outcomes)
        self._is_over = True
        untold.forget()
        self.report.seconds = time.perf_counter() - self._started
        if not self._snapshot:
            self.report.stall_s = self.report.seconds
        _last_report = self.report
        metrics.publish(self.report, self._group.global_rank)
        logger.debug("saved %s", self.report)
        return self.report

    @property
    def _waves(self) -> Waves:
        assert self._waves_or_none is not None, "the save was not staged"
        return self._waves_or_none

    @contextlib.contextmanager
    def _abandoned_if_left(self) -> Iterator[None]:
        """Whoever leaves this block by an exception, Ctrl-C included, leaves nobody writing behind."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def _claim(self) -> Claim:
        """Local. All that can be refused, before anything of an older checkpoint is touched."""
        chosen = Settings.read()
        policy = self._staging or StagingPolicy(chosen.staging_mode)
        bound = self._host_buffer if self._host_buffer is not None else chosen.host_buffer_bytes
        self._waves_or_none = Waves(
            self.report,
            file_prefix(self._group.global_rank),
            self._writers,
            snapshot=self._snapshot,
            bound=bound,
            policy=policy if self._snapshot else BLOCKING,
            separate=self._separate,
            files=self._files,
            settings=chosen,
        )
        owners.occupy(self.directory, self)
        return self._files.claim(self._nbytes)

    def _prepare(self) -> None:
        try:
            claims = self._group.gather(self._group.attempt(self._claim))
            self._group.decide(
                lambda: self._files.prepare([claim.value for claim in claims if claim.value is not None]),
                claims,
            )
        except BaseException:
            self._files.close()
            raise

    def _stage_shards(self) -> None:
        try:
            self._waves.stage(self._shards)
            if self._group.is_coordinator:
                self._waves.then(self._write_common_files)
        finally:
            self._waves.at_end(self._end_writing)
            self._waves.close()

    def _end_writing(self) -> None:
        """In the writing thread, which so keeps this object, and with it the directory, to its end."""
        self._files.close()
        error = self._waves.error
        if self._snapshot and error is not None and not self._waves.progress.stopped:
            untold.report(self.directory, error)
        if self._when_written is not None:
            self._when_written()

    def _write_common_files(self) -> None:
        self._files.publish(self._common_files, self._waves.progress)

    def _finish_writing(self, timeout_s: float | None) -> RankRecord:
        record = self._waves.finish(timeout_s)
        if self._group.is_coordinator:
            common = [file_record(name, content) for name, content in self._common_files.items()]
            record.files.extend(common)
            self.report.count(common)
        record.beside.extend(self._beside)
        return record

    def _publish(self, outcomes: Sequence[Outcome[RankRecord]]) -> None:
        records = [outcome.value for outcome in outcomes if outcome.value is not None]
        metadata = encode_metadata((item for record in records for item in record.items), self._planner_data)
        files = [file for record in records for file in record.files]
        self._require_all_present(files)
        files.extend(self._finish() if self._finish is not None else ())
        files.extend(file_record(name, content) for name, content in self._seal_files.items())
        manifest = Manifest(
            new_save_id(),
            files,
            [digests for record in records for digests in record.digests],
            beside=[file for record in records for file in record.beside],
            notes=self._notes,
        )
        self._files.publish({commit.METADATA_FILE: append_manifest(metadata, manifest), **self._seal_files})

    def _require_all_present(self, files: Sequence[FileRecord]) -> None:
        """The coordinator must see what the others wrote, or the ranks do not share their storage."""
        for file, nbytes in self._files.missing(files):
            path = os.path.join(self.directory, file.path)
            found = "is missing" if nbytes is None else f"has {nbytes} bytes instead of {file.nbytes}"
            raise CheckpointWriteError(
                f"{path} was written by another rank but {found} as this rank sees it. The checkpoint was "
                "not published; the save directory must be on a file system that all ranks share, or in "
                "object storage.",
                filename=path,
            )


def save(shards: Sequence[Shard], directory: str, **options: Any) -> SaveReport:
    """Collective. Save and return when the checkpoint is durable and published; see ``Save``."""
    job = Save(shards, directory, **options)
    job.stage()
    job.write()
    return job.commit()
