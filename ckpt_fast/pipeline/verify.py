# SPDX-License-Identifier: Apache-2.0
"""Verify: is a checkpoint on disk what was written? Compared with the sidecar; nothing is unpickled."""

from __future__ import annotations

import os
from array import array

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.pipeline.commit import METADATA_FILE, SIDECAR_FILE
from ckpt_fast.pipeline.decode import has_own_mark, read_sidecar
from ckpt_fast.pipeline.files import Directory, Files
from ckpt_fast.pipeline.small_files import read_small_file
from ckpt_fast.pipeline.types import FileRecord

_WINDOW = 64 << 20


def require_complete(files: Files) -> None:
    """Local. Check that every file of the checkpoint is there with its full length; costs one stat a file.

    A checkpoint that somebody else wrote has no sidecar and passes.

    Raises:
        CheckpointCorruptError: naming the first file that is missing or of another length.
    """
    files.fetch((METADATA_FILE, SIDECAR_FILE))
    for record, nbytes in files.missing(_records(files.directory) or ()):
        damage = _length_damage(files.name, record, nbytes)
        raise CheckpointCorruptError(f"{damage}. Load an earlier iteration, or restore the file.")


def find_damage(directory: str) -> list[str]:
    """Local. Read every file once and compare its CRC-32; one line per file that differs, or none.

    Raises:
        CheckpointNotFoundError: the directory is not a checkpoint, or has no sidecar to compare with.
        CheckpointCorruptError: the sidecar itself is damaged.
    """
    if not os.path.exists(os.path.join(directory, METADATA_FILE)):
        raise CheckpointNotFoundError(f"{directory} is not a complete checkpoint: it has no {METADATA_FILE}")
    records = _records(directory)
    if records is None:
        raise CheckpointNotFoundError(
            f"{directory} has no sidecar of its own: it was written by another library, whose items can "
            "only be checked by loading them"
        )
    missing = {record.path: nbytes for record, nbytes in Directory(directory).missing(records)}
    damages = (
        _length_damage(directory, record, missing[record.path])
        if record.path in missing
        else _content_damage(directory, record)
        for record in records
    )
    return [damage for damage in damages if damage is not None]


def _records(directory: str) -> list[FileRecord] | None:
    """The sidecar, unless the files it speaks of have been replaced by another library's."""
    try:
        content = read_small_file(os.path.join(directory, METADATA_FILE))
    except FileNotFoundError:
        return None
    return read_sidecar(directory) if has_own_mark(content) else None


def _length_damage(directory: str, record: FileRecord, nbytes: int | None) -> str:
    path = os.path.join(directory, record.path)
    return f"{path} is missing" if nbytes is None else f"{path} has {nbytes} bytes instead of {record.nbytes}"


def _content_damage(directory: str, record: FileRecord) -> str | None:
    path = os.path.join(directory, record.path)
    window = torch.empty(min(_WINDOW, max(record.nbytes, 1)), dtype=torch.uint8)
    crc = 0
    for offset in range(0, record.nbytes, _WINDOW):
        nbytes = min(_WINDOW, record.nbytes - offset)
        try:
            (part,) = native.read_extents(
                [path],
                array("q", [0]),
                array("q", [offset]),
                array("q", [nbytes]),
                array("q", [window.data_ptr()]),
                array("q", [0]),
                1,
                settings.io_threads(),
                settings.chunk_bytes(),
                False,
            )
        except OSError as error:
            return str(error.strerror)
        crc = native.crc32_combine(crc, part, nbytes)
    return None if crc == record.crc32 else f"{path} has CRC-32 {crc:08x} instead of {record.crc32:08x}"
