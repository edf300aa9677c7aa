# SPDX-License-Identifier: Apache-2.0
"""A thread that does one thing after the other, and whose end can be waited for with a deadline."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)


class Worker:
    """Runs actions in the order submitted. The thread starts with the first of them.

    It is a daemon: what becomes of unfinished work when the interpreter exits is for its owner to decide,
    before the interpreter would wait for it.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = False

    def submit(self, action: Callable[[], None]) -> None:
        """Run ``action`` behind those submitted so far. It is expected to handle its own errors.

        Raises:
            RuntimeError: the worker is closed.
        """
        if self._closed:
            raise RuntimeError(f"{self._thread.name} takes no more work")
        if self._thread.ident is None:
            self._thread.start()
        self._actions.put(action)

    def close(self) -> None:
        """Take no more actions; the thread ends after the last one."""
        if not self._closed:
            self._closed = True
            self._actions.put(None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of a closed worker; returns whether it came in time."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def is_done(self) -> bool:
        """Whether a closed worker has nothing left to do."""
        return self._closed and not self._thread.is_alive()

    def _run(self) -> None:
        while (action := self._actions.get()) is not None:
            try:
                action()
            except BaseException:
                logger.exception("unhandled in thread %s", self._thread.name)
            # What the action owns must not live on until the next one comes.
            del action
