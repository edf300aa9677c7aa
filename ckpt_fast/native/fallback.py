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
_STEP = 1 << 20


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
    block_bytes: int = 0,
) -> tuple[list[int], list[int], bytes]:
    checks.check_job(threads, chunk_bytes)
    checks.check_counts(digest_count, block_bytes)
    planned = checks.plan_files(paths, file_nbytes)
    columns = (piece_offset, piece_nbytes, piece_address, piece_digest)
    ends = checks.add_pieces(planned, piece_file, columns, digest_count)
    checks.add_patches(planned, (patch_file, patch_offset, patch_digest), ends, digest_count)

    streams = [_Stream(block_bytes) for _ in range(digest_count)]
    with ThreadPoolExecutor(threads) as pool:
        written = [
            pool.submit(_write_file, file, chunk_bytes, fsync, streams, progress or WriteProgress())
            for file in planned
        ]
        try:
            file_crcs = [future.result() for future in written]
            blocks = array("I", (crc for stream in streams for crc in stream.blocks))
            return [stream.crc for stream in streams], file_crcs, blocks.tobytes()
        finally:
            for future in written:
                future.cancel()


def read_extents(
    paths: Sequence[str],
    extent_file: array[int],
    extent_offset: array[int],
    extent_nbytes: array[int],
    extent_address: array[int],
    range_file: array[int],
    range_offset: array[int],
    range_nbytes: array[int],
    range_block: array[int],
    threads: int,
    chunk_bytes: int,
    direct: bool,
) -> bytes:
    checks.check_job(threads, chunk_bytes)
    checks.check_lengths("extent", extent_file, extent_offset, extent_nbytes, extent_address)
    checks.check_lengths("range", range_file, range_offset, range_nbytes, range_block)
    checks.check_rows("extent", len(paths), extent_file, extent_offset, extent_nbytes)
    checks.check_rows("range", len(paths), range_file, range_offset, range_nbytes)
    checks.check_ranges(range_file, range_offset, range_nbytes, range_block)
    extents: dict[int, list[tuple[int, int, int]]] = {}
    for file, *extent in zip(extent_file, extent_offset, extent_nbytes, extent_address, strict=True):
        if extent[1] > 0:
            extents.setdefault(file, []).append((extent[0], extent[1], extent[2]))
    ranges: dict[int, list[tuple[int, int, int, int]]] = {}
    count = 0
    for file, offset, nbytes, block in zip(range_file, range_offset, range_nbytes, range_block, strict=True):
        ranges.setdefault(file, []).append((offset, nbytes, block, count))
        count += -(-nbytes // block)
    crcs = array("q", [-1]) * count
    for file, rows in sorted(extents.items()):
        with _named("open", paths[file]):
            status = os.stat(paths[file])
        _require_inside(status, paths[file], rows)
    with ThreadPoolExecutor(threads) as pool:
        reads = [
            pool.submit(_read_file, paths[file], rows, ranges.get(file, []), crcs)
            for file, rows in sorted(extents.items())
        ]
        for done in reads:
            done.result()
    return crcs.tobytes()


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


class _Stream:
    """The CRC-32s of a stream, and of its blocks, as its bytes come in order."""

    def __init__(self, block_bytes: int) -> None:
        self.crc = 0
        self.blocks: list[int] = []
        self._block_bytes = block_bytes
        self._room = 0  # in the last block

    def add(self, part: memoryview) -> None:
        self.crc = zlib.crc32(part, self.crc)
        while self._block_bytes and len(part):
            if not self._room:
                self.blocks.append(0)
                self._room = self._block_bytes
            self.blocks[-1] = zlib.crc32(part[: self._room], self.blocks[-1])
            taken = min(self._room, len(part))
            self._room -= taken
            part = part[taken:]


def _write_file(
    file: checks.PlannedFile,
    chunk_bytes: int,
    fsync: bool,
    streams: list[_Stream],
    progress: WriteProgress,
) -> int:
    """Write one file, add its bytes to their ``streams`` and return its CRC."""
    fd = _open(file.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        crc, pieces, patches = 0, list(reversed(file.pieces)), list(reversed(file.patches))
        for begin in range(0, file.nbytes, chunk_bytes):
            progress.check(file.path, begin, min(chunk_bytes, file.nbytes - begin))
            image = bytearray(min(chunk_bytes, file.nbytes - begin))
            _copy_pieces(image, begin, pieces, streams)
            _apply_patches(image, begin, patches, streams)
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


def _copy_pieces(image: bytearray, begin: int, pieces: list[checks.Piece], streams: list[_Stream]) -> None:
    """Fill the image of [begin, begin + len(image)); ``pieces`` (last first) loses those that end in it."""
    end = begin + len(image)
    while pieces and pieces[-1].offset < end:
        piece = pieces[-1]
        first = max(piece.offset, begin)
        last = min(piece.offset + piece.nbytes, end)
        part = _memory(piece.address + first - piece.offset, last - first)
        image[first - begin : last - begin] = part
        if piece.digest >= 0:
            streams[piece.digest].add(part)
        if piece.offset + piece.nbytes > end:
            return
        pieces.pop()


def _apply_patches(
    image: bytearray, begin: int, patches: list[tuple[int, int]], streams: list[_Stream]
) -> None:
    """Store finished CRCs; ``patches`` (last first) loses those that end in the image."""
    end = begin + len(image)
    while patches and patches[-1][0] < end:
        offset, digest = patches[-1]
        value = streams[digest].crc.to_bytes(checks.PATCH_NBYTES, "little")
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


def _read_file(
    path: str,
    extents: list[tuple[int, int, int]],
    ranges: list[tuple[int, int, int, int]],
    crcs: array[int],
) -> None:
    """Read extents (offset, nbytes, address) of one file, and the blocks that they touch.

    Args:
        ranges: (offset, nbytes, block, number of its first block in ``crcs``).
        crcs: gets the CRC-32 of each block touched.
    """
    fd = _open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _require_inside(os.fstat(fd), path, extents)
        blocks, unchecked = checks.divide(extents, ranges)
        for (begin, end, number), wanted in blocks.items():
            crcs[number] = _read_block(fd, begin, end, wanted, path)
        for offset, nbytes, address in unchecked:
            _read_fully(fd, _memory(address, nbytes), offset, path)
    finally:
        os.close(fd)


def _read_block(fd: int, begin: int, end: int, wanted: list[tuple[int, int, int]], path: str) -> int:
    """Read [begin, end) once, to where parts of it are wanted; returns its CRC-32."""
    crc = 0
    for at in range(begin, end, _STEP):
        view = memoryview(bytearray(min(_STEP, end - at)))
        _read_fully(fd, view, at, path)
        crc = zlib.crc32(view, crc)
        for offset, nbytes, address in wanted:
            first, last = max(offset, at), min(offset + nbytes, at + len(view))
            if first < last:
                _memory(address + first - offset, last - first)[:] = view[first - at : last - at]
    return crc


def _read_fully(fd: int, view: memoryview, offset: int, path: str) -> None:
    nbytes, done = len(view), 0
    while done < nbytes:
        with _named(f"read {nbytes} bytes at {offset} from", path):
            got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise _file_ends(nbytes, offset, path, offset + done)
        done += got


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
