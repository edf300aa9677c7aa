# SPDX-License-Identifier: Apache-2.0
"""Save reports for anyone but the caller: a file of JSON lines, listeners, profiler ranges.

None of it can fail a save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckpt_fast import settings, system

if TYPE_CHECKING:
    from ckpt_fast.jobs.report import SaveReport

logger = logging.getLogger(__name__)

try:
    import nvtx
except ImportError:
    nvtx = None

_listeners: list[Callable[[SaveReport], object]] = []


def add_listener(listener: Callable[[SaveReport], object]) -> Callable[[], None]:
    """Call ``listener`` with the ``SaveReport`` of every save that this rank commits from now on.

    It is called in the thread that commits, once the checkpoint is published. An exception in it is logged.

    Returns:
        A function that takes the listener away again.
    """
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def notify(report: Any, rank: int) -> None:
    """Tell all who want to know of a save: listeners, and the file that ``CKPT_FAST_METRICS`` names.

    Listeners hear of saves that are committed only.
    """
    tellers = list(_listeners) if report.error is None else []
    path = settings.metrics_file()
    if path is not None:
        tellers.append(functools.partial(_append, path, rank))
    for tell in tellers:
        try:
            tell(report)
        except Exception:
            logger.warning("the report of the save to %s was lost", report.directory, exc_info=True)


def range_of(step: str) -> contextlib.AbstractContextManager[Any]:
    """An NVTX range around a step of the pipeline, if the package ``nvtx`` is installed."""
    return nvtx.annotate(f"ckpt_fast.{step}") if nvtx is not None else contextlib.nullcontext()


def _append(path: str, rank: int, report: Any) -> None:
    """One line, in one write: the ranks may share the file."""
    record = {"time": time.time(), "rank": rank, **dataclasses.asdict(report)}
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | system.open_flags("O_CLOEXEC")
    file = os.open(path, flags, 0o666)
    try:
        os.write(file, (json.dumps(record) + "\n").encode())
    finally:
        os.close(file)
