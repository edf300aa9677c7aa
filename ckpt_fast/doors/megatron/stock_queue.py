# SPDX-License-Identifier: Apache-2.0
"""Saves in the background for the queues of Megatron-Core and nvidia-resiliency-ext.

Those queues run a request's function in another process. Here that function only waits: threads of this
process write, without a copy of the state on its way to another one. What connects the two is one byte in a
file in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from ckpt_fast.errors import CheckpointWriteError, also_raised_as
from ckpt_fast.jobs import finalizer
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.jobs.job import Job

_POLL_S = 0.01
_SHARED_MEMORY = "/dev/shm"
_NAME = re.compile(r"ckpt_fast-written-(?P<writer>[0-9]{1,9})-[0-9a-f]{16}")


class Flag:
    """A byte in a file in memory, set once a save is written. Who drops the flag removes the file.

    The next flag of any process removes those of processes that were killed, and what its own process could
    not remove.

    Attributes:
        path: of the file.

    Raises:
        CheckpointWriteError: there is no room for it. On this rank only: let all ranks agree.
    """

    def __init__(self) -> None:
        home = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else tempfile.gettempdir()
        _remove_ownerless(home)
        self.path = os.path.join(home, f"ckpt_fast-written-{os.getpid()}-{secrets.token_hex(8)}")
        # Empty once the flag is set: a descriptor that is closed may be that of another file.
        self._files: list[FileIO] = []
        # Before there is a file: a signal may come at any time.
        self._remover = weakref.finalize(self, _discard, self.path, self._files, os.getpid())
        try:
            self._files.append(FileIO(self.path, "x"))
            self._files[0].write(b"\0")
        except OSError as error:
            raise CheckpointWriteError(
                f"a background save needs a file of one byte in {home}, which cannot be written ({error}): "
                "make room there, or save synchronously",
                error.errno,
                self.path,
            ) from error

    def set(self) -> None:
        """The save is written. May be called again, and after ``remove``."""
        with contextlib.suppress(IndexError), self._files.pop() as file:
            file.seek(0)
            file.write(b"\1")

    def remove(self) -> None:
        """Release anyone who is still waiting for the flag."""
        finalizer.run(self._remover)


# Flags of this process that are dropped, and could not be removed.
_left: set[str] = set()


def _remove_ownerless(home: str) -> None:
    """Remove the flags of processes that are gone. What finalizes a save waits for its writer in any case."""
    for name in os.listdir(home):
        match, path = _NAME.fullmatch(name), os.path.join(home, name)
        if match is not None and (path in _left or not _is_alive(int(match["writer"]))):
            with contextlib.suppress(OSError):  # another user's, or removed by another process just now
                os.unlink(path)
                _left.discard(path)


def _discard(path: str, files: list[FileIO], owner: int) -> None:
    # A process that was forked has a copy of everything but the file.
    if os.getpid() == owner:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError:  # a byte that stays fails no save
            _left.add(path)
    with contextlib.suppress(IndexError):
        files.pop().close()


class RequestFinalizer:
    """The finalizer of a request: collective, it publishes the save. Who drops it gives the save up.

    Args:
        handle: the save, started.
        flag: of it.
        foreign: the kind of error that the queue's owner catches, which errors are of as well.
    """

    def __init__(self, handle: SaveHandle, flag: Flag, foreign: type[BaseException]) -> None:
        self._handle = handle
        self._flag = flag
        self._foreign = foreign
        self._giver_up = weakref.finalize(self, _give_up, handle, flag)
        self._giver_up.atexit = False

    def __call__(self) -> None:
        """Collective. AsyncSaveError on every rank if a rank failed."""
        self._flag.remove()
        try:
            with also_raised_as(self._foreign):
                self._handle.finalize()
        except Exception:
            self._giver_up.detach()  # the traceback that the handle keeps has a reference to this object
            raise

    def give_up(self, wait_s: float) -> bool:
        """Local. The request will not be finalized; returns whether the save has ended within ``wait_s``."""
        return _give_up(self._handle, self._flag, wait_s)


def as_request(job: Job, flag: Flag, request_class: Callable[..., Any], foreign: type[BaseException]) -> Any:
    """The request that ends when a staged save is written.

    Args:
        job: a save whose ``stage`` has returned, with ``snapshot`` and with ``flag.set`` as ``when_written``.
        flag: of this save.
        request_class: ``AsyncRequest`` of the package whose queue will get it: each takes only its own.
        foreign: see ``RequestFinalizer``.

    Returns:
        A request whose one finalizer is collective: it publishes the save, or raises AsyncSaveError on every
        rank if a rank failed. What its owner appends runs behind that. Who drops the request gives the save
        up.
    """
    handle = SaveHandle(job)
    request_finalizer = RequestFinalizer(handle, flag, foreign)
    handle.start()
    return request_class(
        async_fn=wait_until_written,
        async_fn_args=(flag.path, os.getpid()),
        finalize_fns=[request_finalizer],
        async_fn_kwargs={},
    )


def _give_up(handle: SaveHandle, flag: Flag, wait_s: float = 0.0) -> bool:
    """Give up the save: no process is left that could finalize it, or it is finalized already."""
    flag.remove()
    return handle.abandon(wait_s)


def wait_until_written(flag: str, writer: int) -> None:
    """Return when the byte in file ``flag`` is set, or when no process is left that could set it.

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


def _is_alive(process: int) -> bool:
    # On Windows the question would be a Ctrl-C; there the processes of the queues end with their owner.
    if sys.platform != "win32":
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return True
