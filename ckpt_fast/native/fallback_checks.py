# SPDX-License-Identifier: Apache-2.0
"""Checks of what ``write_files`` and ``read_extents`` are asked for, in the engine's words.

Each raises ValueError naming the first row that breaks the contract, before any file is touched.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

PATCH_NBYTES = 4
_LARGEST_OFFSET = (1 << 63) - 1 - 4096


@dataclass(frozen=True)
class Piece:
    """Bytes of memory and their place in a file; ``digest`` is their stream or -1, ``batch`` theirs or -1."""

    offset: int
    nbytes: int
    address: int
    digest: int
    batch: int


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: disjoint pieces and (offset, digest) patches, both by offset."""

    path: str
    nbytes: int
    pieces: list[Piece] = field(default_factory=list)
    patches: list[tuple[int, int]] = field(default_factory=list)


def check_job(threads: int, chunk_bytes: int) -> None:
    """The arguments of a job that do not depend on its columns."""
    if threads < 1:
        raise ValueError(f"threads is {threads}, not at least 1")
    if chunk_bytes < 4096 or chunk_bytes % 4096:
        raise ValueError(f"chunk_bytes is {chunk_bytes}, not a positive multiple of 4096")


def check_counts(digest_count: int, block_bytes: int) -> None:
    """The number of streams of a write, and the length of their blocks."""
    if digest_count < 0:
        raise ValueError("digest_count is negative")
    if block_bytes < 0:
        raise ValueError("block_bytes is negative")


def check_lengths(kind: str, first: Sequence[object], *others: Sequence[object]) -> None:
    """All columns of a table have one entry per row."""
    for column in others:
        if len(column) != len(first):
            raise ValueError(f"{kind} columns differ in length: {len(first)} and {len(column)}")


def check_file(row: str, file: int, file_count: int) -> None:
    """``row``, e.g. "piece 3", names a file of the request."""
    if not 0 <= file < file_count:
        raise ValueError(f"{row}: file {file} is not one of {file_count}")


def check_digest(row: str, digest: int, lowest: int, digest_count: int) -> None:
    """``row`` names a stream of the request, or none where ``lowest`` is -1."""
    if not lowest <= digest < digest_count:
        raise ValueError(f"{row}: digest {digest} is not one of {digest_count}")


def check_rows(kind: str, file_count: int, files: array[int], offsets: array[int], sizes: array[int]) -> None:
    """Each entry of a read request names a file of the request and a valid byte range."""
    for row, (file, offset, nbytes) in enumerate(zip(files, offsets, sizes, strict=True)):
        check_file(f"{kind} {row}", file, file_count)
        if offset < 0 or nbytes < 0 or offset > _LARGEST_OFFSET - nbytes:
            raise ValueError(f"{kind} {row}: {nbytes} bytes at {offset} are not a valid range")


def check_ranges(files: array[int], offsets: array[int], sizes: array[int], blocks: array[int]) -> None:
    """Blocks have bytes, and no byte is in two ranges."""
    for row, block in enumerate(blocks):
        if block < 1:
            raise ValueError(f"range {row}: its blocks have no bytes")
    in_order = sorted(
        (file, offset, row, nbytes)
        for row, (file, offset, nbytes) in enumerate(zip(files, offsets, sizes, strict=True))
        if nbytes
    )
    for before, (file, offset, row, _) in pairwise(in_order):
        if file == before[0] and offset < before[1] + before[3]:
            raise ValueError(f"range {row}: overlaps range {before[2]}")


Extent = tuple[int, int, int]  # offset, nbytes, address


def divide(
    extents: list[Extent], ranges: list[tuple[int, int, int, int]]
) -> tuple[dict[tuple[int, int, int], list[Extent]], list[Extent]]:
    """The requested extents of one file grouped by block, and those that lie in no block.

    Args:
        extents: what is wanted.
        ranges: (offset, nbytes, block, number of its first block), disjoint.

    Returns:
        (begin, end, number) of each block touched, with the extents that touch it; and parts of extents.
    """
    ranges = sorted(each for each in ranges if each[1])
    starts = [offset for offset, *_ in ranges]
    blocks: dict[tuple[int, int, int], list[Extent]] = {}
    rest: list[Extent] = []
    for extent in extents:
        position, nbytes, address = extent
        end, delta = position + nbytes, address - position
        for offset, length, block, number in ranges[max(bisect_right(starts, position) - 1, 0) :]:
            if offset >= end:
                break
            if position >= offset + length:
                continue
            if position < offset:
                rest.append((position, offset - position, position + delta))
                position = offset
            last = min(end, offset + length)
            for row in range((position - offset) // block, (last - 1 - offset) // block + 1):
                begin = offset + row * block
                key = (begin, min(begin + block, offset + length), number + row)
                blocks.setdefault(key, []).append(extent)
            position = last
        if position < end:
            rest.append((position, end - position, position + delta))
    return blocks, rest


def plan_files(paths: Sequence[str], file_nbytes: array[int]) -> list[PlannedFile]:
    """The files of a write request, still empty."""
    check_lengths("file", paths, file_nbytes)
    seen = set()
    for row, (path, nbytes) in enumerate(zip(paths, file_nbytes, strict=True)):
        if nbytes < 0:
            raise ValueError(f"file {row}: negative size")
        if path in seen:
            raise ValueError(f"file {row}: its path occurs twice")
        seen.add(path)
    return [PlannedFile(path, nbytes) for path, nbytes in zip(paths, file_nbytes, strict=True)]


def add_pieces(
    planned: list[PlannedFile],
    piece_file: array[int],
    columns: tuple[array[int], array[int], array[int], array[int], array[int]],
    digest_count: int,
    batch_count: int,
) -> dict[int, tuple[int, int]]:
    """Put pieces, columns (offset, nbytes, address, digest, batch), into their files.

    Returns:
        (file, end of the last byte) of every stream that has a piece.
    """
    check_lengths("piece", piece_file, *columns)
    ends: dict[int, tuple[int, int]] = {}
    last = (0, 0)
    for row, (file, *values) in enumerate(zip(piece_file, *columns, strict=True)):
        piece = Piece(*values)
        check_file(f"piece {row}", file, len(planned))
        if not -1 <= piece.batch < batch_count:
            raise ValueError(f"piece {row}: batch {piece.batch} is not one of {batch_count}")
        _check_range(f"piece {row}", piece.offset, piece.nbytes, planned[file].nbytes)
        check_digest(f"piece {row}", piece.digest, -1, digest_count)
        if (file, piece.offset) < last:
            raise ValueError(
                f"piece {row}: begins before the piece ahead of it ends; pieces go by file and offset"
            )
        last = (file, piece.offset + piece.nbytes)
        if piece.digest >= 0:
            if ends.get(piece.digest, last)[0] != file:
                raise ValueError(f"piece {row}: digest {piece.digest} began in another file")
            ends[piece.digest] = last
        planned[file].pieces.append(piece)
    return ends


def add_patches(
    planned: list[PlannedFile],
    columns: tuple[array[int], array[int], array[int]],
    ends: dict[int, tuple[int, int]],
    digest_count: int,
) -> None:
    """Put patches, columns (file, offset, digest), into their files; ``ends`` is from add_pieces."""
    check_lengths("patch", *columns)
    for row, (file, offset, digest) in enumerate(zip(*columns, strict=True)):
        check_file(f"patch {row}", file, len(planned))
        _check_range(f"patch {row}", offset, PATCH_NBYTES, planned[file].nbytes)
        check_digest(f"patch {row}", digest, 0, digest_count)
        end_file, end = ends.get(digest, (file, 0))
        if end_file != file or offset < end:
            raise ValueError(f"patch {row}: does not lie behind the end of digest {digest}")
        planned[file].patches.append((offset, digest))
    for target in planned:
        target.patches.sort()
        for (before, _), (offset, _) in zip(target.patches, target.patches[1:], strict=False):
            if offset < before + PATCH_NBYTES:
                raise ValueError(f"patches overlap at {offset} of {target.path}")


def _check_range(row: str, offset: int, nbytes: int, file_nbytes: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > file_nbytes:
        raise ValueError(f"{row}: {nbytes} bytes at {offset} are outside its file of {file_nbytes} bytes")
