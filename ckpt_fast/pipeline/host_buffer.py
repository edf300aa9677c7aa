# SPDX-License-Identifier: Apache-2.0
"""Host memory that snapshots are taken into: exact size, huge pages, kept between saves, bounded.

Touching a fresh page costs ten times what copying it does, so the memory of one save is used again by the
next. With a GPU it is page-locked, once, for copies at the full speed of the bus.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import warnings
from typing import Any

import torch

from ckpt_fast.errors import CheckpointError

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20


class HostBuffer:
    """A block of anonymous memory, aligned to huge pages.

    Attributes:
        nbytes: usable length.
        memory: the block as a uint8 tensor, [nbytes].
    """

    def __init__(self, nbytes: int) -> None:
        """Map ``nbytes``; the pages themselves come with the first write.

        Raises:
            CheckpointError: the system has no address space or no right to lock the pages.
        """
        self.nbytes = nbytes
        try:
            self._mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise CheckpointError(
                f"cannot reserve {nbytes} bytes of host memory for a snapshot: {error.strerror}. Bound it "
                "with CKPT_FAST_HOST_BUFFER, or save without async_save."
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        offset = -base % _HUGE_PAGE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only buffers; this one is not
            self.memory = torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=offset)
        self._pinned = torch.cuda.is_available() and self._pin()

    def _pin(self) -> bool:
        code = _cuda_runtime().cudaHostRegister(self.memory.data_ptr(), self.nbytes, 0)
        if int(code) != 0:
            logger.warning(
                "cannot page-lock %d bytes of host memory (CUDA error %s): copies from the GPU will be "
                "slower. Raise the limit on locked memory (ulimit -l).",
                self.nbytes,
                code,
            )
            return False
        return True

    def close(self) -> None:
        """Undo the page lock; the memory itself goes with the last tensor that shows it."""
        if self._pinned:
            _cuda_runtime().cudaHostUnregister(self.memory.data_ptr())
            self._pinned = False


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class HostBufferPool:
    """The process's host buffers. Thread-safe.

    A buffer is taken for the bytes of one wave of a save and given back when they are written.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[HostBuffer] = []
        self._used_nbytes = 0
        self.allocated_nbytes = 0

    def take(self, nbytes: int, bound: int | None = None) -> HostBuffer:
        """A buffer of at least ``nbytes``; waits for one to be given back rather than exceed ``bound``.

        Args:
            nbytes: more than 0. A single buffer may exceed the bound: a tensor is never cut.
            bound: bytes that all buffers in use may have together; None: no bound. With a bound a new buffer
                has at least half of it, so that two waves of any kind find room in two buffers.
        """
        with self._changed:
            while bound is not None and self._used_nbytes and self._used_nbytes + nbytes > bound:
                self._changed.wait()
            buffer = self._reusable(nbytes, bound) or self._allocate(max(nbytes, (bound or 0) // 2))
            self._used_nbytes += buffer.nbytes
            return buffer

    def give_back(self, buffer: HostBuffer) -> None:
        """Keep the buffer for the next save; the caller no longer touches it."""
        with self._changed:
            self._used_nbytes -= buffer.nbytes
            self._idle.append(buffer)
            self._changed.notify_all()

    def _reusable(self, nbytes: int, bound: int | None) -> HostBuffer | None:
        """The smallest idle buffer that is large enough and does not exceed the bound."""
        fitting = [
            buffer
            for buffer in self._idle
            if buffer.nbytes >= nbytes
            and (bound is None or not self._used_nbytes or self._used_nbytes + buffer.nbytes <= bound)
        ]
        if not fitting:
            return None
        smallest = min(fitting, key=lambda buffer: buffer.nbytes)
        self._idle.remove(smallest)
        return smallest

    def _allocate(self, nbytes: int) -> HostBuffer:
        # What is idle was too small: the state has grown, or its waves are cut differently now.
        for buffer in self._idle:
            buffer.close()
        self._idle.clear()
        self.allocated_nbytes += nbytes
        return HostBuffer(nbytes)


host_buffers = HostBufferPool()
