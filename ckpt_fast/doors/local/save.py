# SPDX-License-Identifier: Apache-2.0
"""One save of a rank's local checkpoints: written by a thread, finalized by all ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any

from ckpt_fast import native
from ckpt_fast.doors.local.files import Origin, Packed, require_all_values
from ckpt_fast.doors.megatron.stock_queue import Flag
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.manifest import new_save_id
from ckpt_fast.jobs import untold
from ckpt_fast.jobs.job import Job, too_late
from ckpt_fast.jobs.worker import Worker
from ckpt_fast.pipeline.save import seal
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.settings import Settings


def begin(state_dict: Any, in_background: bool) -> Flag | None:
    """Local. What a save begins with, before any rank has done anything: a flag, if it is in the background.

    Raises:
        CheckpointMismatchError: see ``require_all_values``.
        CheckpointWriteError: see ``Flag``.
    """
    require_all_values(state_dict)
    return Flag() if in_background else None


class LocalSave(Job):
    """One save of this rank's states.

    When it is made, the states are packed, so that the trainer may go on; a thread begins to write them.
    ``commit`` is collective.
    """

    def __init__(
        self,
        manager: Any,
        iteration: int,
        states: dict[Any, Any],
        live: Container[int],
        notes: Mapping[str, Any],
        when_written: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(os.fspath(manager.local_ckpt_dir), ControlGroup())
        self._save_id, self._notes = self._group.broadcast((new_save_id(), dict(notes)))
        self._manager = manager
        self._iteration = iteration
        self._in_background = when_written is not None
        self._progress: native.Progress | None = None
        # Which states have started to be written, and which of those exist from an older save.
        self._written: list[Any] = []
        self._replaced: list[Any] = []
        outcome = self._group.attempt(lambda: self._pack(states, live))
        self._packed: dict[Any, Packed] = outcome.value or {}
        self._error: BaseException | None = outcome.error
        self._thread = Worker("ckpt_fast-local", self.cancel)
        try:
            self._worker.submit(self._write)
            if when_written is not None:
                self._worker.submit(when_written)
            self._worker.close()
            self.report.stall_s = self.report.since_call()
        except BaseException:
            self.abandon()
            raise

    @property
    def _worker(self) -> Worker:
        return self._thread

    def cancel(self) -> None:
        """Stop writing soon. ``commit`` will raise; files that are being written are deleted then."""
        self._error = self._error or CheckpointError(f"the local save to {self.directory} was cancelled")
        if self._progress is not None:
            self._progress.stop()

    @property
    def failure(self) -> BaseException | None:
        """The error on this rank; None if there is none so far."""
        return self._error

    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when every state is written; what went wrong is raised by ``commit``."""
        if not self.wait(timeout_s):
            self._error = too_late(self.directory, timeout_s or 0.0)
            self.cancel()

    def commit(self) -> None:
        """Collective. Older local checkpoints end here if every rank has written, else this one does."""
        try:
            self._group.agree(self._raise_error)
        except CheckpointError:
            self._manager._withdraw(self._replaced, self._written)
            raise
        # Now each rank has the state of either save. None of the older ones is removed before all are here.
        self._group.agree(lambda: self._manager._take_places(self._replaced))
        self._manager._discard_replaced(self._replaced)
        self.report.seconds = self.report.since_call()
        if not self._in_background:
            self.report.stall_s = self.report.seconds
        seal.report(self.report, self._group.global_rank)
        if self._in_background:
            threading.Thread(target=self._manager._cleanup, args=(self._iteration, self._notes)).start()
        else:
            self._manager._cleanup(self._iteration, self._notes)

    def _pack(self, states: dict[Any, Any], live: Container[int]) -> dict[Any, Packed]:
        # What a setting says is found out before anything is written.
        Settings.read()
        self._progress = native.Progress()
        return {identity: self._manager._pack(state, identity, live) for identity, state in states.items()}

    def _write(self) -> None:
        outcome = self._group.attempt(self._write_states)
        self._packed = {}
        self.report.written_s = self.report.since_call()
        self.report.directory = self.directory
        if self._in_background and outcome.error is not None and self._error is None:
            untold.report(self.directory, outcome.error)
        self._error = self._error or outcome.error

    def _write_states(self) -> None:
        for identity, packed in self._packed.items():
            assert self._progress is not None, "nothing is packed without it"
            self._written.append(identity)
            if self._manager._has(identity):
                self._replaced.append(identity)
            origin = Origin(self._save_id, identity[0], identity[1], self._notes)
            self._manager._write(packed, origin, self.report, self._progress)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
