# SPDX-License-Identifier: Apache-2.0
"""Verify: is a checkpoint on disk what was written? Compared with the manifest; nothing is unpickled."""

from __future__ import annotations

import functools
import os
import zlib
from array import array

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.format.names import DATA_SUFFIX, METADATA_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.jobs.worker import interruptibly
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.storage.files import Directory

_WINDOW = 64 << 20


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


def find_damage(directory: str) -> list[str]:
    """Local. Read every file once and compare its CRC-32; one line per file that differs, or none.

    Raises:
        CheckpointNotFoundError: the directory is not a checkpoint, or has no checksums to compare with.
        CheckpointCorruptError: ``.metadata``, or the sidecar of an older checkpoint, is itself damaged.
    """
    if not os.path.exists(os.path.join(directory, METADATA_FILE)):
        raise CheckpointNotFoundError(f"{directory} is not a complete checkpoint: it has no {METADATA_FILE}")
    records = OpenCheckpoint(Directory(directory)).records()
    if records is None:
        raise CheckpointNotFoundError(
            f"{directory} has no checksums of whole files: it was written by another library, whose items "
            "can only be checked by loading them"
        )
    missing = {record.path: nbytes for record, nbytes in Directory(directory).missing(records)}
    damages = (
        _length_damage(directory, record, missing[record.path])
        if record.path in missing
        else _content_damage(directory, record)
        for record in records
    )
    return [damage for damage in damages if damage is not None]


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


def _content_damage(directory: str, record: FileRecord) -> str | None:
    path = os.path.join(directory, record.path)
    window = torch.empty(min(_WINDOW, max(record.nbytes, 1)), dtype=torch.uint8)
    crc, zero = 0, array("q", [0])
    for offset in range(0, record.nbytes, _WINDOW):
        nbytes = min(_WINDOW, record.nbytes - offset)
        at, length = array("q", [offset]), array("q", [nbytes])
        try:
            progress = native.Progress()
            read = functools.partial(
                native.read_extents,
                [path],
                extent_file=zero,
                extent_offset=at,
                extent_nbytes=length,
                extent_address=array("q", [window.data_ptr()]),
                range_file=zero,
                range_offset=at,
                range_nbytes=length,
                range_block=length,
                threads=settings.io_threads(),
                chunk_bytes=settings.chunk_bytes(),
                direct=False,
                progress=progress,
            )
            found = interruptibly(read, progress.stop)
        except OSError as error:
            return str(error.strerror)
        crc = native.crc32_combine(crc, memoryview(found).cast("q")[0], nbytes)
    return _crc_damage(path, crc, record)


def _crc_damage(path: str, crc: int, record: FileRecord) -> str | None:
    return None if crc == record.crc32 else f"{path} has CRC-32 {crc:08x} instead of {record.crc32:08x}"
