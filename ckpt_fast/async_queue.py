# SPDX-License-Identifier: Apache-2.0
"""The run's queue of saves in the background.

Takes the saves of this package and the requests of Megatron-Core and nvidia-resiliency-ext alike (their
local checkpoints, for instance), which it recognises by their fields. Those packages' own queues run
requests in another process, need a GPU, and wait for ever once that process has died.
"""

from __future__ import annotations

from typing import Any

from ckpt_fast.errors import AsyncSaveError, CheckpointError
from ckpt_fast.pipeline import untold
from ckpt_fast.pipeline.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.types import SaveReport
from ckpt_fast.pipeline.worker import Worker


class AsyncCallsQueue(SaveQueue):
    """A SaveQueue that also takes the ``AsyncRequest`` of either package."""

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
        # Not SaveHandle's: there is no job of the pipeline behind this save.
        self._request = request.freeze()
        self._failure: BaseException | None = None
        self._worker = Worker("ckpt_fast-request")
        self.report = SaveReport(f"a request of {type(request).__module__}")
        self.finalize_fns = [self._agree, *request.finalize_fns]
        self._deadline = None
        self._outcome = None

    @property
    def ranks(self) -> int:
        """All ranks."""
        return ControlGroup().size

    def start(self) -> None:
        """Stage now, write in a thread."""
        arguments = list(self._request.async_fn_args or ())
        if self._request.preload_fn is not None:
            # By convention what was staged takes the place of the second argument.
            arguments[1] = self._request.preload_fn()
        self._worker.submit(lambda: self._write(arguments))
        self._worker.close()
        super().start()

    def wait_staged(self) -> None:
        """Nothing: the request owns its bytes since ``start``."""

    def progress(self) -> tuple[int, int]:
        """Not known of a foreign request: (0, 0)."""
        return 0, 0

    def is_written(self) -> bool:
        """Whether the request's function has returned, or raised."""
        return self._worker.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has; returns whether that was within ``timeout_s``."""
        return self._worker.wait(timeout_s)

    def cancel(self) -> None:
        """The function cannot be stopped; its finalizers will not run."""
        self._failure = self._failure or CheckpointError("it was cancelled")

    @property
    def failure(self) -> BaseException | None:
        """What the request's function raised; None until then."""
        return self._failure

    def _abandon(self, wait_s: float) -> bool:
        self.cancel()
        return self.wait(wait_s)

    def _agree(self) -> None:
        try:
            ControlGroup().agree(self._raise_failure)
        except CheckpointError as error:
            raise AsyncSaveError(f"a save in the background failed: {error}") from error

    def _write(self, arguments: list[Any]) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*arguments, **(self._request.async_fn_kwargs or {}))
        except BaseException as error:
            self._failure = error
            untold.report(self.directory, error)

    def _raise_failure(self) -> None:
        if not self.wait(max(self._remaining_s(), 0.0)):
            raise CheckpointError("it did not end within the time that CKPT_FAST_TIMEOUT allows")
        if self._failure is not None:
            raise CheckpointError(f"{type(self._failure).__name__}: {self._failure}") from self._failure
