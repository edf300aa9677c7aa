# SPDX-License-Identifier: Apache-2.0
"""The engine's functions in Python: the same results, files and errors, byte for byte, only slower.

Contracts are those of ``_engine.pyi``. Files are written and read through the page cache whatever
``direct`` says, and threads are used across files only.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from ckpt_fast import system
from ckpt_fast.native import fallback_checks as checks
from ckpt_fast.native.fallback_files import (
    Progress,
    Supply,
    in_threads,
    memory,
    named,
    read_file,
    require_inside,
    require_ranges,
)
from ckpt_fast.native.fallback_inventory import describe_tensors, refer_to, walk_modules, walk_optimizer
from ckpt_fast.native.fallback_pickle import check_pickle

__all__ = [
    "Progress",
    "Supply",
    "check_pickle",
    "copy_crc32",
    "copy_runs",
    "cpu_features",
    "crc32",
    "crc32_combine",
    "describe_tensors",
    "permute_rows",
    "read_extents",
    "refer_to",
    "walk_modules",
    "walk_optimizer",
    "write_files",
]

_POLYNOMIAL = 0xEDB88320  # reflected: the coefficient of x^j is bit 31 - j
_ONE = 0x80000000  # x^0


def crc32(address: int, nbytes: int, seed: int = 0) -> int:
    return zlib.crc32(memory(address, nbytes), seed)


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
    view = memory(destination, nbytes)
    view[:] = memory(source, nbytes)
    return zlib.crc32(view, seed)


def copy_runs(
    destination: array[int],
    source: array[int],
    nbytes: array[int],
    run_count: array[int],
    pitch: array[int],
    threads: int,
) -> None:
    if not len(destination) == len(source) == len(nbytes) == len(run_count) == len(pitch):
        raise ValueError("the columns of copy_runs differ in length")
    for index, (count, number) in enumerate(zip(nbytes, run_count, strict=True)):
        if count < 0:
            raise ValueError(f"series {index} has a negative size")
        if number < 0:
            raise ValueError(f"series {index} has a negative number of runs")
    if threads < 1:
        raise ValueError("threads must be at least 1")
    for to, at, count, number, apart in zip(destination, source, nbytes, run_count, pitch, strict=True):
        for run in range(number):
            ctypes.memmove(to + run * count, at + run * apart, count)


def write_files(
    paths: Sequence[str],
    *,
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
    progress: Progress | None = None,
    block_bytes: int = 0,
    piece_batch: array[int] | None = None,
    supply: Supply | None = None,
) -> tuple[list[int], list[int], bytes]:
    if (piece_batch is None) != (supply is None):
        raise ValueError("piece_batch and supply go together")
    checks.check_job(threads, chunk_bytes)
    checks.check_counts(digest_count, block_bytes)
    planned = checks.plan_files(paths, file_nbytes)
    batches = array("q", [-1]) * len(piece_file) if piece_batch is None else piece_batch
    columns = (piece_offset, piece_nbytes, piece_address, piece_digest, batches)
    supply = supply or Supply(array("q"))
    ends = checks.add_pieces(planned, piece_file, columns, digest_count, supply.batch_count)
    checks.add_patches(planned, (patch_file, patch_offset, patch_digest), ends, digest_count)

    streams = [_Stream(block_bytes) for _ in range(digest_count)]
    progress = progress or Progress()
    partials = [_partial_name(file.path) for file in planned]
    try:
        file_crcs = in_threads(
            [
                partial(_write_file, file, name, chunk_bytes, fsync, streams, progress, supply)
                for file, name in zip(planned, partials, strict=True)
            ],
            threads,
            supply.end if supply.batch_count else None,
        )
        for file, name in zip(planned, partials, strict=True):
            _publish(name, file.path, progress)
        blocks = array("I", (crc for stream in streams for crc in stream.blocks))
        return [stream.crc for stream in streams], file_crcs, blocks.tobytes()
    except BaseException:
        supply.end()
        for name in partials:
            with suppress(OSError):
                os.unlink(name)
        raise


def read_extents(
    paths: Sequence[str],
    *,
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
    progress: Progress | None = None,
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
    for file, wanted in sorted(extents.items()):
        with named("open", paths[file]):
            status = os.stat(paths[file])
        require_inside(status, paths[file], wanted)
    require_ranges(paths, ranges, count)
    crcs = array("q", [-1]) * count
    progress = progress or Progress()
    in_threads(
        [
            partial(read_file, paths[file], wanted, ranges.get(file, []), crcs, progress)
            for file, wanted in sorted(extents.items())
        ],
        threads,
    )
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
        before = np.frombuffer(memory(at, nbytes), np.uint8).reshape(halves if interleave else blocks)
        after = np.frombuffer(memory(to, nbytes), np.uint8).reshape(blocks if interleave else halves)
        after[...] = before.swapaxes(0, 1)


def cpu_features() -> list[str]:
    return []


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


def _partial_name(path: str) -> str:
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{secrets.token_hex(4)}.partial")


def _publish(partial: str, path: str, progress: Progress) -> None:
    """Give a whole file its name, unless the job is stopped: another save may own that name then."""
    if not progress.begin_rename():
        progress.check("write", path)
    try:
        with named("rename", path):
            os.replace(partial, path)
    finally:
        progress.end_rename()


def _write_file(
    file: checks.PlannedFile,
    partial: str,
    chunk_bytes: int,
    fsync: bool,
    streams: list[_Stream],
    progress: Progress,
    supply: Supply,
) -> int:
    """Write one file as ``partial``, add its bytes to their ``streams`` and return its CRC."""
    progress.check("write", file.path)
    with named("open", file.path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.open_flags("O_CLOEXEC")
        fd = os.open(partial, flags, 0o666)
    try:
        crc, pieces, patches = 0, list(reversed(file.pieces)), list(reversed(file.patches))
        for begin in range(0, file.nbytes, chunk_bytes):
            progress.check("write", file.path)
            image = bytearray(min(chunk_bytes, file.nbytes - begin))
            supplied = _supplied(pieces, begin, begin + len(image))
            for batch, _ in supplied:
                supply.wait_arrived(batch, file.path, progress)
            _copy_pieces(image, begin, pieces, streams)
            _apply_patches(image, begin, patches, streams)
            crc = zlib.crc32(image, crc)
            _write_fully(fd, image, begin, file.path)
            for batch, nbytes in supplied:
                supply.add_written(batch, nbytes)
            progress.add(len(image))
        progress.check("write", file.path)
        if fsync:
            with named("fsync", file.path):
                system.sync_file(fd)
        closing, fd = fd, -1
        try:
            with named("close", file.path):
                os.close(closing)
        except InterruptedError:  # closed all the same; what was synced is complete
            if not fsync:
                raise
        return crc
    finally:
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


def _supplied(pieces: list[checks.Piece], begin: int, end: int) -> list[tuple[int, int]]:
    """Batch and bytes in [begin, end) of the pieces (last first) that come with a supply."""
    found = []
    for piece in reversed(pieces):
        if piece.offset >= end:
            break
        nbytes = min(piece.offset + piece.nbytes, end) - max(piece.offset, begin)
        if piece.batch >= 0 and nbytes > 0:
            found.append((piece.batch, nbytes))
    return found


def _copy_pieces(image: bytearray, begin: int, pieces: list[checks.Piece], streams: list[_Stream]) -> None:
    """Fill the image of [begin, begin + len(image)); ``pieces`` (last first) loses those that end in it."""
    end = begin + len(image)
    while pieces and pieces[-1].offset < end:
        piece = pieces[-1]
        first = max(piece.offset, begin)
        last = min(piece.offset + piece.nbytes, end)
        part = memory(piece.address + first - piece.offset, last - first)
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
        with named(f"write {len(view)} bytes at {offset} to", path):
            done += os.write(fd, view[done:])
