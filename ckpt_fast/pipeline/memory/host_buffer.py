# SPDX-License-Identifier: Apache-2.0
"""Host memory for snapshots: exact size, huge pages, kept between saves, limited.

Touching a fresh page costs ten times what copying it does, so the memory of one save is used again by the
next. With a GPU it is page-locked, once, for copies at the full speed of the bus.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import mmap
import threading
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ckpt_fast import native, settings, system
from ckpt_fast.errors import CheckpointError
from ckpt_fast.once import first_time
from ckpt_fast.ranks.devices import on_this_gpu

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
_LOOK_AGAIN_S = 0.005  # of what takes a write of megabytes
_COLLECT_AFTER_S = 1.0  # later than a write of a wave takes


class HostBuffer:
    """A block of anonymous memory, aligned to huge pages.

    Attributes:
        nbytes: usable length.
        memory: the block as a uint8 tensor, [nbytes].
        is_new: whether nothing has used it before.
        is_let_go: whether it will not be used again; its memory goes with the last tensor that shows it.
    """

    def __init__(self, nbytes: int, touch: bool = False) -> None:
        """Map ``nbytes``; the pages themselves come with the first write, or now with ``touch``.

        Raises:
            CheckpointError: the system has no address space left.
        """
        self.nbytes = nbytes
        self.is_new = True
        self.is_let_go = False
        try:
            self._mapping = system.anonymous_memory(nbytes + _HUGE_PAGE)
        except OSError as error:
            raise CheckpointError(
                f"cannot reserve {nbytes} bytes of host memory for a snapshot: {error.strerror}. Bound it "
                "with CKPT_FAST_HOST_BUFFER, or save without async_save."
            ) from error
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._start = -base % _HUGE_PAGE
        self._shown: mmap.mmap | memoryview = self._mapping
        self.memory = self.slot(0, nbytes)
        if touch:
            self._touch()
        self._unpin: Callable[[], object] | None = None
        if torch.cuda.is_available():
            self._pin()

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        """``nbytes`` from ``offset`` on as a uint8 tensor with a storage of its own.

        ``torch.save`` stores a tensor's whole storage: a view of ``memory`` would drag all of it along. The
        tensor keeps the memory alive, though not its content once the buffer is given back.
        """
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._shown, dtype=torch.uint8, count=nbytes, offset=self._start + offset)

    @contextlib.contextmanager
    def watched(self, when_unused: Callable[[], None]) -> Iterator[None]:
        """Within it, tensors that ``slot`` makes are watched.

        Args:
            when_unused: called, in any thread, when all of them are gone, with every view of them.
        """
        # A tensor refers to the object that it was made from until its storage, which views share, is gone.
        self._shown = view = memoryview(self._mapping)
        weakref.finalize(view, when_unused).atexit = False
        try:
            yield
        finally:
            self._shown = self._mapping

    def _touch(self) -> None:
        """Write to every page, with all threads: several times as fast as page-locking untouched memory."""
        zeros = torch.zeros(min(self.nbytes, _HUGE_PAGE), dtype=torch.uint8)
        pages, rest = divmod(self.nbytes, _HUGE_PAGE)
        base, source = self.memory.data_ptr(), zeros.data_ptr()
        native.copy_runs(
            array("q", (base, base + pages * _HUGE_PAGE)),
            array("q", (source, source)),
            array("q", (_HUGE_PAGE, rest)),
            array("q", (pages, 1)),
            array("q", (0, 0)),
            settings.io_threads(),
        )

    def _pin(self) -> None:
        address = self.memory.data_ptr()
        code = _cuda_runtime().cudaHostRegister(address, self.nbytes, 0)
        if int(code) != 0:
            if first_time("not page-locked"):
                logger.warning(
                    "cannot page-lock %d bytes of host memory (CUDA error %s): copies from the GPU will be "
                    "slower. Raise the limit on locked memory (ulimit -l).",
                    self.nbytes,
                    code,
                )
            return
        self._unpin = unpin = weakref.finalize(self, _cuda_runtime().cudaHostUnregister, address)
        unpin.atexit = False

    def close(self) -> None:
        """Undo the page lock; the memory itself goes with the last tensor that shows it."""
        self.is_let_go = True
        if self._unpin is not None:
            self._unpin()


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class HostBufferPool:
    """The process's host buffers. Thread-safe.

    A buffer is taken for the bytes of one wave of a save and given back when they are written. One that is
    dropped instead, as a signal's handler that raises between two instructions may have it, is no longer in
    use either.
    """

    def __init__(self) -> None:
        # No Condition: the handler of a signal that raises while one is entered leaves it locked.
        self._lock = threading.RLock()
        self._idle: list[HostBuffer] = []
        self._in_use: weakref.WeakSet[HostBuffer] = weakref.WeakSet()
        # Filled at any moment, even by a destructor that runs while this thread holds the lock.
        self._returned: deque[HostBuffer] = deque()

    @property
    def used_nbytes(self) -> int:
        """Bytes of the buffers that are in use."""
        with self._lock:
            self._collect()
            return self._sum_used()

    @property
    def idle_nbytes(self) -> int:
        """Bytes of the buffers that are kept for the next save."""
        with self._lock:
            self._collect()
            return sum(buffer.nbytes for buffer in self._idle)

    def trim(self) -> None:
        """Let go of the buffers that are kept for the next save."""
        with self._lock:
            self._collect()
            while self._idle:
                self._idle.pop().close()

    def take(self, nbytes: int, bound: int | None = None, wait_s: float | None = None) -> HostBuffer:
        """A buffer of at least ``nbytes``; waits for one to be given back rather than exceed ``bound``.

        Args:
            nbytes: more than 0. A single buffer may exceed the bound: a tensor is never cut.
            bound: bytes that all buffers in use may have together; None: no bound.
            wait_s: how long to wait, in seconds; None follows ``CKPT_FAST_TIMEOUT``.

        Raises:
            CheckpointError: the memory cannot be had, or none was given back in time.
        """
        begin = time.monotonic()
        deadline = begin + (settings.timeout_s() if wait_s is None else wait_s)
        collect_at: float | None = min(begin + _COLLECT_AFTER_S, deadline)
        while True:
            with self._lock:
                buffer = self._find(nbytes, bound)
                if buffer is not None:
                    self._in_use.add(buffer)
                    return buffer
                used = self._sum_used()
            if collect_at is not None and time.monotonic() >= collect_at:
                gc.collect()  # a save that failed may be garbage which nobody has collected
                collect_at = None
                continue
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"{nbytes} bytes of host memory are needed, but other saves hold {used} of the {bound} "
                    "that CKPT_FAST_HOST_BUFFER, or what is available, allows. Wait for the save before to "
                    "end (and drop what it returned if it failed), or raise the bound."
                )
            time.sleep(_LOOK_AGAIN_S)

    def reserve(self, nbytes: int) -> threading.Thread:
        """Have a buffer ready for a save that will take ``nbytes``; returns the thread that makes it.

        An error there is logged: the save itself will meet it again, or not.
        """

        def make() -> None:
            try:
                buffer = HostBuffer(nbytes, touch=True)
            except CheckpointError:
                logger.warning("no host memory was reserved", exc_info=True)
                return
            self.give_back(buffer)

        thread = threading.Thread(target=on_this_gpu(make), name="ckpt_fast-reserve", daemon=True)
        thread.start()
        return thread

    def give_back(self, buffer: HostBuffer, keep: bool = True) -> None:
        """Keep the buffer for the next save, or let it go now; the caller no longer touches it."""
        if keep:
            self._returned.append(buffer)
        else:
            buffer.close()

    def _find(self, nbytes: int, bound: int | None) -> HostBuffer | None:
        """The smallest idle buffer that suffices, else a new one; None while the bound forbids both."""
        self._collect()
        used = self._sum_used()
        room = None if bound is None or not used else bound - used
        fitting = [
            buffer
            for buffer in self._idle
            if buffer.nbytes >= nbytes and (room is None or buffer.nbytes <= room)
        ]
        if fitting:
            smallest = min(fitting, key=lambda buffer: buffer.nbytes)
            self._idle.remove(smallest)
            return smallest
        if room is not None and nbytes > room:
            return None
        # What is idle was too small: the state has grown, or its waves are cut differently now.
        for buffer in self._idle:
            buffer.close()
        self._idle.clear()
        return HostBuffer(nbytes)

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self._in_use.discard(buffer)
            buffer.is_new = False
            self._idle.append(buffer)

    def _sum_used(self) -> int:
        return sum(buffer.nbytes for buffer in self._in_use if not buffer.is_let_go)


host_buffers = HostBufferPool()


def reserve_host_memory(nbytes: int) -> threading.Thread:
    """Allocate the host memory that the first background save will need, before training waits for it.

    Allocating, touching and page-locking it takes about as long as ten saves' copies do. Later saves use the
    same memory.

    Args:
        nbytes: this rank's part of the state: parameters and optimizer state.

    Returns:
        The thread that does it, for those who want to wait for it.
    """
    return host_buffers.reserve(nbytes)
