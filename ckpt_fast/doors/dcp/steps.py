# SPDX-License-Identifier: Apache-2.0
"""Tracks torch's calls to a storage writer as one save, in one thread, with a defined end.

torch tells a writer when a save begins, but not when it fails on another rank. It makes all calls for one
save in one thread, though: the next save there, or the end of the thread, is the end of the save before.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ckpt_fast import native
from ckpt_fast.jobs import untold
from ckpt_fast.jobs.worker import Worker
from ckpt_fast.storage import owners

P = ParamSpec("P")
T = TypeVar("T")


class _Hold:
    """A save's hold on its directory, from its plan to its publication."""

    def __init__(self) -> None:
        self.progress: native.Progress | None = None
        self.worker: weakref.ref[Worker] | None = None
        self._thread = threading.current_thread()

    def is_over(self) -> bool:
        """Whether it ended, or its thread did or has gone on to another save, and nothing is under way."""
        worker = self.worker() if self.worker is not None else None
        if worker is not None and worker.is_closed and not worker.is_done:
            return False
        if self.progress is not None and self.progress.renaming:
            return False
        return _holds.get(self._thread) is not self or not self._thread.is_alive()


_holds: weakref.WeakKeyDictionary[threading.Thread, _Hold] = weakref.WeakKeyDictionary()
# Those whose saves have ended, but not what they have asked of object storage.
_lasting: weakref.WeakKeyDictionary[Worker, _Hold] = weakref.WeakKeyDictionary()


def hold(name: str, wait_s: float) -> None:
    """Local. The directory is this thread's save's from now on; see ``owners.occupy``.

    Raises:
        CheckpointWriteError: another save to it does not end within ``wait_s`` seconds.
    """
    mine = _Hold()
    _holds[threading.current_thread()] = mine
    owners.occupy(name, mine, wait_s)


def written_by(progress: native.Progress, worker: Worker | None = None) -> None:
    """This thread's save writes under ``progress``.

    Args:
        progress: of the writing.
        worker: given if what it is at cannot be taken back once the save is given up, as in object storage.
    """
    mine = _holds.get(threading.current_thread())
    if mine is not None:
        mine.progress = progress
    if mine is not None and worker is not None:
        mine.worker = weakref.ref(worker)
        _lasting[worker] = mine


def let_go() -> None:
    """The save that this thread was at, if any, has ended, in whatever way."""
    _holds.pop(threading.current_thread(), None)


def step(method: Callable[P, T]) -> Callable[P, T]:
    """A call that is part of a save. An error ends the save, and is logged if it is a background save."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            let_go()
            if threading.current_thread() is not threading.main_thread():
                writer: Any = args[0]
                untold.report(writer._save.path, error)
            raise

    return called


def last_step(method: Callable[P, T]) -> Callable[P, T]:
    """The call that publishes, and so ends the save."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        result = step(method)(*args, **kwargs)
        let_go()
        untold.forget()
        return result

    return called
