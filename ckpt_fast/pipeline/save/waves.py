# SPDX-License-Identifier: Apache-2.0
"""Waves: a rank's shards are staged and written behind, all at once or, under a bound, part by part."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError, CheckpointWriteError
from ckpt_fast.format.types import RankRecord, Shard, shard_nbytes
from ckpt_fast.jobs import trace
from ckpt_fast.jobs.job import too_late
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S, Worker
from ckpt_fast.pipeline.memory.available import default_bound
from ckpt_fast.pipeline.memory.device_copy import BLOCKING, DeviceCopies, StagingPolicy
from ckpt_fast.pipeline.save.encode import WriteProgram
from ckpt_fast.pipeline.save.plan import FilePlan, item_records, plan_save
from ckpt_fast.pipeline.save.program import Prepared, ProgramCache, SaveProgram, prepare, structure_of
from ckpt_fast.pipeline.save.ring import Feed, Ring
from ckpt_fast.pipeline.save.stage import Staged, find_ring, stage
from ckpt_fast.pipeline.save.write import automatic_writers, write
from ckpt_fast.settings import Settings
from ckpt_fast.storage.files import Directory, Files

logger = logging.getLogger(__name__)


class Waves:
    """One save's shards of one rank on their way to files. Local: no collectives.

    What is staged goes to a thread that writes it. Copies that exceed the bound on host buffers go through a
    ring: a batch is copied while those before it are being written.

    Args:
        report: of the save.
        prefix: start of the file names, different on every rank.
        writers: files (and so streams to the file system) per wave; None: as many as are fastest there.
        snapshot: copy CPU tensors while staging, so that they may change during the write.
        bound: bytes of host buffers that this and other saves may use together; None: what is available.
        policy: how tensors on GPUs are copied.
        separate: see ``plan_save``.
        files: where the files go; None: into ``report.directory``, which must exist.
        settings: of the save; None: those in force.
        progress: stops the writing, where that is for others to decide as well.
        first: number of the first file.
        programs: those of earlier saves, and the place to keep this one's; None: nothing is reused.

    Raises:
        ValueError: a setting, ``writers`` or ``bound`` makes no sense.
    """

    def __init__(
        self,
        report: SaveReport,
        prefix: str,
        writers: int | None = None,
        *,
        snapshot: bool = False,
        bound: int | None = None,
        policy: StagingPolicy = BLOCKING,
        separate: str | None = None,
        files: Files | None = None,
        settings: Settings | None = None,
        progress: native.Progress | None = None,
        first: int = 0,
        programs: ProgramCache | None = None,
    ) -> None:
        self._settings = settings if settings is not None else Settings.read()
        if writers is not None and writers < 1:
            raise ValueError(
                f"{writers} files per rank (thread_count, storage_writers_per_rank) are none: use at least "
                "1, or None for as many as are fastest"
            )
        if bound is not None and bound < 1:
            raise ValueError(f"a bound of {bound} bytes on host memory is none: use at least 1, or None")
        self._files = files if files is not None else Directory(report.directory)
        self._report = report
        self._prefix = prefix
        self._writers = writers
        self._snapshot = snapshot
        self._bound = bound
        self._policy = policy
        self._device_copies: list[DeviceCopies] = []
        self._separate = separate
        self._first = first
        self._programs = programs
        self.program: SaveProgram | None = None
        self.structure: bytes | None = None
        self._is_known = False
        self._feed: Feed | None = None
        self._record = RankRecord([], [])
        self.progress = progress if progress is not None else native.Progress()
        self.error: BaseException | None = None
        self.worker = Worker("ckpt_fast-write", self.progress.stop)

    def stage(self, shards: Sequence[Shard] | Prepared, nbytes: int | None = None) -> None:
        """Plan, bring the bytes to host memory and begin to write them.

        With a bound smaller than the state this waits for the writes of all but the last waves. After an
        error, ``finish`` is still to be called.

        Args:
            shards: of this rank.
            nbytes: of all of them, if the caller knows it.
        """
        writers = self._writers or automatic_writers(self._files.directory, self._settings)
        if isinstance(shards, Prepared):
            self._stage_prepared(shards)
            return
        structure = None
        if self._programs is not None:
            with self._report.timed("plan"):
                structure, prepared = self._prepare(shards, writers, self._programs)
                self.structure = structure
            if prepared is not None and prepared.program.suits(self._snapshot, self._bound):
                self._stage_prepared(prepared)
                return
        bound = self._bound
        if bound is None:
            # What is staged is a part of it. To sum that up takes longer than all of this.
            bound = default_bound(sum(map(shard_nbytes, shards)) if nbytes is None else nbytes)
        with self._report.timed("plan"):
            files = plan_save(shards, self._prefix, writers, self._first, self._separate)
            ring = None
            # A ring takes two threads. While the interpreter ends there may be no other.
            if (bound is not None or not self._snapshot) and self.worker.start():
                ring = find_ring(files, self._settings, bound, self._snapshot)
        with self._report.timed("stage"):
            staged = stage(files, self._snapshot, bound, self._policy, ring)
        self._submit(staged, functools.partial(self._write_files, shards, files, staged, structure))

    def _prepare(
        self, shards: Sequence[Shard], writers: int, programs: ProgramCache
    ) -> tuple[bytes | None, Prepared | None]:
        options = (self._prefix, writers, self._first, self._separate, self._snapshot)
        structure = structure_of(shards, options)
        program = programs.find(structure) if structure is not None else None
        return structure, None if program is None else prepare(program, shards)

    def _stage_prepared(self, prepared: Prepared) -> None:
        self.program = program = prepared.program
        self.structure = program.structure
        if program.ring is not None and not self.worker.start():
            raise CheckpointError(
                f"the copies for {self._report.directory} exceed the bound on host memory, and the program, "
                "which is ending, starts no thread to write while they are made. Save before it ends."
            )
        with self._report.timed("stage"):
            staged = program.stage(prepared, self._bound, self._policy)
            if self._snapshot and program.ring is None:
                prepared.let_go()
        self._submit(staged, lambda: self._write_prepared(prepared, staged))
        if self._snapshot:
            prepared.let_go()

    def _submit(self, staged: Staged, write: Callable[[], None]) -> None:
        self._device_copies.append(staged.device_copies)
        self._report.staged_nbytes += staged.copied_nbytes
        self._report.host_memory_allocated += staged.allocated_nbytes

        def run() -> None:
            try:
                self._unless_failed(write)
            finally:
                staged.release()

        try:
            self.worker.submit(run)
        except RuntimeError:  # the process may start no more threads
            staged.release()
            raise
        if staged.feed is not None:
            self._feed = staged.feed
            if self._snapshot:
                self._note_ring(staged.feed.ring)
            with self._report.timed("stage"):
                timeout_s = self._settings.timeout_s if self._snapshot else None
                if not staged.feed.serve(self._late, timeout_s) and not staged.feed.is_closed:
                    raise self._late()
            if self._snapshot:
                staged.feed.leave()

    def _note_ring(self, ring: Ring) -> None:
        is_default = self._bound is None
        bound = ring.nbytes if self._bound is None else self._bound
        self._report.note_waves(len(ring.batch_nbytes), bound, is_default=is_default)

    def _late(self) -> CheckpointError:
        written = f" ({self.written_nbytes} bytes were written)"
        return too_late(self._report.directory, self._settings.timeout_s, written)

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` in the writing thread, once all that has been staged so far is written."""
        self.worker.submit(lambda: self._unless_failed(action))

    def at_end(self, action: Callable[[], None]) -> None:
        """Run ``action`` in the writing thread behind all that has been staged, even after a failure."""
        self.worker.submit(action)

    def close(self) -> None:
        """All is staged: the thread ends once it has written the rest. May be called again."""
        if not self.worker.is_closed:
            self.worker.submit(self._note_end)
            self.worker.close()

    def order_behind_copies(self) -> None:
        """Order everything the calling thread enqueues on GPUs from now on after the staged copies."""
        for copies in self._device_copies:
            copies.order_behind()

    @property
    def written_nbytes(self) -> int:
        """Bytes handed to the file system so far; more than there are if some had to be written again."""
        return self.progress.nbytes

    def cancel(self) -> None:
        """Stop writing; ``finish`` will raise, even if everything is written already."""
        self.progress.stop()

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """``cancel``, and wait until the thread has let go of memory and files; returns whether it has.

        It has not if the file system hangs. Even then none of the files gets its name any more, unless
        ``progress.renaming``.
        """
        ended = self.worker.abandon(wait_s)
        if not ended and wait_s:
            logger.error(
                "the save to %s is given up, but its thread still waits for the storage, which hangs. "
                "Nothing of the save will appear.",
                self._report.directory,
            )
        return ended

    def finish(self, timeout_s: float | None = None) -> RankRecord:
        """Wait until everything is written; raises what went wrong first.

        Unless that is the time, nothing is written any more: the next save may use the directory at once.

        Raises:
            CheckpointError: it is not written within ``timeout_s``, or was cancelled.
        """
        self.close()
        while self._feed is not None and self._feed.serve(self._late, timeout_s):
            pass  # the files are written again
        if not self.worker.wait(timeout_s):
            self.cancel()
            raise self._late()
        if self.error is not None and not (self.progress.stopped and _is_cancellation(self.error)):
            raise self.error
        if self.progress.stopped:
            raise CheckpointError(f"the save to {self._report.directory} was cancelled")
        if self.program is None:
            return self._record
        program = self.program
        return replace(self._record, program=program.token, is_known=self._is_known, objects=program.objects)

    def run(self, shards: Sequence[Shard] | Prepared) -> RankRecord:
        """``stage`` and ``finish``, for callers that have nothing to do in between.

        Whatever ends it early stops the writing, too, so that nobody reads the shards any more.
        """
        try:
            self.stage(shards)
            return self.finish()
        except BaseException:
            self.abandon()
            raise

    def _unless_failed(self, action: Callable[[], None]) -> None:
        if self.error is not None:
            return
        try:
            action()
        except BaseException as error:
            self.error = error

    def _note_end(self) -> None:
        self._report.written_s = self._report.since_call()

    def _write_files(
        self, shards: Sequence[Shard], files: Sequence[FilePlan], staged: Staged, structure: bytes | None
    ) -> None:
        written = self._write(staged, lambda: WriteProgram(files, staged))
        self._record.items.extend(item_records(files))
        if structure is not None and self._programs is not None:
            # What only a plan describes is planned again by the next save.
            with contextlib.suppress(ValueError):
                self.program = SaveProgram(structure, shards, files, staged, written, self._snapshot)
                self._programs.keep(structure, self.program)

    def _write_prepared(self, prepared: Prepared, staged: Staged) -> None:
        program = prepared.program
        self._write(staged, lambda: program.written(prepared, staged))
        self._is_known = program.is_known
        if not self._is_known:
            self._record.items.extend(program.items())

    def _write(self, staged: Staged, encode: Callable[[], WriteProgram]) -> WriteProgram:
        with self._report.timed("drain"):
            staged.wait()
        with self._report.timed("encode"):
            program = encode()
        with self._report.timed("write", files=len(program.paths), nbytes=sum(program.file_nbytes)):
            with self._files.named(), trace.rate("written", lambda: self.progress.nbytes):
                written, digests = write(
                    program, staged, self._files.directory, self._settings, self.progress, self._files.durable
                )
            self._files.hand_over(written, lambda: not self.progress.stopped)
        self._record.files.extend(written)
        self._report.count(written)
        self._record.digests.append(digests)
        return program


def _is_cancellation(error: BaseException) -> bool:
    return isinstance(error, CheckpointWriteError) and error.errno == errno.ECANCELED
