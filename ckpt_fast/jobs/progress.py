# SPDX-License-Identifier: Apache-2.0
"""A progress line on the terminal during a long save."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from ckpt_fast.format.types import readable
from ckpt_fast.jobs.gate import Gate

# Short saves pass without a word.
_AFTER_S = 2.0
_EVERY_S = 0.5
_CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def shown(name: str, progress: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """While the block runs, show on standard error how far it is, if that is a terminal.

    Args:
        name: what is being saved.
        progress: (bytes done, bytes in all); called from another thread.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended = Gate()
    thread = threading.Thread(target=_show, args=(name, progress, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.open()
        thread.join()


def _show(name: str, progress: Callable[[], tuple[int, int]], ended: Gate) -> None:
    begin = time.monotonic()
    done_before = progress()[0]
    if ended.wait(_AFTER_S):
        return
    while True:
        done, total = progress()
        speed = (done - done_before) / (time.monotonic() - begin) / 1e9
        percent = 100 * done // max(total, 1)
        sys.stderr.write(f"{_CLEAR}saving {name}: {percent} % of {readable(total)}, {speed:.2f} GB/s")
        sys.stderr.flush()
        if ended.wait(_EVERY_S):
            break
    sys.stderr.write(_CLEAR)
    sys.stderr.flush()
