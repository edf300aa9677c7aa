# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector, out of the way while many objects are made that all stay.

Plans and metadata are made of some objects a tensor. Every so many of them the collector walks through all
objects of the process to find cycles there are none of, which doubles the time.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()


class _Pause:
    """One call during which there is no collection."""


# By weak reference, and counted by nobody: a signal may keep a call from ending its pause.
_pauses: weakref.WeakSet[_Pause] = weakref.WeakSet()
_is_ours = False  # that the collector is off


def without_collections(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, run without cyclic garbage collection in this process. Nests, in any threads."""

    @functools.wraps(function)
    def paused(*args: P.args, **kwargs: P.kwargs) -> T:
        pause = _Pause()
        try:
            _begin(pause)
            return function(*args, **kwargs)
        finally:
            _end(pause)

    return paused


def _begin(pause: _Pause) -> None:
    global _is_ours
    with _lock:
        _pauses.add(pause)
        if gc.isenabled():
            _is_ours = True
            gc.disable()


def _end(pause: _Pause) -> None:
    global _is_ours
    with _lock:
        _pauses.discard(pause)
        if _is_ours and not _pauses:
            gc.enable()
            _is_ours = False
