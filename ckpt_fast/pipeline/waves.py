# SPDX-License-Identifier: Apache-2.0
"""Waves: a rank's shards are staged and written behind, all at once or, under a bound, part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ckpt_fast.pipeline.encode import WriteProgram
from ckpt_fast.pipeline.plan import FilePlan, cut_waves, item_records, plan_save
from ckpt_fast.pipeline.stage import Staged, copied_nbytes, stage
from ckpt_fast.pipeline.types import RankRecord, SaveReport, Shard
from ckpt_fast.pipeline.write import automatic_writers, write


class Waves:
    """One save's shards of one rank on their way to files. Local: no collectives.

    What is staged goes to a thread that writes it. Shards whose copies exceed the bound on host buffers are
    staged in waves, each in files of its own: a wave is copied while the one before it is being written.

    Args:
        report: of the save; ``report.directory`` is where the files go, and must exist.
        prefix: start of the file names, different on every rank.
        writers: files (and so streams to the file system) per wave; None: as many as are fastest there.
        snapshot: copy CPU tensors while staging, so that they may change during the write.
        bound: bytes of host buffers that this and other saves may use together; None: no bound.
        separate: see ``plan_save``.
    """

    def __init__(
        self,
        report: SaveReport,
        prefix: str,
        writers: int | None = None,
        *,
        snapshot: bool = False,
        bound: int | None = None,
        separate: str | None = None,
    ) -> None:
        self._report = report
        self._prefix = prefix
        self._writers = writers
        self._snapshot = snapshot
        self._bound = bound
        self._separate = separate
        self._record = RankRecord([], [])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ckpt_fast-write")
        self._actions: list[Future[None]] = []

    def stage(self, shards: Sequence[Shard]) -> None:
        """Plan, bring the bytes to host memory and begin to write them.

        With a bound smaller than the state this waits for the writes of all but the last waves. After an
        error, ``finish`` is still to be called.
        """
        waves: Sequence[Sequence[Shard]] = [shards]
        limit = None
        if self._bound is not None:
            sizes = [copied_nbytes(shard, self._snapshot) for shard in shards]
            if sum(sizes) > self._bound:
                # Two waves share the bound: one is copied while the other is being written.
                limit = self._bound // 2
                waves = cut_waves(shards, sizes, limit)
        writers = self._writers if self._writers is not None else automatic_writers(self._report.directory)
        number = 0
        for wave in waves:
            with self._report.timed("plan"):
                files = plan_save(wave, self._prefix, writers, number, self._separate)
                number += len(files)
            with self._report.timed("stage"):
                staged = stage(files, self._snapshot, self._bound, limit or 0)
            self._report.host_memory_allocated += staged.allocated_nbytes
            self._actions.append(self._thread.submit(self._write_wave, files, staged))

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` in the writing thread, once all that has been staged so far is written."""
        self._actions.append(self._thread.submit(self._unless_failed, action))

    def finish(self) -> RankRecord:
        """Wait until everything is written; raises what went wrong first.

        In either case nothing is written any more: the next save may use the directory at once.
        """
        self._thread.shutdown()
        for action in self._actions:
            action.result()
        return self._record

    def run(self, shards: Sequence[Shard]) -> RankRecord:
        """``stage`` and ``finish``, for callers that have nothing to do in between."""
        try:
            self.stage(shards)
        finally:
            self._thread.shutdown()
        return self.finish()

    def _write_wave(self, files: Sequence[FilePlan], staged: Staged) -> None:
        try:
            self._unless_failed(lambda: self._write(files, staged))
        finally:
            staged.release()

    def _unless_failed(self, action: Callable[[], None]) -> None:
        if not any(earlier.done() and earlier.exception() for earlier in self._actions):
            action()

    def _write(self, files: Sequence[FilePlan], staged: Staged) -> None:
        with self._report.timed("encode"):
            program = WriteProgram(files, staged)
        with self._report.timed("write"):
            written = write(program, self._report.directory)
        self._record.files.extend(written)
        self._report.count(written)
        self._record.items.extend(item_records(files))
