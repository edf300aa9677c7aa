# SPDX-License-Identifier: Apache-2.0
"""A timeline of saves and loads: who did what when, in the file that ``CKPT_FAST_TRACE`` names.

The format is the JSON array of Chrome's tracing, which Perfetto and chrome://tracing open. An array that is
not closed is valid there: every event is a whole line, written when it happens, so that what was under way
when a process died is in it. Ranks are shown as processes, and may share the file, also over several runs.

Without the variable, a span costs a look at the environment. None of it can fail a save.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from io import FileIO
from typing import Any, ParamSpec, TypeVar

from ckpt_fast import settings
from ckpt_fast.ranks.world import get_rank_safe

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

_SAMPLE_S = 0.01
# Rows beside those of the threads, which have smaller numbers.
_FIRST_ROW = 1 << 30
_traces: dict[tuple[str, int], Trace | None] = {}


class Trace:
    """One process's part of a file of events.

    Args:
        path: of the file; created if missing.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_broken = False
        # Ranks agree on the time of day as far as their machines do; within a process it must not jump.
        self._origin_ns = time.time_ns() - time.perf_counter_ns()
        self._named: set[tuple[int, int]] = set()
        self._file = _open(path)

    def begin(self, name: str, facts: dict[str, Any]) -> None:
        """Something begins in the calling thread."""
        self._write(self._here("B", name=name, cat="ckpt_fast", args=facts))

    def end(self) -> None:
        """What began last in the calling thread ends."""
        self._write(self._here("E"))

    def add(self, row: str, name: str, begin_s: float, end_s: float, facts: dict[str, Any]) -> None:
        """Something that happened elsewhere than in a thread, between two times of ``time.perf_counter``."""
        number = _FIRST_ROW + zlib.crc32(row.encode()) % _FIRST_ROW
        times = {"ts": self._us(begin_s * 1e9), "dur": round((end_s - begin_s) * 1e6, 3)}
        event = {"ph": "X", "name": name, "cat": "ckpt_fast", "args": facts, **times}
        self._write({**event, **self._place(number, row)})

    def count(self, name: str, values: dict[str, float]) -> None:
        """Quantities, as of now."""
        self._write(self._here("C", name=name, args=values))

    def _here(self, phase: str, **more: Any) -> dict[str, Any]:
        thread = threading.current_thread()
        place = self._place(threading.get_native_id(), thread.name)
        return {"ph": phase, "ts": self._us(time.perf_counter_ns()), **place, **more}

    def _us(self, perf_counter_ns: float) -> float:
        return (self._origin_ns + perf_counter_ns) / 1000

    def _place(self, row: int, name: str) -> dict[str, int]:
        """Process and row of an event; their names come before their first event."""
        rank = get_rank_safe()
        place = {"pid": rank, "tid": row}
        if (rank, row) not in self._named:
            if not any(known == rank for known, _ in self._named):
                process = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
                self._write({"ph": "M", "name": "process_name", **place, "args": {"name": process}})
                self._write({"ph": "M", "name": "process_sort_index", **place, "args": {"sort_index": rank}})
            self._named.add((rank, row))
            self._write({"ph": "M", "name": "thread_name", **place, "args": {"name": name}})
        return place

    def _write(self, event: dict[str, Any]) -> None:
        if self._is_broken:
            return
        try:
            self._file.write((json.dumps(event, default=str) + ",\n").encode())
        except OSError as error:
            self._is_broken = True
            logger.warning("the timeline in %s ends here: %s", self._path, error.strerror or error)


def current() -> Trace | None:
    """The trace of this process, or None: none is wanted, or its file cannot be written."""
    path = settings.trace_file()
    if path is None:
        return None
    key = (path, os.getpid())
    if key not in _traces:
        trace = None
        try:
            trace = Trace(path)
        except OSError as error:
            logger.warning("there will be no timeline: cannot write %s: %s", path, error.strerror or error)
        # No lock: what interrupts its owner could need it. Of two threads, the first is heard.
        _traces.setdefault(key, trace)
    return _traces[key]


class _Span:
    """A block that is shown."""

    def __init__(self, trace: Trace, name: str, facts: dict[str, Any]) -> None:
        self._trace, self._name, self._facts = trace, name, facts

    def __enter__(self) -> None:
        self._trace.begin(self._name, self._facts)

    def __exit__(self, *_: object) -> None:
        self._trace.end()


_HIDDEN = contextlib.nullcontext()


def span(name: str, **facts: Any) -> contextlib.AbstractContextManager[None]:
    """A block of the calling thread, shown with its length.

    Args:
        name: what it does.
        facts: shown with it; values that JSON knows.
    """
    trace = current()
    return _HIDDEN if trace is None else _Span(trace, name, facts)


def traced(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: every call is a ``span``."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


@contextlib.contextmanager
def rate(name: str, nbytes: Callable[[], int]) -> Iterator[None]:
    """A block during which bytes move, shown as a curve in MB/s.

    Args:
        name: of the curve.
        nbytes: how many have moved so far; asked by another thread.
    """
    trace = current()
    if trace is None:
        yield
        return
    ended = threading.Event()
    sampler = threading.Thread(
        target=_sample, args=(trace, name, nbytes, ended), name="ckpt_fast-trace", daemon=True
    )
    try:
        sampler.start()
    except RuntimeError:  # the process may start no more threads
        yield
        return
    try:
        yield
    finally:
        ended.set()
        sampler.join()


def _sample(trace: Trace, name: str, nbytes: Callable[[], int], ended: threading.Event) -> None:
    moved, then = nbytes(), time.perf_counter()
    is_over = False
    while not is_over:
        is_over = ended.wait(_SAMPLE_S)
        now, total = time.perf_counter(), nbytes()
        trace.count(name, {"MB/s": round((total - moved) / (now - then) / 1e6, 1)})
        moved, then = total, now
    trace.count(name, {"MB/s": 0.0})


def _open(path: str) -> FileIO:
    """The file, to append to; it begins with the bracket of an array."""
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        # Ranks may do so at the same moment: it appears with its first line in it.
        first = f"{path}.{secrets.token_hex(4)}"
        with open(first, "xb") as file:
            file.write(b"[\n")
        try:
            os.link(first, path)
        except FileExistsError:
            if os.path.getsize(path) == 0:
                os.replace(first, path)
        except OSError:  # there are no links
            os.replace(first, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(first)
    return FileIO(path, "a")
