# SPDX-License-Identifier: Apache-2.0
"""Threads of jobs: one thing after the other, with an end that can be waited for, and be brought about.

Whoever leaves a job (an exception, Ctrl-C, the end of the process) stops it, and waits until its thread has
let go of memory and files. A file system that does not answer is waited for no longer than ``LEAVE_S``.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from ckpt_fast.jobs.gate import Gate
from ckpt_fast.ranks.devices import this_gpu

T = TypeVar("T")
logger = logging.getLogger(__name__)

# A chunk that is on its way takes so long on a slow disk, not longer.
LEAVE_S = 2.0


class Worker:
    """Runs actions in the order submitted. The thread starts with the first of them.

    It is a daemon: what becomes of unfinished work when the interpreter exits is for its owner to decide,
    before the interpreter would wait for it.

    Args:
        name: of the thread.
        stop: lets the action in progress end soon, and those after it at once; None: it cannot be hurried.
    """

    def __init__(self, name: str, stop: Callable[[], None] | None = None) -> None:
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run_in_thread, name=name, daemon=True)
        self._make_gpu_current: Callable[[], None] = lambda: None
        self._stop = stop
        self._closed = False
        # While the process ends, and torch's threads finish what they are at, Python 3.12 starts no other.
        self._is_inline = False
        # ``Thread`` does not tell after a signal: ``start``, interrupted, may or may not have started it, and
        # ``join``, interrupted, takes a thread that runs for one that has ended (before Python 3.13).
        self._process: int | None = None  # that started it
        self._taken = threading.Lock()  # by the thread, or by whoever runs the actions in its place
        self._ended = Gate()

    def submit(self, action: Callable[[], None]) -> None:
        """Run ``action`` behind those submitted so far. It is expected to handle its own errors.

        Raises:
            RuntimeError: the worker is closed, or the process may start no more threads.
        """
        if self._closed:
            raise RuntimeError(f"{self._thread.name} takes no more work")
        if self.start():
            self._actions.put(action)
        else:
            self._do(action)

    def start(self) -> bool:
        """Start the thread, unless it is; returns whether there is one. Else ``submit`` runs the actions.

        Raises:
            RuntimeError: the process may start no more threads.
        """
        if self._process is None and not self._is_inline:
            self._make_gpu_current = this_gpu()
            self._process = os.getpid()
            _running.add(self)
            try:
                self._thread.start()
            except RuntimeError as error:
                self._process = None
                self._is_inline = "interpreter shutdown" in str(error)
                if not self._is_inline:
                    raise
        return not self._is_inline

    def close(self) -> None:
        """Take no more actions; the thread ends after the last one."""
        if not self._closed:
            self._actions.put(None)  # before it counts as closed: whoever is interrupted may close it again
            self._closed = True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of a closed worker; returns whether it came in time."""
        if self._is_running and not self._ended.wait(timeout_s):
            return False
        if self._thread.is_alive() and self._process == os.getpid():
            self._thread.join()
        return True

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Close it, let it stop what can be stopped, and wait; returns whether it has ended.

        Whoever calls this while an exception is on its way is not interrupted by another one.
        """
        if self._stop is not None:
            self._stop()
        self.close()
        deadline = time.monotonic() + wait_s
        while True:
            with contextlib.suppress(BaseException):
                if self._is_running and self._stop is not None:
                    self._run()  # unless the thread does: a signal may have kept it from starting
                return self.wait(max(deadline - time.monotonic(), 0.0))

    @property
    def can_stop(self) -> bool:
        """Whether there is a way to hurry it."""
        return self._stop is not None

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def is_done(self) -> bool:
        """Whether a closed worker has nothing left to do."""
        return self._closed and not self._is_running

    @property
    def _is_running(self) -> bool:
        # In a process that was forked there is no thread, nor will it say that it has ended.
        return self._process == os.getpid() and not self._ended.is_open

    def _run_in_thread(self) -> None:
        self._make_gpu_current()
        self._run()

    def _run(self) -> None:
        if not self._taken.acquire(blocking=False):
            return
        try:
            while (action := self._actions.get()) is not None:
                self._do(action)
                # What the action owns must not live on until the next one comes.
                del action
        finally:
            self._ended.open()

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException:
            logger.exception("unhandled in thread %s", self._thread.name)


_running: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def stop_all() -> None:
    """The process ends: stop the jobs that can be stopped, and wait for them together."""
    deadline = time.monotonic() + LEAVE_S
    left = [worker for worker in list(_running) if worker.can_stop]
    for worker in left:
        worker.abandon(0.0)
    for worker in left:
        if not worker.wait(max(deadline - time.monotonic(), 0.0)):
            logger.error(
                "a thread of ckpt_fast still waits for the file system while the process ends: it hangs"
            )


class _Result(Generic[T]):
    """The result of a call: its return value or its exception."""

    value: T
    error: BaseException | None = None

    def __init__(self, action: Callable[[], T]) -> None:
        try:
            self.value = action()
        except BaseException as error:
            self.error = error

    def get(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value


class Task(Generic[T]):
    """One action in a thread of its own, and what comes of it.

    Args:
        name: of the thread.
        action: anything.
        stop: lets it end soon.
    """

    def __init__(self, name: str, action: Callable[[], T], stop: Callable[[], None]) -> None:
        self._action = action
        self._results: list[_Result[T]] = []
        self._worker = Worker(name, stop)

    def start(self) -> None:
        """Begin. Whatever interrupts this, ``abandon`` ends it.

        Raises:
            RuntimeError: the process may start no more threads.
        """
        self._worker.submit(self._run)
        self._worker.close()

    @property
    def is_done(self) -> bool:
        """Whether ``result`` need not wait."""
        return self._worker.is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; returns whether it came in time."""
        return self._worker.wait(timeout_s)

    def result(self) -> T:
        """Wait; the action's value, or its error raised."""
        self._worker.wait()
        return self._results[0].get()

    def abandon(self, wait_s: float = LEAVE_S) -> bool:
        """Stop it; returns whether it has ended within ``wait_s``."""
        return self._worker.abandon(wait_s)

    def _run(self) -> None:
        self._results.append(_Result(self._action))


def interruptibly(action: Callable[[], T], stop: Callable[[], None]) -> T:
    """``action()``, which a signal may end early, although it stays in native code for long.

    Python runs the handlers of signals in the main thread, between its own instructions. So a thread runs
    the action, and the main thread waits. If a handler raises, the action is stopped and its end waited for:
    it may be writing to memory that the caller is about to let go.

    Args:
        action: anything.
        stop: lets it end soon.
    """
    if threading.current_thread() is not threading.main_thread():
        return action()
    task = Task("ckpt_fast-read", action, stop)
    try:
        try:
            task.start()
        except RuntimeError:  # the process may start no more threads
            return action()
        task.wait()
    except BaseException:
        if not task.abandon():
            logger.error("the file system does not answer: waiting for it, as it may still write to memory")
            task.wait()
        raise
    return task.result()
