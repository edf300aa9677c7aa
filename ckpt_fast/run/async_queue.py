# SPDX-License-Identifier: Apache-2.0
"""The run's queue of background saves.

Takes the saves of this package and the requests of Megatron-Core and nvidia-resiliency-ext alike (their
local checkpoints, for instance), which it recognises by their fields. Those packages' own queues run
requests in another process, need a GPU, and wait for ever once that process has died.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckpt_fast import settings
from ckpt_fast.doors.megatron.stock_queue import RequestFinalizer
from ckpt_fast.errors import CheckpointError
from ckpt_fast.jobs import untold
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from ckpt_fast.jobs.job import Job, too_late
from ckpt_fast.jobs.worker import LEAVE_S, Worker
from ckpt_fast.ranks.group import ControlGroup


@dataclass
class FailuresInARow:
    """Background saves that failed one after the other; the same on all ranks.

    Attributes:
        count: how many.
        untold: the last one's error, while training goes on in spite of it.
        is_policy_agreed: whether the ranks are known to handle failures alike.
    """

    count: int = 0
    untold: CheckpointError | None = None
    is_policy_agreed: bool = False

    def end(self) -> None:
        """A save succeeded."""
        self.count, self.untold = 0, None


class AsyncCallsQueue(SaveQueue):
    """A SaveQueue that also takes the ``AsyncRequest`` of either package.

    Attributes:
        failures: the saves that failed since the last one that did not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures = FailuresInARow()

    def schedule_async_request(self, async_request: Any) -> int:
        """Start a save; returns its number. Collective in the sense that all ranks schedule the same saves.

        Data that the request still has to stage is staged before this returns.
        """
        own = isinstance(async_request, SaveHandle)
        return super().schedule_async_request(async_request if own else RequestHandle(async_request))


class RequestHandle(SaveHandle):
    """A request of another package, executed by a thread of this process.

    Args:
        request: has ``async_fn``, ``async_fn_args``, ``async_fn_kwargs``, ``preload_fn``, ``finalize_fns``
            and ``freeze()``. It must own its bytes once its ``preload_fn`` has returned.
    """

    def __init__(self, request: Any) -> None:
        frozen = request.freeze()
        self._request_job = _RequestJob(frozen, type(request).__module__)
        super().__init__(self._request_job)
        self.finalize_fns += frozen.finalize_fns

    def start(self) -> None:
        """Stage now, write in a thread."""
        self._request_job.start()
        super().start()


class _RequestJob(Job):
    """The request's function is opaque. It cannot be stopped, only abandoned.

    A request of ours is known by its finalizer: its save is stopped like any other.
    """

    def __init__(self, request: Any, package: str) -> None:
        super().__init__(f"a request of {package}", ControlGroup())
        self._request = request
        self._error: BaseException | None = None
        self._thread = Worker("ckpt_fast-request")

    def start(self) -> None:
        """Local. Run the part that stages, and let a thread run the rest."""
        arguments = list(self._request.async_fn_args or ())
        if self._request.preload_fn is not None:
            # By convention the staged data replaces the second argument.
            arguments[1] = self._request.preload_fn()
        self._thread.submit(lambda: self._run(arguments))
        self._thread.close()

    @property
    def _worker(self) -> Worker:
        return self._thread

    @property
    def failure(self) -> BaseException | None:
        """The error that the request's function raised; None if there is none so far."""
        return self._error

    def cancel(self) -> None:
        """The function keeps running, unless it waits for one of our saves; its finalizers will not run."""
        self._error = self._error or CheckpointError("it was cancelled")
        self._give_up(0.0)

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Local. Give it up without the other ranks; returns whether nothing of it is under way."""
        given_up = self._give_up(wait_s)
        return super().abandon(wait_s) and given_up

    def write(self, timeout_s: float | None = None) -> None:
        """Wait for the function."""
        if not self.wait(timeout_s):
            self._error = too_late(self.directory, settings.timeout_s())

    def commit(self) -> None:
        """Collective. Raise on every rank if the function failed on any."""
        try:
            self._group.agree(self._raise_error)
        except BaseException:
            # Nor will the finalizer run that would commit a save of ours.
            self._give_up(LEAVE_S)
            raise

    def _give_up(self, wait_s: float) -> bool:
        """End the request's save if it is one of ours; returns whether it did."""
        ended = True
        for each in self._request.finalize_fns:
            if isinstance(each, RequestFinalizer):
                ended = each.give_up(wait_s) and ended
        return ended

    def _run(self, arguments: list[Any]) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*arguments, **(self._request.async_fn_kwargs or {}))
        except BaseException as error:
            if self._error is None:  # nobody has given it up
                untold.report(self.directory, error)
            self._error = error

    def _raise_error(self) -> None:
        if isinstance(self._error, CheckpointError):
            raise self._error
        if self._error is not None:
            raise CheckpointError(f"{type(self._error).__name__}: {self._error}") from self._error
