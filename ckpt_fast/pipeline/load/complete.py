# SPDX-License-Identifier: Apache-2.0
"""Completeness: is a checkpoint whole before it is loaded, as far as lengths and small files say?"""

from __future__ import annotations

import functools
import os
import zlib
from array import array
from collections.abc import Sequence

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.format.names import DATA_SUFFIX
from ckpt_fast.format.types import FileRecord
from ckpt_fast.jobs.worker import interruptibly
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.load.read import MIN_DIRECT_NBYTES, SAMPLES, is_cached


def require_complete(checkpoint: OpenCheckpoint) -> None:
    """Local. Check that every file of the checkpoint is there with its full length, and what the small ones
    hold; costs one stat a data file.

    A checkpoint that somebody else wrote has no list of its files and passes.

    Raises:
        CheckpointCorruptError: naming the first file that is missing, or not what the save has written.
    """
    try:
        manifest, records = checkpoint.manifest, checkpoint.records()
    except CheckpointNotFoundError:
        return
    for record, nbytes in checkpoint.files.missing(records or ()):
        damage = _length_damage(checkpoint.name, record, nbytes)
        raise CheckpointCorruptError(f"{damage}. Load an earlier iteration, or restore the file.")
    if manifest is None or not settings.verify_on_load():
        return
    for record in manifest.files.values():
        if record.path.endswith(DATA_SUFFIX):
            continue
        if record.path in checkpoint.wanted:
            damaged = _difference(checkpoint, record)
        else:
            checkpoint.files.fetch([record.path])
            damaged = _content_damage(checkpoint.directory, record)
        if damaged is not None:
            raise CheckpointCorruptError(
                f"{damaged}: it is damaged, or of another save than {manifest.save_id}, whose .metadata "
                "is there. Load an earlier iteration, or restore the file."
            )


def _difference(checkpoint: OpenCheckpoint, record: FileRecord) -> str | None:
    """The defect of a file that will be decoded, and is read now for that purpose."""
    path = os.path.join(checkpoint.directory, record.path)
    try:
        content = checkpoint.read(record.path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return _crc_damage(path, zlib.crc32(content), record)


def _length_damage(directory: str, record: FileRecord, nbytes: int | None) -> str:
    path = os.path.join(directory, record.path)
    return f"{path} is missing" if nbytes is None else f"{path} has {nbytes} bytes instead of {record.nbytes}"


def crc32_of(path: str, nbytes: int, progress: native.Progress | None = None) -> int:
    """The CRC-32 of the first ``nbytes`` of a file; OSError if they cannot be read.

    They are read once, with all threads, past the page cache if they are not in it. Memory holds a chunk for
    each read that is in flight.

    Args:
        path: of the file.
        nbytes: its length, or less.
        progress: counts the bytes that have been read.
    """
    block = settings.chunk_bytes()
    # A block is read whole if a byte of it is wanted, and no more of it is delivered.
    offsets = array("q", range(0, nbytes, block))
    taken = torch.empty(len(offsets), dtype=torch.uint8)
    zeros, ones = array("q", [0]) * len(offsets), array("q", [1]) * len(offsets)
    progress = progress or native.Progress()
    read = functools.partial(
        native.read_extents,
        [path],
        extent_file=zeros,
        extent_offset=offsets,
        extent_nbytes=ones,
        extent_address=array("q", range(taken.data_ptr(), taken.data_ptr() + len(offsets))),
        range_file=array("q", [0]),
        range_offset=array("q", [0]),
        range_nbytes=array("q", [nbytes]),
        range_block=array("q", [block]),
        threads=settings.io_threads(),
        chunk_bytes=block,
        direct=settings.direct_io() and nbytes >= MIN_DIRECT_NBYTES and _is_cold(path, offsets),
        progress=progress,
    )
    crc = 0
    found = memoryview(interruptibly(read, progress.stop)).cast("q")
    for offset, part in zip(offsets, found, strict=True):
        crc = native.crc32_combine(crc, part, min(block, nbytes - offset))
    return crc


def _is_cold(path: str, offsets: Sequence[int]) -> bool:
    """Whether the page cache lacks most of a file, by some of its offsets."""
    samples = offsets[:: -(-len(offsets) // SAMPLES)]
    missing = sum(not is_cached(path, offset) for offset in samples)
    return 2 * missing > len(samples)


def _content_damage(directory: str, record: FileRecord) -> str | None:
    path = os.path.join(directory, record.path)
    try:
        return _crc_damage(path, crc32_of(path, record.nbytes), record)
    except OSError as error:
        return str(error.strerror)


def _crc_damage(path: str, crc: int, record: FileRecord) -> str | None:
    return None if crc == record.crc32 else f"{path} has CRC-32 {crc:08x} instead of {record.crc32:08x}"
