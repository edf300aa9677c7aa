# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector, out of the way while many objects are made that all stay.

Plans and metadata are made of some objects a tensor. Every so many of them the collector walks through all
objects of the process to find cycles there are none of, which doubles the time.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_depth = 0
_was_enabled = False


def without_collections(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, run without cyclic garbage collection in this process. Nests, in any threads."""

    @functools.wraps(function)
    def paused(*args: P.args, **kwargs: P.kwargs) -> T:
        _pause()
        try:
            return function(*args, **kwargs)
        finally:
            _resume()

    return paused


def _pause() -> None:
    global _depth, _was_enabled
    with _lock:
        if _depth == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _depth += 1


def _resume() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0 and _was_enabled:
            gc.enable()
