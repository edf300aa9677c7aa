# SPDX-License-Identifier: Apache-2.0
"""A progress line on the terminal during a long save or load."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from ckpt_fast.format.types import readable
from ckpt_fast.jobs.gate import Gate

# What is short passes without a word.
_AFTER_S = 1.0
_EVERY_S = 0.5
_CLEAR = "\r\x1b[K"
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """A block whose saves and loads show no line, as it shows one of its own."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextlib.contextmanager
def shown(what: str, progress: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """While the block runs, show on standard error how far it is, if that is a terminal.

    Args:
        what: is being done, to which checkpoint.
        progress: (bytes done, bytes in all); called from another thread.
    """
    if _hidden.get() or not sys.stderr.isatty():
        yield
        return
    ended = Gate()
    thread = threading.Thread(target=_show, args=(what, progress, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.open()
        thread.join()


def _show(what: str, progress: Callable[[], tuple[int, int]], ended: Gate) -> None:
    begin = time.monotonic()
    done_before = progress()[0]
    if ended.wait(_AFTER_S):
        return
    while True:
        done, total = progress()
        speed = (done - done_before) / (time.monotonic() - begin) / 1e9
        percent = 100 * done // max(total, 1)
        sys.stderr.write(f"{_CLEAR}{what}: {percent} % of {readable(total)}, {speed:.2f} GB/s")
        sys.stderr.flush()
        if ended.wait(_EVERY_S):
            break
    sys.stderr.write(_CLEAR)
    sys.stderr.flush()
