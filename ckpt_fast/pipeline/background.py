# SPDX-License-Identifier: Apache-2.0
"""Saves that outlive the call: written by a thread while training goes on, committed by all ranks later."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from ckpt_fast.errors import AsyncSaveError
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.save import Save

logger = logging.getLogger(__name__)


class SaveHandle:
    """One staged save on its way to disk, with what is to happen once it is committed.

    Args:
        job: a save whose ``stage`` has returned; it must own its bytes (``snapshot=True``).
    """

    def __init__(self, job: Save) -> None:
        self._job = job
        self.report = job.report
        self._thread: threading.Thread | None = None
        self.finalize_fns: list[Callable[[], None]] = [self._commit]

    def add_finalize_fn(self, finalize_fn: Callable[[], None]) -> None:
        """Run ``finalize_fn`` on this rank after the commit, in the order added.

        Raises:
            RuntimeError: the save has been scheduled already.
        """
        if self._thread is not None:
            raise RuntimeError("this save is scheduled already; add finalizers before scheduling it")
        self.finalize_fns.append(finalize_fn)

    def start(self) -> None:
        """Begin to write. The thread is not a daemon: a process that exits normally finishes its save."""
        self._thread = threading.Thread(target=self._job.write, name="ckpt_fast-write")
        self._thread.start()

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write (or has failed)."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> None:
        """Block until this rank has written its part."""
        assert self._thread is not None, "wait before start"
        self._thread.join()

    def finalize(self) -> None:
        """Collective. Commit, then run the finalizers.

        Raises:
            AsyncSaveError: on every rank, if a rank failed to write; nothing has been published.
        """
        for finalize_fn in self.finalize_fns:
            finalize_fn()

    def _commit(self) -> None:
        try:
            self._job.commit()
        except Exception as error:
            raise AsyncSaveError(
                f"the save to {self._job.directory} in the background failed: {error}"
            ) from error


class SaveQueue:
    """Saves in flight, oldest first. The interface is that of Megatron-Core's ``AsyncCallsQueue``."""

    def __init__(self) -> None:
        self._in_flight: deque[tuple[int, SaveHandle]] = deque()
        self._next_index = 0

    def schedule_async_request(self, async_request: SaveHandle) -> int:
        """Start a save; returns its number. All ranks schedule the same saves in the same order."""
        index = self._next_index
        self._next_index += 1
        self._in_flight.append((index, async_request))
        async_request.start()
        return index

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list[int]:
        """Collective. Finalize, oldest first, the saves that all ranks have written.

        Args:
            blocking: wait for all of them.
            no_dist: look at this rank only; finalizing itself stays collective.

        Returns:
            The numbers of the saves finalized.

        Raises:
            AsyncSaveError: a save failed; it is no longer in flight.
        """
        finalized = []
        while self._in_flight:
            index, handle = self._in_flight[0]
            if blocking:
                handle.wait()
            elif not self._is_written_everywhere(handle, no_dist):
                break
            self._in_flight.popleft()
            handle.finalize()
            finalized.append(index)
        return finalized

    def get_num_unfinalized_calls(self) -> int:
        """Saves scheduled and not yet finalized."""
        return len(self._in_flight)

    def close(self, abort: bool = False) -> None:
        """Collective. Finalize what is in flight; with ``abort`` leave it unpublished instead."""
        if not abort:
            self.maybe_finalize_async_calls(blocking=True)
        while self._in_flight:
            self._in_flight.popleft()[1].wait()

    @staticmethod
    def _is_written_everywhere(handle: SaveHandle, no_dist: bool) -> bool:
        written = handle.is_written()
        group = ControlGroup()
        if no_dist or group.size == 1:
            return written
        return group.all_true(written)
