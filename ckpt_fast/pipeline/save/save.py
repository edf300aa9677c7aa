# SPDX-License-Identifier: Apache-2.0
"""Save: plan, stage, encode, write, commit, in this order and on every rank."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.columns.records import WorldRecord
from ckpt_fast.format.manifest import Manifest, file_record, new_save_id
from ckpt_fast.format.types import FileRecord, RankRecord
from ckpt_fast.jobs import progress, trace, untold
from ckpt_fast.jobs.publishing import PublishedJob, Publishing
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S, Worker
from ckpt_fast.pipeline.memory.device_copy import BLOCKING, StagingPolicy
from ckpt_fast.pipeline.save import seal
from ckpt_fast.pipeline.save.gathered import gather_records
from ckpt_fast.pipeline.save.parts import Completion, SaveOptions, Share
from ckpt_fast.pipeline.save.plan import file_prefix
from ckpt_fast.pipeline.save.program import SaveProgram
from ckpt_fast.pipeline.save.sealed import SealedMetadata
from ckpt_fast.pipeline.save.waves import Waves
from ckpt_fast.ranks.group import ControlGroup, Outcome
from ckpt_fast.settings import Settings
from ckpt_fast.storage import owners
from ckpt_fast.storage.commit import renaming
from ckpt_fast.storage.files import Claim, Directory, Files
from ckpt_fast.storage.owners import Hold
from ckpt_fast.storage.patience import while_wanted

logger = logging.getLogger(__name__)

# What a rank needs, and the division of the work that its shards follow.
_WRITING = "write"
_Claims = Sequence[Outcome[tuple[Claim, str | None]]]


class Save(PublishedJob[tuple[bool, float]]):
    """One save in progress. Every rank calls ``stage``, ``write`` and ``commit``, in this order.

    ``stage`` and ``commit`` are collective; ``write`` is local and may run in another thread. The shards'
    memory must not change between ``stage`` and the end of ``write`` unless ``options.snapshot`` is set.

    What is staged goes to a thread that writes it. Of a snapshot that does not fit the bound on host buffers,
    a part is copied while the one before it is being written (``Waves``).

    Args:
        directory: the checkpoint directory, the same on every rank. An older checkpoint in it is one until
            this one is sealed, if ``options.replace`` says so; otherwise it is invalidated by ``stage``.
        collect: gives what this rank brings. Run by ``stage``, before anything is touched, and local.
        options: how it is made.
        completion: what the coordinator does besides.
        process_group: the ranks that save together; None means all.
    """

    def __init__(
        self,
        directory: str,
        collect: Callable[[], Share],
        options: SaveOptions | None = None,
        completion: Completion | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(os.fspath(directory), ControlGroup(process_group))
        self._collect: Callable[[], Share] | None = collect
        self._options = options or SaveOptions()
        self._completion = completion or Completion()
        # Made in ``stage``, where a rank may fail without leaving the others alone.
        self._share: Share | None = None
        self._files: Files = Directory(self.directory)
        self._waves_or_none: Waves | None = None
        self._hold = Hold()
        self._claimed: Claim | None = None
        self._nbytes = 0
        self._planner_data: Mapping[str, Any] | None = None
        self._common_files: Mapping[str, bytes] = {}
        self._beside: list[FileRecord] = []
        self._written: Outcome[RankRecord] | None = None

    def stage(self) -> None:
        """Collective. Prepare the directory, plan, bring the bytes to host memory, and begin to write them.

        On return the shards' owners may change them, if ``options.snapshot`` is set.

        Raises:
            CheckpointError: on every rank, naming the rank that failed. If what was asked for can be refused
                beforehand (settings, options, room, a save to the same directory that is not over), an older
                checkpoint is as before.
        """
        with self._abandoned_if_left(), trace.span("save", directory=self.directory):
            with self.report.timed("prepare"):
                self._prepare()
            outcome = self._group.attempt(self._stage_shards)
            if outcome.error is not None:
                self._written = Outcome(outcome.rank, error=outcome.error)
            self.report.stall_s = self.report.since_call()

    @property
    def structure(self) -> bytes | None:
        """Names the save program of this rank's shards; None if none can describe them, or none is kept."""
        return self._waves.structure

    @property
    def _worker(self) -> Worker:
        return self._waves.worker

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that this rank has handed to the file system, and those it will have in the end, roughly."""
        return min(self._waves.written_nbytes, self._nbytes), self._nbytes

    @property
    def written_to(self) -> str:
        """Where, until it is committed, the checkpoint's files are: in its directory, or beside an older one.

        In object storage always the checkpoint itself.
        """
        return self._files.directory if isinstance(self._files, Directory) else self.directory

    def wait_staged(self) -> None:
        """Local. What the calling thread does to the shards from now on no longer reaches the checkpoint."""
        self._waves.order_behind_copies()

    @property
    def failure(self) -> BaseException | None:
        """The error on this rank while writing; None if there is none so far."""
        return self._waves.error

    def cancel(self) -> None:
        """Local. Stop writing soon. ``commit`` will raise on every rank, and nothing is published."""
        self._waves.cancel()

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Local. Give the save up without the other ranks; returns whether nothing of it is under way."""
        ended = self._waves_or_none is None or self._waves.abandon(wait_s)
        ended = self._stop_publishing(wait_s) and ended
        if ended and self._group.is_coordinator:
            self._files.withdraw()
        self._hold.let_go()
        return ended

    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when this rank's files are written; ``commit`` raises what went wrong, everywhere.

        Args:
            timeout_s: longer than this counts as a failure.
        """
        watched = self._group.is_coordinator and not self.is_written()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._abandoned_if_left())
            stack.enter_context(trace.span("wait for the writes"))
            if watched:
                stack.enter_context(progress.shown(f"saving {self.directory}", lambda: self.progress))
            outcome = self._group.attempt(lambda: self._finish_writing(timeout_s))
        self._written = self._written or outcome

    def commit(self) -> SaveReport:
        """Collective. Publish the checkpoint if every rank has written its part, else raise on every rank."""
        is_known, self.report.seconds = self._publish_everywhere()
        if self._program is not None:
            self._program.is_known = is_known
        self._hold.let_go()
        if not self._options.snapshot:
            self.report.seconds = self.report.stall_s = self.report.since_call()
        seal.report(self.report, self._group.global_rank)
        return self.report

    @property
    def _waves(self) -> Waves:
        assert self._waves_or_none is not None, "the save was not staged"
        return self._waves_or_none

    def _claim(self) -> tuple[Claim, str | None]:
        """Local. All that can be refused, before anything of an older checkpoint is touched."""
        chosen, options = Settings.read(), self._options
        assert self._collect is not None, "a save is staged once"
        with trace.span("collect"):
            self._share, self._collect = self._collect(), None
        if self._share.files is not None:
            self._files = self._share.files
        policy = options.staging or StagingPolicy(chosen.staging_mode)
        self._waves_or_none = Waves(
            self.report,
            file_prefix(self._group.global_rank),
            options.writers,
            snapshot=options.snapshot,
            bound=options.host_buffer if options.host_buffer is not None else chosen.host_buffer_bytes,
            policy=policy if options.snapshot else BLOCKING,
            separate=options.separate,
            files=self._files,
            settings=chosen,
            programs=options.programs,
        )
        self._hold.progress = self._waves.progress
        self._hold.lasts = not self._files.durable
        # It can no longer be committed: stop the thread, which has no reference to this object. Nor may the
        # finalizer have one, as the waves get through the traceback of what went wrong.
        weakref.finalize(self, self._waves.progress.stop).atexit = False
        owners.occupy(self.directory, self._hold)
        self._nbytes = self._share.nbytes
        self._claimed = self._files.claim(self._nbytes)
        return self._claimed, self._share.division

    def _prepare(self) -> None:
        try:
            claims = self._group.collect(self._claim)
            is_prepared, place = self._group.decide(lambda: self._prepare_if_divided(claims), claims)
            if not is_prepared:
                divided = self._group.collect(self._divide)
                place = self._group.decide(lambda: self._prepare_files(divided), divided)
            if place is not None:
                self._files.write_to(place)
        except BaseException:
            self._files.close()
            raise

    def _divide(self) -> tuple[Claim, str | None]:
        """Collective. What this rank needs now that the ranks have agreed which of them saves what."""
        assert self._share is not None and self._claimed is not None
        if self._share.divide is not None:
            self._share = replace(self._share, **self._share.divide()._asdict())
            self._nbytes = self._share.nbytes
        return self._claimed._replace(nbytes=self._nbytes), self._share.division

    def _prepare_if_divided(self, claims: _Claims) -> tuple[bool, str | None]:
        divisions = {each.value[1] for each in claims if each.value is not None}
        if None in divisions or len(divisions) > 1:
            return False, None
        return True, self._prepare_files(claims)

    def _prepare_files(self, claims: _Claims) -> str | None:
        values = [each.value[0] for each in claims if each.value is not None]
        place = self._files.prepare(values, replace=self._options.replace)
        if place is not None:
            self._files.write_to(place)
        self._completion.prepare(place or self.directory)
        return place

    def _stage_shards(self) -> None:
        share, self._share = self._share, None
        assert share is not None
        self._planner_data = share.planner_data
        self._common_files = share.common_files if self._group.is_coordinator else {}
        # The thread knows nothing of this object, nor of the shards beyond their wave.
        files, common, beside, waves = self._files, self._common_files, self._beside, self._waves
        write_beside, directory = share.write_beside, self.written_to
        self._hold.begin(_WRITING)
        try:
            waves.stage(share.shards, self._nbytes)
            waves.then(lambda: files.write_in_order(common, waves.progress, sync_names=False))
            waves.then(lambda: beside.extend(write_beside(directory)))
        finally:
            waves.at_end(
                functools.partial(
                    _end_writing,
                    files,
                    waves,
                    self._hold,
                    self.directory if self._options.snapshot else None,
                    self._options.when_written,
                )
            )
            waves.close()

    def _finish_writing(self, timeout_s: float | None) -> RankRecord:
        record = self._waves.finish(timeout_s)
        common = [file_record(name, content) for name, content in self._common_files.items()]
        record.files.extend(common)
        self.report.count(common)
        record.beside.extend(self._beside)
        return record

    @property
    def _program(self) -> SaveProgram | None:
        return self._waves.program

    def _meet(self) -> Publishing[tuple[bool, float]]:
        assert self._written is not None, "commit before write"
        outcomes, world = gather_records(self._group, self._written)
        sealed = self._program.sealed if self._program is not None else None
        fits = sealed is not None and world.value is not None and self._fits(sealed, world.value)
        is_missing = world.value is not None and world.value.items is None
        if not self._group.all_true(fits or not is_missing):
            outcomes, world = gather_records(self._group, self._with_items())
        return Publishing(
            self.directory,
            self._group,
            [*outcomes, world],
            lambda: self._publish_at_work(world.value, sealed if fits else None),
            self._waves.progress.stop,
        )

    def _fits(self, sealed: SealedMetadata, world: WorldRecord) -> bool:
        return sealed.fits(world.programs, self._planner_data, partial=self._options.partial)

    def _with_items(self) -> Outcome[RankRecord]:
        assert self._written is not None
        record, program = self._written.value, self._program
        if record is None or not record.is_known or program is None:
            return self._written
        return replace(self._written, value=replace(record, items=program.items(), is_known=False))

    def _sealed_anew(self, world: WorldRecord) -> SealedMetadata:
        """The table of contents of items that have come, kept for later saves if all ranks have programs."""
        assert world.items is not None
        if self._program is not None:
            self._program.sealed = None
        programs = world.programs if all(world.programs) else []
        sealed = SealedMetadata(world.items, programs, self._planner_data, partial=self._options.partial)
        if self._program is not None and programs:
            self._program.sealed = sealed
        return sealed

    def _publish_at_work(
        self, world: WorldRecord | None, sealed: SealedMetadata | None
    ) -> tuple[bool, float]:
        assert world is not None
        with self._hold.at_work("publish"), trace.span("publish", directory=self.directory):
            return self._publish(world, sealed)

    def _publish(self, world: WorldRecord, sealed: SealedMetadata | None) -> tuple[bool, float]:
        """Seal the checkpoint, and let others choose it.

        Args:
            world: what all ranks have written.
            sealed: fits it; None: it has the items.

        Returns:
            Whether the ranks may leave out their items next time; seconds since the save began.
        """
        progress = self._waves.progress
        contents = (sealed or self._sealed_anew(world)).encode(world)
        self._files.sync_names()
        files = list(world.files)
        self._require_all_present(files)
        completion = self._completion
        files.extend(completion.finish(self.written_to))
        seals = [file_record(name, content) for name, content in completion.seal_files.items()]
        manifest = Manifest(
            new_save_id(),
            [*files, *seals],
            [contents.digests],
            beside=world.beside,
            notes=completion.notes,
            encoded_table=contents.table,
        )
        self._files.require_kept(files)
        seal.seal(self._files, contents.pickled, manifest, completion.seal_files, progress=progress)
        # Whoever deletes a directory that has no seal yet may still be at it.
        self._files.require_kept(files)
        with renaming(self.directory, progress), while_wanted(lambda: not progress.stopped):
            self._files.take_place()
            completion.select()
        is_known = self._program is not None and self._program.sealed is not None
        return is_known, self.report.since_call()

    def _require_all_present(self, files: Sequence[FileRecord]) -> None:
        """The coordinator must see what the others wrote, or the ranks do not share their storage."""
        for file, nbytes in self._files.missing(files):
            path = os.path.join(self.directory, file.path)
            found = "is missing" if nbytes is None else f"has {nbytes} bytes instead of {file.nbytes}"
            needed = "in one bucket" if "://" in path else "on a file system that all ranks share"
            raise CheckpointWriteError(
                f"{path} was written by another rank but {found} as this rank sees it. The checkpoint was "
                f"not published; all ranks must save {needed}, and nobody else to the same place.",
                filename=path,
            )


def _end_writing(
    files: Files,
    waves: Waves,
    hold: Hold,
    in_background: str | None,
    when_written: Callable[[], None],
) -> None:
    """In the writing thread, which so keeps the hold on the directory to its end."""
    try:
        files.close()
    finally:
        hold.end(_WRITING)
    if in_background is not None and waves.error is not None and not waves.progress.stopped:
        untold.report(in_background, waves.error)
    when_written()
