# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at a chosen point of an action, reproducibly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from linecache import getline
from types import FrameType
from typing import Any


def interrupted_at(
    number: int,
    action: Callable[[], object],
    files: Collection[str] | None = None,
    events: Collection[str] = ("line",),
) -> bool:
    """Return whether Ctrl-C at the event of that number, counted from 1, interrupted the action.

    Args:
        number: beyond the last event, nothing is interrupted.
        action: runs in this thread.
        files: those whose code is counted; None for all Python code.
        events: the ``sys.settrace`` events to count.
    """
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if files is not None and frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = "opcode" in events
        left -= event in events
        if left <= 0 and not _may_keep_a_lock(frame):
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def _may_keep_a_lock(frame: FrameType) -> bool:
    """Whether an exception here might leave a lock taken, as no signal can.

    The line of a ``with`` counts once more when its block ends, before the lock is given back. Then everyone
    who needs it would wait for ever.
    """
    return getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")
