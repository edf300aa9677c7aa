# SPDX-License-Identifier: Apache-2.0
"""Noticing, on every rank, that the scheduler wants the job to end, so that it can save first."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ckpt_fast.ranks.group import ControlGroup

logger = logging.getLogger(__name__)


class DistributedSignalHandler:
    """Counts a signal instead of dying of it, while entered.

    Args:
        sig: the signal, normally SIGTERM.
    """

    def __init__(self, sig: signal.Signals | int = signal.SIGTERM) -> None:
        self.sig = signal.Signals(sig)
        self._received = False
        self._installed = False
        self._previous: Any = None

    def __enter__(self) -> DistributedSignalHandler:
        """Start listening. Only the main thread can; elsewhere the signal keeps its effect."""
        self._received = False
        if threading.current_thread() is not threading.main_thread():
            logger.warning("%s is not caught: handlers can be set in the main thread only", self.sig.name)
            return self
        self._previous = signal.signal(self.sig, self._on_signal)
        self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> bool:
        """Give the signal its former effect back; False if it had it already."""
        if not self._installed:
            return False
        # None: the former handler was not set from Python and cannot be restored as it was.
        signal.signal(self.sig, self._previous if self._previous is not None else signal.SIG_DFL)
        self._installed = False
        return True

    @property
    def received(self) -> bool:
        """Whether this rank has received the signal."""
        return self._received

    def signals_received(self) -> list[bool]:
        """Collective: whether each rank has received the signal, in rank order."""
        return ControlGroup().all_gather(self._received)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True
