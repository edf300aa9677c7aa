# SPDX-License-Identifier: Apache-2.0
"""A worker whose owner is interrupted anywhere, in Python's own ``threading`` too, still comes to its end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ckpt_fast.pipeline import worker
from ckpt_fast.pipeline.worker import Worker

FILES = (worker.__file__, threading.__file__)


def interrupted_at(number: int, action: Callable[[], object]) -> bool:
    """Whether Ctrl-C ended the action at the line, or return, of that number that it runs of ``FILES``."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        left -= event in ("line", "return")
        if left == 0:
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


def test_a_wait_that_is_interrupted_anywhere() -> None:
    number = 0
    was_interrupted = True
    while was_interrupted:
        number += 1
        opened, done = threading.Event(), []
        job = Worker("ckpt_fast-test", opened.set)

        def act(opened: threading.Event = opened, done: list[int] = done) -> None:
            opened.wait(10)
            done.append(1)

        job.submit(act)
        job.close()
        threading.Timer(0.002, opened.set).start()
        was_interrupted = interrupted_at(number, job.wait)
        begin = time.monotonic()
        assert job.abandon(5.0) and job.is_done and done == [1]
        assert time.monotonic() - begin < 4
    assert number > 10
