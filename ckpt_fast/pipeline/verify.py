# SPDX-License-Identifier: Apache-2.0
"""Verify: is a checkpoint on disk what was written? Compared with the manifest; nothing is unpickled."""

from __future__ import annotations

import functools
import os
from array import array

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.pipeline.commit import DATA_SUFFIX, METADATA_FILE, SIDECAR_FILE
from ckpt_fast.pipeline.decode import has_own_mark, read_manifest, read_sidecar
from ckpt_fast.pipeline.files import Directory, Files
from ckpt_fast.pipeline.manifest import Manifest
from ckpt_fast.pipeline.small_files import read_small_file
from ckpt_fast.pipeline.types import FileRecord
from ckpt_fast.pipeline.worker import interruptibly

_WINDOW = 64 << 20


def require_complete(files: Files) -> None:
    """Local. Check that every file of the checkpoint is there with its full length, and what the small ones
    hold; costs one stat a data file.

    A checkpoint that somebody else wrote has no list of its files and passes.

    Raises:
        CheckpointCorruptError: naming the first file that is missing, or not what the save has written.
    """
    files.fetch((METADATA_FILE, SIDECAR_FILE))
    manifest, records = _records(files.directory)
    for record, nbytes in files.missing(records or ()):
        damage = _length_damage(files.name, record, nbytes)
        raise CheckpointCorruptError(f"{damage}. Load an earlier iteration, or restore the file.")
    if manifest is None or not settings.verify_on_load():
        return
    small = [each for each in manifest.files.values() if not each.path.endswith(DATA_SUFFIX)]
    files.fetch(record.path for record in small)
    for record in small:
        damaged = _content_damage(files.directory, record)
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
    _, records = _records(directory)
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


def _records(directory: str) -> tuple[Manifest | None, list[FileRecord] | None]:
    """The manifest, and the files that it or an older checkpoint's sidecar names; None if there are neither.

    A sidecar counts unless the files it speaks of have been replaced by another library's.
    """
    try:
        manifest = read_manifest(directory)
        if manifest is not None:
            return manifest, list(manifest.files.values())
        content = read_small_file(os.path.join(directory, METADATA_FILE))
    except FileNotFoundError:
        return None, None
    return None, read_sidecar(directory) if has_own_mark(content) else None


def _length_damage(directory: str, record: FileRecord, nbytes: int | None) -> str:
    path = os.path.join(directory, record.path)
    return f"{path} is missing" if nbytes is None else f"{path} has {nbytes} bytes instead of {record.nbytes}"


def _content_damage(directory: str, record: FileRecord) -> str | None:
    path = os.path.join(directory, record.path)
    window = torch.empty(min(_WINDOW, max(record.nbytes, 1)), dtype=torch.uint8)
    crc, zero = 0, array("q", [0])
    for offset in range(0, record.nbytes, _WINDOW):
        nbytes = min(_WINDOW, record.nbytes - offset)
        place = (zero, array("q", [offset]), array("q", [nbytes]))
        try:
            progress = native.Progress()
            read = functools.partial(
                native.read_extents,
                [path],
                *place,
                array("q", [window.data_ptr()]),
                *place,
                array("q", [nbytes]),
                settings.io_threads(),
                settings.chunk_bytes(),
                False,
                progress=progress,
            )
            found = interruptibly(read, progress.stop)
        except OSError as error:
            return str(error.strerror)
        crc = native.crc32_combine(crc, memoryview(found).cast("q")[0], nbytes)
    return None if crc == record.crc32 else f"{path} has CRC-32 {crc:08x} instead of {record.crc32:08x}"
