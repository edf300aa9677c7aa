# SPDX-License-Identifier: Apache-2.0
"""A gate that opens once: an event that the handler of a signal cannot break.

``threading.Event`` takes its lock in functions written in Python. If a handler raises between two of their
instructions, as Ctrl-C does, the lock stays taken: who sets the event, or waits for it, then waits for ever.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time

# So often a thread that waits looks by itself: another one, interrupted, may have kept the lock.
_LOOK_AGAIN_S = 0.1


class Gate:
    """Closed at first. Any thread may open it, more than once, and any may wait."""

    def __init__(self) -> None:
        self._is_open = False
        self._lock = threading.Lock()
        self._lock.acquire()

    @property
    def is_open(self) -> bool:
        """Whether it was opened."""
        return self._is_open

    def open(self) -> None:
        """Let pass all who wait, and will wait."""
        self._is_open = True
        with contextlib.suppress(RuntimeError):  # it was open
            self._lock.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it opens; returns whether that was in time. A handler that raises ends this."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_open:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._lock.acquire(timeout=min(left, _LOOK_AGAIN_S)):
                self._lock.release()
        return True
