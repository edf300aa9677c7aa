# SPDX-License-Identifier: Apache-2.0
"""The engine's functions in Python: the same results, files and errors, byte for byte, only slower.

Contracts are those of ``_engine.pyi``. Files are written and read through the page cache whatever
``direct`` says, and threads are used across files only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
import zlib
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from ckpt_fast.native import fallback_checks as checks
from ckpt_fast.native.fallback_pickle import check_pickle

__all__ = [
    "WriteProgress",
    "check_pickle",
    "copy_crc32",
    "copy_runs",
    "cpu_features",
    "crc32",
    "crc32_combine",
    "permute_rows",
    "read_extents",
    "write_files",
]

_POLYNOMIAL = 0xEDB88320  # reflected: the coefficient of x^j is bit 31 - j
_ONE = 0x80000000  # x^0


def crc32(address: int, nbytes: int, seed: int = 0) -> int:
    return zlib.crc32(_memory(address, nbytes), seed)


def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    # The CRC of A followed by n bytes B is crc(A) * x^(8 n) + crc(B), modulo the polynomial.
    power, square = _ONE, 1 << 23  # x^0 and x^8
    while second_nbytes:
        if second_nbytes & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        second_nbytes >>= 1
    return _multiply(first, power) ^ second


def copy_crc32(destination: int, source: int, nbytes: int, seed: int = 0) -> int:
    view = _memory(destination, nbytes)
    view[:] = _memory(source, nbytes)
    return zlib.crc32(view, seed)


def copy_runs(
    destination: array[int],
    source: array[int],
    nbytes: array[int],
    runs: array[int],
    pitch: array[int],
    threads: int,
) -> None:
    if not len(destination) == len(source) == len(nbytes) == len(runs) == len(pitch):
        raise ValueError("the columns of copy_runs differ in length")
    for row, (count, number) in enumerate(zip(nbytes, runs, strict=True)):
        if count < 0:
            raise ValueError(f"row {row} has a negative size")
        if number < 0:
            raise ValueError(f"row {row} has a negative number of runs")
    if threads < 1:
        raise ValueError("threads must be at least 1")
    for to, at, count, number, apart in zip(destination, source, nbytes, runs, pitch, strict=True):
        for run in range(number):
            ctypes.memmove(to + run * count, at + run * apart, count)


class WriteProgress:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nbytes = 0
        self._stopped = False

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def stop(self) -> None:
        self._stopped = True

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes += nbytes

    def check(self, path: str, offset: int, nbytes: int) -> None:
        if self._stopped:
            with _named(f"write {nbytes} bytes at {offset} to", path):
                raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))


def write_files(
    paths: Sequence[str],
    file_nbytes: array[int],
    piece_file: array[int],
    piece_offset: array[int],
    piece_nbytes: array[int],
    piece_address: array[int],
    piece_digest: array[int],
    patch_file: array[int],
    patch_offset: array[int],
    patch_digest: array[int],
    digest_count: int,
    threads: int,
    chunk_bytes: int,
    direct: bool,
    fsync: bool,
    progress: WriteProgress | None = None,
) -> tuple[list[int], list[int]]:
    checks.check_job(threads, chunk_bytes, digest_count)
    planned = checks.plan_files(paths, file_nbytes)
    columns = (piece_offset, piece_nbytes, piece_address, piece_digest)
    ends = checks.add_pieces(planned, piece_file, columns, digest_count)
    checks.add_patches(planned, (patch_file, patch_offset, patch_digest), ends, digest_count)

    stream_crcs = [0] * digest_count
    with ThreadPoolExecutor(threads) as pool:
        written = [
            pool.submit(_write_file, file, chunk_bytes, fsync, stream_crcs, progress or WriteProgress())
            for file in planned
        ]
        try:
            return stream_crcs, [future.result() for future in written]
        finally:
            for future in written:
                future.cancel()


def read_extents(
    paths: Sequence[str],
    extent_file: array[int],
    extent_offset: array[int],
    extent_nbytes: array[int],
    extent_address: array[int],
    extent_digest: array[int],
    digest_count: int,
    threads: int,
    chunk_bytes: int,
    direct: bool,
) -> list[int]:
    checks.check_job(threads, chunk_bytes, digest_count)
    checks.check_lengths("extent", extent_file, extent_offset, extent_nbytes, extent_address, extent_digest)
    checks.check_extents(len(paths), extent_file, extent_offset, extent_nbytes, extent_digest, digest_count)
    extents: dict[int, list[tuple[int, int, int]]] = {}
    for file, *extent in zip(extent_file, extent_offset, extent_nbytes, extent_address, strict=True):
        if extent[1] > 0:
            extents.setdefault(file, []).append((extent[0], extent[1], extent[2]))
    for file, rows in sorted(extents.items()):
        with _named("open", paths[file]):
            status = os.stat(paths[file])
        _require_inside(status, paths[file], rows)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_read_file, paths[file], rows) for file, rows in sorted(extents.items())]:
            done.result()

    stream_crcs = [0] * digest_count
    for nbytes, address, digest in zip(extent_nbytes, extent_address, extent_digest, strict=True):
        if digest >= 0:
            stream_crcs[digest] = crc32(address, nbytes, stream_crcs[digest])
    return stream_crcs


def permute_rows(
    destination: array[int],
    source: array[int],
    rows: array[int],
    row_nbytes: array[int],
    block: array[int],
    interleave: bool,
    threads: int,
) -> None:
    if not len(destination) == len(source) == len(rows) == len(row_nbytes) == len(block):
        raise ValueError("the columns of permute_rows differ in length")
    for count, width, size in zip(rows, row_nbytes, block, strict=True):
        if count < 0 or width < 0:
            raise ValueError("rows and row_nbytes must not be negative")
        if size < 1:
            raise ValueError(f"block is {size}, not at least 1")
        if count % (2 * size):
            raise ValueError(f"{count} rows do not divide into pairs of blocks of {size}")
    if threads < 1:
        raise ValueError(f"threads is {threads}, not at least 1")
    for to, at, count, width, size in zip(destination, source, rows, row_nbytes, block, strict=True):
        nbytes, pairs, run = count * width, count // (2 * size), size * width
        halves, blocks = (2, pairs, run), (pairs, 2, run)
        before = np.frombuffer(_memory(at, nbytes), np.uint8).reshape(halves if interleave else blocks)
        after = np.frombuffer(_memory(to, nbytes), np.uint8).reshape(blocks if interleave else halves)
        after[...] = before.swapaxes(0, 1)


def cpu_features() -> list[str]:
    return []


def _memory(address: int, nbytes: int) -> memoryview:
    """Writable view of memory that the caller keeps alive."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _write_file(
    file: checks.PlannedFile,
    chunk_bytes: int,
    fsync: bool,
    stream_crcs: list[int],
    progress: WriteProgress,
) -> int:
    """Write one file, put its streams' CRCs into ``stream_crcs`` and return its own."""
    fd = _open(file.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        crc, pieces, patches = 0, list(reversed(file.pieces)), list(reversed(file.patches))
        for begin in range(0, file.nbytes, chunk_bytes):
            progress.check(file.path, begin, min(chunk_bytes, file.nbytes - begin))
            image = bytearray(min(chunk_bytes, file.nbytes - begin))
            _copy_pieces(image, begin, pieces, stream_crcs)
            _apply_patches(image, begin, patches, stream_crcs)
            crc = zlib.crc32(image, crc)
            _write_fully(fd, image, begin, file.path)
            progress.add(len(image))
        if fsync:
            with _named("fsync", file.path):
                os.fsync(fd)
        closing, fd = fd, -1
        with _named("close", file.path):
            os.close(closing)
        return crc
    finally:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def _copy_pieces(image: bytearray, begin: int, pieces: list[checks.Piece], stream_crcs: list[int]) -> None:
    """Fill the image of [begin, begin + len(image)); ``pieces`` (last first) loses those that end in it."""
    end = begin + len(image)
    while pieces and pieces[-1].offset < end:
        piece = pieces[-1]
        first = max(piece.offset, begin)
        last = min(piece.offset + piece.nbytes, end)
        part = _memory(piece.address + first - piece.offset, last - first)
        image[first - begin : last - begin] = part
        if piece.digest >= 0:
            stream_crcs[piece.digest] = zlib.crc32(part, stream_crcs[piece.digest])
        if piece.offset + piece.nbytes > end:
            return
        pieces.pop()


def _apply_patches(
    image: bytearray, begin: int, patches: list[tuple[int, int]], stream_crcs: list[int]
) -> None:
    """Store finished CRCs; ``patches`` (last first) loses those that end in the image."""
    end = begin + len(image)
    while patches and patches[-1][0] < end:
        offset, digest = patches[-1]
        value = stream_crcs[digest].to_bytes(checks.PATCH_NBYTES, "little")
        first, last = max(offset, begin), min(offset + checks.PATCH_NBYTES, end)
        image[first - begin : last - begin] = value[first - offset : last - offset]
        if offset + checks.PATCH_NBYTES > end:
            return
        patches.pop()


def _write_fully(fd: int, image: bytearray, offset: int, path: str) -> None:
    view = memoryview(image)
    done = 0
    while done < len(view):
        with _named(f"write {len(view)} bytes at {offset} to", path):
            done += os.pwrite(fd, view[done:], offset + done)


def _read_file(path: str, extents: list[tuple[int, int, int]]) -> None:
    """Read (offset, nbytes, address) ranges of one file."""
    fd = _open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _require_inside(os.fstat(fd), path, extents)
        for offset, nbytes, address in extents:
            view, done = _memory(address, nbytes), 0
            while done < nbytes:
                with _named(f"read {nbytes} bytes at {offset} from", path):
                    got = os.preadv(fd, [view[done:]], offset + done)
                if got == 0:
                    raise _file_ends(nbytes, offset, path, offset + done)
                done += got
    finally:
        os.close(fd)


def _require_inside(status: os.stat_result, path: str, extents: list[tuple[int, int, int]]) -> None:
    """The file is a regular one that holds the extents."""
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, f"open {path}: {os.strerror(errno.EISDIR)}", path)
    if not stat.S_ISREG(status.st_mode):
        kind = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(status.st_mode), "device")
        raise OSError(errno.EIO, f"open {path}: it is a {kind}, not a regular file", path)
    for offset, nbytes, _ in extents:
        if offset + nbytes > status.st_size:
            raise _file_ends(nbytes, offset, path, status.st_size)


def _open(path: str, flags: int) -> int:
    with _named("open", path):
        return os.open(path, flags | os.O_CLOEXEC, 0o666)


def _file_ends(nbytes: int, offset: int, path: str, size: int) -> OSError:
    return OSError(errno.EIO, f"read {nbytes} bytes at {offset} from {path}: file ends at {size}", path)


class _named:  # noqa: N801 - reads as a statement
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
