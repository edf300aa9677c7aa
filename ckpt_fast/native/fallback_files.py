# SPDX-License-Identifier: Apache-2.0
"""Reading for the engine's twin, and what it shares with writing."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import zlib
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import TypeVar

from ckpt_fast import system
from ckpt_fast.native import fallback_checks as checks

_STEP = 1 << 20
_FREE_BLOCKS = 1 << 20  # of ranges that end behind their files
_LOOK_AGAIN_S = 0.02
T = TypeVar("T")


class Progress:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nbytes = 0
        self._renaming = 0
        self._stopped = False

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def renaming(self) -> bool:
        return self._renaming > 0

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def begin_rename(self) -> bool:
        with self._lock:
            if not self._stopped:
                self._renaming += 1
            return not self._stopped

    def end_rename(self) -> None:
        with self._lock:
            self._renaming -= 1

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes += nbytes

    def check(self, verb: str, path: str) -> None:
        if self._stopped:
            with named(verb, path):
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))


class Supply:
    def __init__(self, batch_nbytes: array[int]) -> None:
        self._missing = list(batch_nbytes)
        self._changed = threading.Condition()
        self._arrived = 0
        self._written = 0
        self._ended = False
        self._advance()

    @property
    def batch_count(self) -> int:
        return len(self._missing)

    def arrive(self, count: int) -> None:
        with self._changed:
            self._arrived = count
            self._changed.notify_all()

    def wait_written(self, batch: int, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._written > batch or self._ended, timeout_s)
            return self._written > batch

    @property
    def ended(self) -> bool:
        return self._ended

    def wait_arrived(self, batch: int, path: str, progress: Progress) -> None:
        with self._changed:
            while self._arrived <= batch and not self._ended and not progress.stopped:
                self._changed.wait(_LOOK_AGAIN_S)
            if self._arrived > batch and not self._ended:
                return
        with named("write", path):
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def add_written(self, batch: int, nbytes: int) -> None:
        with self._changed:
            self._missing[batch] -= nbytes
            self._advance()
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _advance(self) -> None:
        while self._written < len(self._missing) and not self._missing[self._written]:
            self._written += 1


def in_threads(
    calls: Sequence[Callable[[], T]], threads: int, on_error: Callable[[], None] | None = None
) -> list[T]:
    """The results of calls; after an error, the first of which is raised, those not begun are not made.

    While the interpreter ends, other threads of the program still do, and it starts no more: then the calls
    are made one by one in this thread.

    Args:
        calls: independent of each other, unless there is an ``on_error``.
        threads: how many of them are made at the same time.
        on_error: wakes calls that wait for each other.

    Raises:
        RuntimeError: there is no thread for each of those calls.
    """

    errors: list[BaseException] = []

    def made(call: Callable[[], T]) -> T:
        try:
            return call()
        except BaseException as error:
            errors.append(error)
            if on_error is not None:
                on_error()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(made, call) for call in calls[:1]]
        except RuntimeError:
            if on_error is not None and min(threads, len(calls)) > 1:
                raise
            return [call() for call in calls]
        try:
            futures += [pool.submit(made, call) for call in calls[1:]]
            return [future.result() for future in futures]
        except BaseException as error:
            if on_error is not None:
                on_error()
            if errors and isinstance(error, Exception):
                raise errors[0] from None
            raise
        finally:
            for future in futures:
                future.cancel()


def memory(address: int, nbytes: int) -> memoryview:
    """Writable view of memory that the caller keeps alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def read_file(
    path: str,
    extents: list[checks.Extent],
    ranges: list[tuple[int, int, int, int]],
    crcs: array[int],
    progress: Progress,
) -> None:
    """Read extents (offset, nbytes, address) of one file, and the blocks that they touch.

    Args:
        ranges: (offset, nbytes, block, number of its first block in ``crcs``).
        crcs: gets the CRC-32 of each block touched.
    """
    with named("open", path):
        file = FileIO(path, opener=_open_at_once)
    with file:
        require_inside(os.fstat(file.fileno()), path, extents)
        blocks, unchecked = checks.divide(extents, ranges)
        size = os.fstat(file.fileno()).st_size
        for begin, end, _ in sorted(blocks):
            if end > size:
                raise _file_ends(end - begin, begin, path, size)
        for (begin, end, number), wanted in blocks.items():
            crcs[number] = _read_block(file, begin, end, wanted, path, progress)
        for offset, nbytes, address in unchecked:
            _read_fully(file, memory(address, nbytes), offset, path, progress)


def _open_at_once(path: str, flags: int) -> int:
    """Open it even if it is a FIFO that nobody writes to."""
    return os.open(path, flags | system.open_flags("O_NONBLOCK"))


def _read_block(
    file: FileIO, begin: int, end: int, wanted: list[checks.Extent], path: str, progress: Progress
) -> int:
    """Read [begin, end) once, to where parts of it are wanted; returns its CRC-32."""
    crc = 0
    for at in range(begin, end, _STEP):
        view = memoryview(bytearray(min(_STEP, end - at)))
        _read_fully(file, view, at, path, progress)
        crc = zlib.crc32(view, crc)
        for offset, nbytes, address in wanted:
            first, last = max(offset, at), min(offset + nbytes, at + len(view))
            if first < last:
                memory(address + first - offset, last - first)[:] = view[first - at : last - at]
    return crc


def _read_fully(file: FileIO, view: memoryview, offset: int, path: str, progress: Progress) -> None:
    nbytes, done = len(view), 0
    while done < nbytes:
        progress.check("read", path)
        with named(f"read {nbytes} bytes at {offset} from", path):
            file.seek(offset + done)
            got = file.readinto(view[done : done + _STEP])
        if not got:
            raise _file_ends(nbytes, offset, path, offset + done)
        progress.add(got)
        done += got


def require_inside(status: os.stat_result, path: str, extents: list[checks.Extent]) -> None:
    """The file is a regular one that holds the extents."""
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, f"open {path}: {os.strerror(errno.EISDIR)}", path)
    if not stat.S_ISREG(status.st_mode):
        kind = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(status.st_mode), "device")
        raise OSError(errno.EIO, f"open {path}: it is a {kind}, not a regular file", path)
    for offset, nbytes, _ in extents:
        if offset + nbytes > status.st_size:
            raise _file_ends(nbytes, offset, path, status.st_size)


def require_ranges(
    paths: Sequence[str], ranges: dict[int, list[tuple[int, int, int, int]]], count: int
) -> None:
    """Of all blocks, there are not many that no file has: each has a result.

    Args:
        paths: of the files.
        ranges: of each file: (offset, nbytes, block, number of its first block).
        count: of all blocks.
    """
    if count <= _FREE_BLOCKS:
        return
    free = _FREE_BLOCKS
    for file in sorted(file for file, held in ranges.items() if any(nbytes for _, nbytes, *_ in held)):
        with named("open", paths[file]):
            status = os.stat(paths[file])
        require_inside(status, paths[file], [])
        for offset, nbytes, block, _ in sorted(ranges[file]):
            there = min(max(status.st_size - offset, 0), nbytes)
            free -= -(-nbytes // block) - -(-there // block)
            if free < 0:
                raise _file_ends(nbytes, offset, paths[file], status.st_size)


def _file_ends(nbytes: int, offset: int, path: str, size: int) -> OSError:
    return OSError(errno.EIO, f"read {nbytes} bytes at {offset} from {path}: file ends at {size}", path)


class named:  # noqa: N801 - reads as a statement
    """Context in which an OSError's text becomes "ACTION PATH: reason"."""

    def __init__(self, action: str, path: str) -> None:
        self._action = action
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            text = f"{self._action} {self._path}: {os.strerror(error.errno)}"
            raise OSError(error.errno, text, self._path) from None
