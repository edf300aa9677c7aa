# SPDX-License-Identifier: Apache-2.0
"""What the hardware can do: the same bytes, moved with as few operations as possible.

Buffers for direct I/O are on huge pages and page-aligned: from 4 KiB pages, a request is split into one
segment per page and loses a third of the bandwidth. Every call used here releases the GIL.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CHUNK = 4 << 20
_HUGE_PAGE = 2 << 20
_MAX_VECTORS = 1024


def huge_page_buffer(nbytes: int) -> memoryview:
    """Return zeroed, faulted-in memory aligned to a huge page, on huge pages where the system grants them."""
    # Shared anonymous memory, mmap's default, is backed by an in-memory file and gets no huge pages.
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = -address % _HUGE_PAGE
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)[begin : begin + nbytes]
    view[:] = bytes(nbytes)
    return view


class Threads:
    """``count`` threads that share chunks of work; started once, so that thread start is never measured."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count)
        self.buffers = [huge_page_buffer(CHUNK) for _ in range(count)]

    def each(self, work: Callable[[int], None]) -> None:
        """Call ``work(thread number)`` on every thread and wait for all of them."""
        for done in [self._pool.submit(work, number) for number in range(self.count)]:
            done.result()


def write_direct(path: Path, nbytes: int, threads: Threads) -> None:
    """Write and fsync one file per thread past the page cache, from a warm buffer."""

    def write(number: int) -> None:
        share = _share(nbytes, threads.count)
        descriptor = os.open(f"{path}.{number}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, share)
            for offset in range(0, share, CHUNK):
                _write_fully(descriptor, threads.buffers[number][: share - offset], offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    threads.each(write)


def buffered_writer(
    path: Path, tensors: Sequence[torch.Tensor], threads: Threads, sync: bool = False
) -> Callable[[], None]:
    """Return a pwritev of the tensors' own memory, one file per thread, through the page cache."""
    shares = [_batches(parts) for parts in _parts(tensors, threads.count)]

    def write(number: int) -> None:
        descriptor, offset = os.open(f"{path}.{number}", os.O_WRONLY | os.O_CREAT, 0o600), 0
        try:
            for batch in shares[number]:
                wanted, written = sum(map(len, batch)), os.pwritev(descriptor, batch, offset)
                if written != wanted:
                    raise OSError(f"{path}.{number}: wrote {written} of {wanted} bytes")
                offset += wanted
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return lambda: threads.each(write)


def buffered_reader(path: Path, tensors: Sequence[torch.Tensor], threads: Threads) -> Callable[[], None]:
    """Return a preadv of the files of ``buffered_writer`` back into the tensors' memory."""
    shares = [_batches(parts) for parts in _parts(tensors, threads.count)]

    def read(number: int) -> None:
        descriptor, offset = os.open(f"{path}.{number}", os.O_RDONLY), 0
        try:
            for batch in shares[number]:
                wanted, got = sum(map(len, batch)), os.preadv(descriptor, batch, offset)
                if got != wanted:
                    raise OSError(f"{path}.{number}: read {got} of {wanted} bytes")
                offset += wanted
        finally:
            os.close(descriptor)

    return lambda: threads.each(read)


def read_direct(path: Path, nbytes: int, threads: Threads, files: int) -> None:
    """Read the files of ``write_direct`` with ``files`` threads, past the page cache into warm buffers."""

    def read(number: int) -> None:
        share = _share(nbytes, files)
        descriptor = os.open(f"{path}.{number % files}", os.O_RDONLY | os.O_DIRECT)
        readers = len(range(number % files, threads.count, files))
        try:
            for offset in range(number // files * CHUNK, share, readers * CHUNK):
                os.preadv(descriptor, [threads.buffers[number]], offset)
        finally:
            os.close(descriptor)

    threads.each(read)


def copier(
    destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], threads: Threads
) -> Callable[[], None]:
    """Return a memcpy of tensors of equal sizes, chunk by chunk."""
    shares = [
        [(_address(d), _address(s), len(s)) for d, s in zip(theirs, mine, strict=True)]
        for theirs, mine in zip(
            _parts(destinations, threads.count), _parts(sources, threads.count), strict=True
        )
    ]

    def move(number: int) -> None:
        for part in shares[number]:
            ctypes.memmove(*part)

    # Addresses alone would not keep the memory alive.
    owners = (*destinations, *sources)
    return lambda: threads.each(move) if owners else None


def to_host(sources: Sequence[torch.Tensor], threads: Threads) -> Callable[[], None]:
    """Return a copy of tensors into reused host memory: a memcpy, or from a GPU into page-locked memory."""
    if not sources[0].is_cuda:
        return copier([torch.zeros_like(source) for source in sources], sources, threads)
    pinned = [torch.empty(source.shape, dtype=source.dtype, pin_memory=True) for source in sources]

    def move() -> None:
        for source, copy in zip(sources, pinned, strict=True):
            copy.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    return move


def _parts(tensors: Sequence[torch.Tensor], count: int) -> list[list[memoryview]]:
    """Return the chunks of all tensors' memory, dealt out to ``count`` threads."""
    parts: list[list[memoryview]] = [[] for _ in range(count)]
    chunks = 0
    for tensor in tensors:
        memory = memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        for begin in range(0, tensor.nbytes, CHUNK):
            parts[chunks % count].append(memory[begin : begin + CHUNK])
            chunks += 1
    return parts


def _batches(parts: Sequence[memoryview]) -> list[list[memoryview]]:
    """Group consecutive parts for one system call each: about a chunk, and at most ``_MAX_VECTORS`` parts."""
    batches: list[list[memoryview]] = []
    filled = CHUNK
    for part in parts:
        if filled + len(part) > CHUNK or len(batches[-1]) == _MAX_VECTORS:
            batches.append([])
            filled = 0
        batches[-1].append(part)
        filled += len(part)
    return batches


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view))


def _share(nbytes: int, files: int) -> int:
    """Return the bytes of one file, in whole blocks as direct I/O requires."""
    return (nbytes // files + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE


def _write_fully(descriptor: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done
