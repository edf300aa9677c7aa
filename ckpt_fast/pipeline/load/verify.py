# SPDX-License-Identifier: Apache-2.0
"""Verify: is a checkpoint on disk what was written?"""

from __future__ import annotations

import functools
import os
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ckpt_fast.format.names import DATA_SUFFIX, METADATA_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.jobs.worker import interruptibly
from ckpt_fast.pipeline.load.entries.kinds import SavedTensor
from ckpt_fast.pipeline.load.entries.pickled import PickledEntries
from ckpt_fast.pipeline.load.foreign import ContentCheck, structural_damage
from ckpt_fast.pipeline.load.index import CheckpointIndex
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


@dataclass(frozen=True)
class VerifyReport:
    """What was found out about a checkpoint.

    Attributes:
        path: the checkpoint.
        damages: one line for each defect: a file or an item that is missing, short or not what was written.
        unchecked: one line for each item whose bytes could not be checked. Only items of other libraries: of
            classes that are not read, or in archives that are none of torch.
        deep: whether every byte was read. Otherwise lengths, ``.metadata`` and small files were looked at.
    """

    path: str
    damages: tuple[str, ...]
    unchecked: tuple[str, ...] = ()
    deep: bool = True

    @property
    def is_sound(self) -> bool:
        """Whether no defect was found."""
        return not self.damages


def verify(path: str | os.PathLike[str], deep: bool = True) -> VerifyReport:
    """Compare a checkpoint with what was written. Local; nothing is loaded, no code of a pickle is run.

    Checkpoints of ckpt_fast have a checksum of every file. Of those of other libraries (torch DCP,
    Megatron-Core) the structure is checked, and the checksums in the archives of tensors and objects.

    Args:
        path: the directory that has ``.metadata``.
        deep: read every byte.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        CheckpointError: it cannot be read, which says nothing about it.
    """
    directory = os.fspath(path)
    if not os.path.isdir(directory):
        problem = "is no directory" if os.path.lexists(directory) else "does not exist"
        raise CheckpointNotFoundError(f"{directory} {problem}; a checkpoint is a directory with .metadata")
    try:
        with OpenCheckpoint(Directory(directory)) as checkpoint:
            records = checkpoint.records()
            if records is not None:
                damages = [*_own_damage(directory, records, deep), *_contradictions(checkpoint, deep)]
                return VerifyReport(directory, tuple(damages), deep=deep)
            index = checkpoint.index
            damages = list(structural_damage(index))
            content = ContentCheck(index)
            # What a file lacks would be reported once more for every item in it.
            if deep and not damages:
                damages.extend(content.damage())
            return VerifyReport(directory, tuple(damages), tuple(content.unchecked), deep)
    except CheckpointCorruptError as error:
        return VerifyReport(directory, (str(error),), deep=deep)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{directory} cannot be read ({error.strerror or error}), which says nothing about it"
        ) from error


def find_damage(directory: str) -> list[str]:
    """``verify`` of every byte; the defects.

    Raises:
        CheckpointNotFoundError: the directory is not a checkpoint.
    """
    return list(verify(directory).damages)


def _own_damage(directory: str, records: Sequence[FileRecord], deep: bool) -> Iterator[str]:
    missing = {record.path: nbytes for record, nbytes in Directory(directory).missing(records)}
    for record in records:
        if record.path in missing:
            yield _length_damage(directory, record, missing[record.path])
        elif deep or not record.path.endswith(DATA_SUFFIX):
            damage = _content_damage(directory, record)
            if damage is not None:
                yield damage


def _contradictions(checkpoint: OpenCheckpoint, deep: bool) -> list[str]:
    """The defects of the tables of contents, each for itself and, if ``deep``, of the two together."""
    try:
        index = checkpoint.index
        return list(_differences(index)) if deep else []
    except CheckpointCorruptError as error:
        return [str(error)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"{os.path.join(checkpoint.directory, METADATA_FILE)} makes no sense ({error})"]


def _differences(index: CheckpointIndex) -> Iterator[str]:
    table = index.table
    if table is None:
        return
    pickled = PickledEntries(index.metadata)
    for name in dict.fromkeys((*table.names, *pickled.names)):
        mine, other = ((each.tensor(name), each.object(name)) for each in (table, pickled))
        if _sorted(mine[0]) != _sorted(other[0]) or mine[1] != other[1]:
            yield f"{os.path.join(index.directory, METADATA_FILE)}: table and pickle disagree on {name}"


def _sorted(tensor: SavedTensor | None) -> SavedTensor | None:
    return None if tensor is None else tensor._replace(pieces=sorted(tensor.pieces))


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
