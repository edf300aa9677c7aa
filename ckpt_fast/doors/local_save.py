# SPDX-License-Identifier: Apache-2.0
"""One save of local checkpoints: written by a thread, committed by all ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from ckpt_fast import native
from ckpt_fast.doors.local_files import Packed
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline import untold
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.manifest import new_save_id
from ckpt_fast.pipeline.types import SaveReport
from ckpt_fast.pipeline.worker import Worker
from ckpt_fast.settings import Settings

if TYPE_CHECKING:
    from ckpt_fast.doors.local import FastLocalCheckpointManager


class LocalSave:
    """One save of this rank's states, with the interface of ``pipeline.save.Save`` from ``stage`` on.

    When it is made, the states are packed, so that the trainer may go on; a thread begins to write them.
    ``commit`` is collective.
    """

    def __init__(
        self,
        manager: FastLocalCheckpointManager,
        iteration: int,
        states: dict[Any, Any],
        live: Container[int],
        when_written: Callable[[], None] | None = None,
    ) -> None:
        self.directory = os.fspath(manager.local_ckpt_dir)
        self.report = SaveReport(self.directory)
        self.ranks = ControlGroup().size
        self._save_id = ControlGroup().broadcast(new_save_id())
        self._manager = manager
        self._iteration = iteration
        self._in_background = when_written is not None
        self._progress: native.Progress | None = None
        outcome = ControlGroup().attempt(lambda: self._pack(states, live))
        self._packed: dict[Any, Packed] = outcome.value or {}
        self._error: CheckpointError | None = outcome.error
        self._worker = Worker("ckpt_fast-local", self.cancel)
        self._worker.submit(self._write)
        if when_written is not None:
            self._worker.submit(when_written)
        self._worker.close()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes in files that are complete; how many there will be is known in the end."""
        return self.report.nbytes, self.report.nbytes

    def wait_staged(self) -> None:
        """Nothing: the states are this save's own."""

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._worker.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for that; returns whether it came in time."""
        return self._worker.wait(timeout_s)

    def cancel(self) -> None:
        """Stop writing soon. ``commit`` will raise; files that are being written are deleted then."""
        self._error = self._error or CheckpointError(f"the local save to {self.directory} was cancelled")
        if self._progress is not None:
            self._progress.stop()

    def abandon(self, wait_s: float) -> bool:
        """Local. Give the save up without the other ranks; returns whether the thread has ended."""
        return self._worker.abandon(wait_s)

    @property
    def failure(self) -> BaseException | None:
        """What went wrong on this rank; None until then."""
        return self._error

    def write(self, timeout_s: float | None = None) -> None:
        """Local. Return when every state is written; what went wrong is raised by ``commit``."""
        if not self.wait(timeout_s):
            self._error = CheckpointError(
                f"writing to {self.directory} did not end within the time that CKPT_FAST_TIMEOUT allows. The "
                "file system may hang: look at it, or allow more time."
            )
            self.cancel()

    def commit(self) -> None:
        """Collective. Older local checkpoints end here if every rank has written, else this one does."""
        try:
            ControlGroup().agree(self._raise_error)
        except CheckpointError:
            self._manager._cleanup_failed_save(self._iteration)
            raise
        if self._in_background:
            threading.Thread(target=self._manager._cleanup, args=(self._iteration,)).start()
        else:
            self._manager._cleanup(self._iteration)

    def _pack(self, states: dict[Any, Any], live: Container[int]) -> dict[Any, Packed]:
        # What a setting says is found out before anything is written.
        Settings.read()
        self._progress = native.Progress()
        return {identity: self._manager._pack(state, identity, live) for identity, state in states.items()}

    def _write(self) -> None:
        outcome = ControlGroup().attempt(self._write_states)
        self._packed = {}
        if self._in_background and outcome.error is not None and self._error is None:
            untold.report(self.directory, outcome.error)
        self._error = self._error or outcome.error

    def _write_states(self) -> None:
        for identity, packed in self._packed.items():
            assert self._progress is not None, "nothing is packed without it"
            self._manager._write(packed, identity, self._save_id, self.report, self._progress)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
