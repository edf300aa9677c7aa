# SPDX-License-Identifier: Apache-2.0
"""The run's queue of saves in the background.

Takes the saves of this package and the requests of Megatron-Core and nvidia-resiliency-ext alike (their
local checkpoints, for instance), which it recognises by their fields. Those packages' own queues run
requests in another process, need a GPU, and wait for ever once that process has died.
"""

from __future__ import annotations

import threading
from typing import Any

from ckpt_fast.errors import AsyncSaveError, CheckpointError
from ckpt_fast.pipeline.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.group import ControlGroup


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
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.finalize_fns = list(request.finalize_fns)

    def start(self) -> None:
        """Stage now, write in a thread that outlives a normal exit."""
        arguments = list(self._request.async_fn_args or ())
        if self._request.preload_fn is not None:
            # By convention what was staged takes the place of the second argument.
            arguments[1] = self._request.preload_fn()
        self._thread = threading.Thread(target=self._write, args=(arguments,), name="ckpt_fast-request")
        self._thread.start()

    def finalize(self) -> None:
        """Collective. Run the finalizers in order, if every rank has written.

        Raises:
            AsyncSaveError: on every rank, if one failed; no finalizer has run then.
        """
        try:
            ControlGroup().agree(self._raise_error)
        except CheckpointError as error:
            raise AsyncSaveError(f"a save in the background failed: {error}") from error
        super().finalize()

    def _write(self, arguments: list[Any]) -> None:
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*arguments, **(self._request.async_fn_kwargs or {}))
        except BaseException as error:
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise CheckpointError(f"{type(self._error).__name__}: {self._error}") from self._error
