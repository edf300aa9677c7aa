# SPDX-License-Identifier: Apache-2.0
"""Saves that outlive the call: written by a thread while training continues, committed by all ranks later."""

from __future__ import annotations

import atexit
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ckpt_fast import settings
from ckpt_fast.errors import AsyncSaveError
from ckpt_fast.jobs import untold, worker
from ckpt_fast.jobs.job import Job
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S
from ckpt_fast.ranks.group import ControlGroup

logger = logging.getLogger(__name__)


class SaveHandle:
    """One staged save on its way to disk, with what is to happen once it is committed.

    All but ``finalize`` and ``result`` is local to this rank, and may be called from any thread.

    Args:
        job: a save whose ``stage`` has returned; it must own its bytes (``snapshot=True``).

    Attributes:
        report: the save's times and sizes; complete once it is finalized.
        finalize_fns: run by ``finalize``, behind the commit.
        follow_up: what the owner of the queue does if the save fails; nothing here looks at it.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.report = job.report
        self.finalize_fns: list[Callable[[], None]] = []
        self.follow_up: Any = None
        self._deadline: float | None = None
        self._outcome: SaveReport | Exception | None = None
        self._is_publishing = False

    @property
    def directory(self) -> str:
        """The checkpoint."""
        return self.report.directory

    @property
    def ranks(self) -> int:
        """The number of ranks that save together."""
        return self._job.ranks

    def add_finalize_fn(self, finalize_fn: Callable[[], None]) -> None:
        """Run ``finalize_fn`` on this rank after the commit, in the order added.

        Raises:
            RuntimeError: the save has been scheduled already.
        """
        if self._deadline is not None:
            raise RuntimeError("this save is scheduled already; add finalizers before scheduling it")
        self.finalize_fns.append(finalize_fn)

    def start(self) -> None:
        """From now on the save has ``CKPT_FAST_TIMEOUT`` seconds, and an exit of the process settles it."""
        self._deadline = time.monotonic() + settings.timeout_s()
        _in_flight.append(self)

    def wait_staged(self) -> None:
        """Return once what this thread does next can no longer reach the checkpoint.

        Copies from a GPU may be on their way when a save returns (see ``CKPT_FAST_STAGING``). This lets its
        work behind them wait, not the host.
        """
        self._job.wait_staged()

    def progress(self) -> tuple[int, int]:
        """Bytes handed to the file system so far, and bytes in all, of this rank."""
        return self._job.progress

    def is_written(self) -> bool:
        """Whether this rank has nothing left to write (or has failed)."""
        return self._job.is_written()

    def is_overdue(self) -> bool:
        """Whether this rank still writes though its time is up."""
        return self._remaining_s() <= 0 and not self.is_written()

    def is_due(self) -> bool:
        """Whether, as far as this rank goes, the next collective step of the save need not wait."""
        if self._is_publishing:
            return self._job.is_published or self._remaining_s() <= 0
        return self.is_written() or self.is_overdue()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until this rank has written its part; returns whether that was within ``timeout_s``."""
        return self._job.wait(timeout_s)

    def cancel(self) -> None:
        """Stop writing on this rank. Finalizing raises on every rank then, and nothing is published."""
        self._job.cancel()

    @property
    def error(self) -> Exception | None:
        """The error that ``finalize`` raised; None before the call and after success."""
        return self._outcome if isinstance(self._outcome, Exception) else None

    def begin_commit(self) -> bool:
        """Collective. Let the coordinator publish while training goes on, if that has not begun.

        Returns:
            Whether ``finalize`` need not wait, the same on every rank.

        Raises:
            AsyncSaveError: on every rank; nothing has been published.
        """
        if self._is_publishing:
            return True
        with self._failures_kept(), self._failing_in_background():
            self._job.write(max(self._remaining_s(), 0.0))
            is_over = self._job.begin_commit()
        self._is_publishing = True
        return is_over

    def finalize(self) -> None:
        """Collective. Wait for the write until its deadline, commit, then run the finalizers.

        Raises:
            AsyncSaveError: on every rank, if a rank failed to write; nothing has been published.
        """
        self._leave()
        with self._failures_kept():
            with self._failing_in_background():
                ready = self._job.wait_published if self._is_publishing else self._job.write
                ready(max(self._remaining_s(), 0.0))
                self._job.commit()
            for finalize_fn in self.finalize_fns:
                finalize_fn()
        self._outcome = self.report

    def result(self) -> SaveReport:
        """The report of a finalized save. A save of a queue is finalized by the queue.

        Raises:
            AsyncSaveError: the save failed.
            RuntimeError: it is not finalized yet.
        """
        if self._outcome is None:
            raise RuntimeError(f"the save to {self.directory} is not finalized yet")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Give the save up without the other ranks: nothing of it will be published by this one.

        Args:
            wait_s: how long to wait for the writing thread to end.

        Returns:
            Whether it has ended.
        """
        self._leave()
        return self._job.abandon(wait_s)

    def settle(self) -> bool | None:
        """Local. The process ends: wait for a commit that has begun, until the save's deadline.

        Returns:
            Whether the checkpoint is published; None: only the coordinator knows.
        """
        return self._job.settle(max(self._remaining_s(), 0.0)) if self._is_publishing else False

    @property
    def failure(self) -> BaseException | None:
        """The error on this rank while writing, even if nobody has asked for it; None if there is none."""
        return self._job.failure

    def _remaining_s(self) -> float:
        if self._deadline is None:  # a signal came before it was started
            self._deadline = time.monotonic() + settings.timeout_s()
        return self._deadline - time.monotonic()

    @contextlib.contextmanager
    def _failures_kept(self) -> Iterator[None]:
        """A block whose error is the save's outcome. It is raised, so it need not be reported at exit."""
        try:
            yield
        except Exception as error:
            self._outcome = error
            self._leave()
            untold.forget(self.directory)
            raise

    @contextlib.contextmanager
    def _failing_in_background(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise AsyncSaveError(f"the save to {self.directory} in the background failed: {error}") from error

    def _leave(self) -> None:
        """An exit of the process has nothing to settle here any more."""
        if self in _in_flight:
            _in_flight.remove(self)


def wait_staged() -> None:
    """``SaveHandle.wait_staged`` of every save in flight: call it before you change tensors being saved.

    The step of an optimizer given to ``save_checkpoint`` does so by itself.
    """
    for handle in list(_in_flight):
        handle.wait_staged()


class SaveQueue:
    """Saves in flight, oldest first. The interface is that of Megatron-Core's ``AsyncCallsQueue``."""

    def __init__(self) -> None:
        self._scheduled: deque[tuple[int, SaveHandle]] = deque()
        self._next_index = 0

    @property
    def handles(self) -> list[SaveHandle]:
        """The saves scheduled and not yet finalized, oldest first."""
        return [handle for _, handle in self._scheduled]

    def schedule_async_request(self, async_request: SaveHandle) -> int:
        """Start a save; returns its number. All ranks schedule the same saves in the same order."""
        index = self._next_index
        self._next_index += 1
        self._scheduled.append((index, async_request))
        try:
            async_request.start()
        except BaseException:
            self._scheduled.pop()
            async_request.abandon()
            raise
        return index

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list[int]:
        """Collective. Finalize, oldest first, the saves that all ranks have written, or whose time is up.

        Without ``blocking``, no rank waits for storage: the coordinator publishes such a save in a thread,
        and a later call finds it published.

        Args:
            blocking: wait for all of them.
            no_dist: look at this rank only; finalizing itself stays collective.

        Returns:
            The numbers of the saves finalized.

        Raises:
            AsyncSaveError: a save failed; it is no longer in flight.
        """
        finalized = []
        while self._scheduled:
            index, handle = self._scheduled[0]
            if not blocking and not self._is_due_everywhere(handle, no_dist):
                break
            try:
                if not blocking and not handle.begin_commit():
                    break
                self._scheduled.popleft()
                handle.finalize()
            except BaseException as error:
                if self._scheduled and self._scheduled[0][1] is handle:
                    self._scheduled.popleft()
                if not isinstance(error, Exception):
                    # An interruption: nothing can find it here later to abandon it.
                    handle.abandon()
                raise
            finalized.append(index)
        return finalized

    def get_num_unfinalized_calls(self) -> int:
        """Saves scheduled and not yet finalized."""
        return len(self._scheduled)

    def close(self, abort: bool = False) -> None:
        """Collective. Finalize what is in flight; with ``abort`` stop it, and leave it unpublished."""
        if not abort:
            self.maybe_finalize_async_calls(blocking=True)
        while self._scheduled:
            _, handle = self._scheduled[0]
            handle.abandon(settings.timeout_s())
            self._scheduled.popleft()

    @staticmethod
    def _is_due_everywhere(handle: SaveHandle, no_dist: bool) -> bool:
        due = handle.is_due()
        group = ControlGroup()
        if no_dist or group.size == 1:
            return due
        return group.all_true(due)


_in_flight: list[SaveHandle] = []


def _settle() -> None:
    """The process ends with saves in flight. One rank alone can finish them; many can no longer agree to."""
    for handle in list(_in_flight):
        if handle.ranks > 1:
            is_published = handle.settle()
            if is_published is not False:
                handle.abandon()
                state = "the checkpoint is published" if is_published else "rank 0 says what became of it"
                logger.warning(
                    "this process ends before the save to %s was finalized: %s, but what was to follow "
                    "(callbacks, deleting older ones) was not run. Call "
                    "maybe_finalize_async_save(..., blocking=True) at the end of training.",
                    handle.directory,
                    state,
                )
                continue
            failed, ended = handle.failure, handle.abandon()
            logger.warning(
                "this process ends before the save to %s was finalized: it is abandoned%s, and the "
                "checkpoint before it stays selected. Call maybe_finalize_async_save(..., blocking=True) at "
                "the end of training.",
                handle.directory,
                "" if ended else " (its thread still waits for the file system)",
            )
            if failed is not None:
                untold.report(handle.directory, failed)
            continue
        try:
            handle.finalize()
            logger.warning("finished the save to %s while the process was ending", handle.directory)
        except Exception:
            # A finalizer of somebody else must not keep the saves behind it from ending.
            logger.exception(
                "the save to %s could not be finished while the process was ending", handle.directory
            )


# Last in, first out: what can be finished is, before the jobs that are left are stopped.
atexit.register(worker.stop_all)
atexit.register(_settle)
