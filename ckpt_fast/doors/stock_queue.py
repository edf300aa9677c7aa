# SPDX-License-Identifier: Apache-2.0
"""Saves in the background for the queues of Megatron-Core and nvidia-resiliency-ext.

Those queues run a request's function in another process. Here that function only waits: threads of this
process write, without a copy of the state on its way to another one. What connects the two is one byte in a
file in memory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt_fast.pipeline.background import SaveHandle
from ckpt_fast.pipeline.save import Save

_POLL_S = 0.01
_SHARED_MEMORY = "/dev/shm"


def as_request(job: Save, request_class: Callable[..., Any]) -> Any:
    """Begin to write a staged save; returns the request that ends when it is written.

    Args:
        job: a save whose ``stage`` has returned, with ``snapshot``.
        request_class: ``AsyncRequest`` of the package whose queue will get it: each takes only its own.

    Returns:
        A request whose one finalizer is collective: it publishes the save, or raises AsyncSaveError on every
        rank if a rank failed. What its owner appends runs behind that.
    """
    handle = _FlaggedHandle(job)
    handle.start()
    return request_class(
        async_fn=wait_until_written,
        async_fn_args=(handle.flag, os.getpid()),
        finalize_fns=[handle.finalize],
        async_fn_kwargs={},
    )


def wait_until_written(flag: str, writer: int) -> None:
    """Return when the byte in file ``flag`` is set, or when there is nobody left who could set it.

    Args:
        flag: path of the file.
        writer: id of the process that writes.
    """
    while _is_alive(writer):
        try:
            if Path(flag).read_bytes() != b"\0":
                return
        except FileNotFoundError:
            return
        time.sleep(_POLL_S)


class _FlaggedHandle(SaveHandle):
    """A save handle that says in a file when it is written."""

    def __init__(self, job: Save) -> None:
        super().__init__(job)
        home = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
        self._flag, self.flag = tempfile.mkstemp(prefix="ckpt_fast-written-", dir=home)
        os.write(self._flag, b"\0")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._write, name="ckpt_fast-write")
        self._thread.start()

    def _write(self) -> None:
        try:
            self._job.write()
        finally:
            os.pwrite(self._flag, b"\1", 0)
            os.close(self._flag)

    def finalize(self) -> None:
        """Collective. Wait for the write, and commit."""
        self.wait()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.flag)
        super().finalize()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
