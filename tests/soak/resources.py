# SPDX-License-Identifier: Apache-2.0
"""What a process holds, sampled while it saves and loads, and whether any of it has grown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import glob
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt_fast.pipeline.memory.host_buffer import host_buffers

_PAGE = os.sysconf("SC_PAGE_SIZE")
_SHM = "/dev/shm"
# Threads that end by themselves once a save is over.
_ENDING = ("ckpt_fast-", "_cleanup", "AsyncCheckpointExecutor")
_STAYING = "ckpt_fast-commit"
_LONGEST_END_S = 20.0


class Sample(NamedTuple):
    """What a process holds while nothing is being saved or loaded.

    Attributes:
        steps, seconds: when.
        rss: resident memory, in bytes, after malloc has given back what is free.
        heap: bytes that malloc has handed out.
        blocks: Python's own small blocks, in number.
        descriptors, threads, processes: open files, threads of any kind, child processes.
        buffers: bytes of host buffers in use.
        left: files in the spool, the temporary directory and shared memory that are this process's.
        files: files in the directories of checkpoints.
    """

    steps: int
    seconds: float
    rss: int
    heap: int
    blocks: int
    descriptors: int
    threads: int
    processes: int
    buffers: int
    left: int
    files: int


@dataclass(frozen=True)
class Measure:
    """How one field of the samples is judged and shown.

    Attributes:
        title: of its column, with the unit.
        unit: what a shown 1 stands for.
        more: by how much the median may be higher in the end.
        part: the same as a part of the earlier median; the greater one counts.
    """

    title: str
    unit: int = 1
    more: int = 0
    part: float = 0.0


MEASURES = {
    "rss": Measure("RSS, MB", 1 << 20, more=16 << 20),
    "heap": Measure("malloc, MB", 1 << 20, more=8 << 20),
    "blocks": Measure("Python blocks, 1000", 1000, more=20_000),
    "descriptors": Measure("descriptors"),
    "threads": Measure("threads"),
    "processes": Measure("children"),
    "buffers": Measure("buffers"),
    "left": Measure("files left"),
    "files": Measure("files", part=0.25, more=20),
}


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class Sampler:
    """Takes the samples of this process.

    Args:
        checkpoints: directory of all checkpoints.
        temporary: directories that must be empty when nothing is being saved or loaded.
    """

    def __init__(self, checkpoints: str, *temporary: str) -> None:
        self._checkpoints, self._temporary = checkpoints, temporary
        self._begin = time.monotonic()
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Mallinfo

    def sample(self, steps: int) -> Sample:
        """Look, once nothing of a save is in flight."""
        settle()
        gc.collect()
        self._libc.malloc_trim(0)
        information = self._libc.mallinfo2()
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * _PAGE
        return Sample(
            steps,
            time.monotonic() - self._begin,
            rss,
            information.uordblks + information.hblkhd,
            sys.getallocatedblocks(),
            len(os.listdir("/proc/self/fd")) - 1,  # that of this listing is closed again
            len(os.listdir("/proc/self/task")),
            _children(),
            host_buffers.used_nbytes,
            sum(map(_files_below, self._temporary)) + len(glob.glob(f"{_SHM}/*{os.getpid()}*")),
            _files_below(self._checkpoints),
        )


def settle() -> None:
    """Wait until threads that are about to end have ended.

    Raises:
        AssertionError: one of them does not end.
    """
    deadline = time.monotonic() + _LONGEST_END_S
    while True:
        names = [each.name for each in threading.enumerate() if _STAYING not in each.name]
        left = [name for name in names if any(part in name for part in _ENDING)]
        if not left:
            return
        assert time.monotonic() < deadline, f"still there after {_LONGEST_END_S:.0f} s: {left}"
        time.sleep(0.01)


def _children() -> int:
    count = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{task}/children") as file:
            count += len(file.read().split())
    return count


def _files_below(directory: str) -> int:
    return sum(len(names) for _, _, names in os.walk(directory))


def growths(samples: Sequence[Sample]) -> list[str]:
    """Return what has grown: the median of the last quarter against that of the second.

    The first quarter is left out: caches and buffers fill.
    """
    quarter = len(samples) // 4
    if not quarter:
        return [f"{len(samples)} samples are too few to judge"]
    found = []
    for name, measure in MEASURES.items():
        values = [getattr(sample, name) for sample in samples]
        before, after = statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])
        if after > before + max(measure.more, measure.part * before):
            shown = f"{before / measure.unit:g} to {after / measure.unit:g}"
            found.append(f"{measure.title}: from {shown} (medians of the second and the last quarter)")
    return found


def table(samples: Sequence[Sample], most: int = 25) -> str:
    """Return the samples as a table of at most so many rows; the first and the last are among them."""
    every = max(1, -(-(len(samples) - 1) // (most - 1)))
    chosen = [*samples[:-1:every], *samples[-1:]]
    titles = ["step", "minutes", *(measure.title for measure in MEASURES.values())]
    lines = ["  ".join(titles)]
    for sample in chosen:
        cells = [str(sample.steps), f"{sample.seconds / 60:.1f}"]
        for name, measure in MEASURES.items():
            value = getattr(sample, name) / measure.unit
            cells.append(f"{value:.1f}" if measure.unit > 1 else f"{value:.0f}")
        lines.append("  ".join(cell.rjust(len(title)) for cell, title in zip(cells, titles, strict=True)))
    return "\n".join(lines)
