# SPDX-License-Identifier: Apache-2.0
"""The GPU of a rank, in every thread of its process.

A new thread's current GPU is the first one, whatever that of the thread is which started it. The first call
there that needs a context makes one on that GPU: half a gigabyte of it, for each rank of the machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def this_gpu() -> Callable[[], None]:
    """What another thread calls first, so that this thread's current GPU is the current one there, too."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return lambda: None
    device = torch.cuda.current_device()

    def make_current() -> None:
        # A GPU that has failed says so again when it is needed.
        with contextlib.suppress(RuntimeError):
            torch.cuda.set_device(device)

    return make_current


def on_this_gpu(action: Callable[P, T]) -> Callable[P, T]:
    """``action`` for another thread, which begins with ``this_gpu``."""
    make_current = this_gpu()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        make_current()
        return action(*args, **kwargs)

    return run
