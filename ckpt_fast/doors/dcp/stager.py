# SPDX-License-Identifier: Apache-2.0
"""torch's ``DefaultStager`` on our snapshots."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ckpt_fast.doors.dcp.snapshot import snapshots
from ckpt_fast.pipeline.memory.device_copy import DeviceCopies, StagingPolicy
from ckpt_fast.ranks.devices import on_this_gpu


class FastStager(DefaultStager):
    """Copies a state dict to host memory that the process keeps for the next save.

    It is a DefaultStager for code that asks, and shares nothing with it. No option needs a GPU.

    Args:
        config: torch's options. With ``use_async_staging``, ``stage`` returns a future, and the copies from
            GPUs go on while training computes. The others have no effect: memory is page-locked if there is
            a GPU, copies do not block, and as the save runs in this process, no memory need be shared.
    """

    def __init__(self, config: StagingOptions = StagingOptions()) -> None:  # noqa: B008, it is torch's default
        self._config = config
        self._latest: Future[dict[str, Any]] | None = None

    def stage(self, state_dict: dict[str, Any], **_: Any) -> dict[str, Any] | Future[dict[str, Any]]:
        """A copy, complete on return; or with ``use_async_staging`` the future of one.

        Until it is there, tensors on GPUs may be read but not changed. Tensors on the CPU are copied on
        return. An error is raised by the save, on all ranks, not by the future.
        """
        if not self._config.use_async_staging:
            return snapshots.take(state_dict, keep_buffer=True)
        copies = DeviceCopies()
        # Whoever asked for it waits before tensors are changed: that is what the future is for.
        policy = StagingPolicy.chosen(is_protected=lambda _: True)
        staged = snapshots.take(state_dict, True, copies, policy)
        future: Future[dict[str, Any]] = Future()
        future.set_running_or_notify_cancel()  # the save waits for it, and on the other ranks as well
        self._latest = future
        if copies.are_done:
            future.set_result(staged)
        else:
            threading.Thread(
                target=on_this_gpu(_wait), args=(copies, staged, future), name="ckpt_fast-stage", daemon=True
            ).start()
        return future

    def synchronize_staging(self) -> None:
        """Return when the newest copy is complete."""
        if self._latest is not None:
            self._latest.result()

    def close(self) -> None:
        """Nothing to release: host memory is the process's."""


def _wait(copies: DeviceCopies, staged: dict[str, Any], future: Future[dict[str, Any]]) -> None:
    try:
        copies.wait()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(staged)
