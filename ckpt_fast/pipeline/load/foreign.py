# SPDX-License-Identifier: Apache-2.0
"""Verify a checkpoint of another library, which has no manifest: its structure, and what its archives say."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    UnsafeCheckpointError,
)
from ckpt_fast.format.names import SEAL_FILE
from ckpt_fast.format.types import Extent, TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors

T = TypeVar("T")

# Of Megatron-Core: the part of the state dict that is not sharded.
_COMMON_FILE = "common.pt"
# Members of an archive of torch's that hold elements, which loading compares.
_ELEMENTS = "/data/"
# Items that are checked together; of a batch that fails each is checked alone.
_BATCH = 64


def structural_damage(index: CheckpointIndex) -> Iterator[str]:
    """One line for each defect of ``.metadata`` or of the files' lengths, found without reading data."""
    ends: dict[str, int] = {}
    for info in (index.metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = os.path.join(index.directory, name)
        try:
            nbytes = os.stat(path).st_size
        except OSError as error:
            yield f"{path} is missing ({error.strerror})"
            continue
        if nbytes < end:
            yield f"{path} has {nbytes} bytes, and .metadata names items up to {end}"
    for fqn in _tensors(index):
        try:
            tensor = index.tensor(fqn)
        except CheckpointCorruptError as error:
            yield str(error)
            continue
        covered, whole = sum(math.prod(piece.sizes) for piece in tensor.pieces), math.prod(tensor.shape)
        if covered != whole:
            yield f"{fqn} in {index.directory} has pieces for {covered} of its {whole} elements"


class ContentCheck:
    """Reads every item of a checkpoint, and compares the checksums in its archive.

    Args:
        index: the checkpoint.

    Attributes:
        unchecked: names of items that cannot be checked, with the reason.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self.unchecked: list[str] = []

    def damage(self) -> Iterator[str]:
        """One line for each item, and each small file of Megatron-Core's, that is not as it was written."""
        index = self._index
        pieces = [request for fqn in _tensors(index) for request in self._requests(fqn)]
        yield from self._each(pieces, lambda batch: load_tensors(index, batch, verify=True))
        yield from self._archives_damage()
        tensors = set(_tensors(index))
        objects = [fqn for fqn in index.metadata.state_dict_metadata if fqn not in tensors]
        yield from self._each(objects, lambda batch: load_objects(index, batch, verify=True))
        yield from _small_files_damage(index.directory)

    def _requests(self, fqn: str) -> Iterator[TensorRequest]:
        """One element of each piece: with it all of the piece is read, for its checksum."""
        try:
            tensor = self._index.tensor(fqn)
        except CheckpointCorruptError:  # reported with the structure
            return
        for piece in tensor.pieces:
            if 0 not in piece.sizes:
                yield TensorRequest(
                    fqn, torch.empty([1] * len(piece.sizes), dtype=tensor.dtype), piece.offsets
                )

    def _archives_damage(self) -> Iterator[str]:
        """Of the archives of tensors, what the loads above have not read: torch reads some of it."""
        for fqn in _tensors(self._index):
            with contextlib.suppress(CheckpointCorruptError):  # reported with the structure
                for piece in self._index.tensor(fqn).pieces:
                    if not piece.transforms and not self._has_sound_archive(piece.item):
                        where = os.path.join(self._index.directory, piece.item.path)
                        yield f"the archive of {fqn} at {piece.item.offset} of {where} is damaged"

    def _has_sound_archive(self, item: Extent) -> bool:
        with open(os.path.join(self._index.directory, item.path), "rb") as file:
            try:
                with zipfile.ZipFile(_Slice(file, item.offset, item.nbytes)) as archive:
                    for member in archive.infolist():
                        with archive.open(member) as content:
                            if _ELEMENTS not in member.filename:
                                content.read()
            except Exception:  # zipfile has no common type for damage
                return False
        return True

    def _each(self, items: Sequence[T], check: Callable[[list[T]], object]) -> Iterator[str]:
        for start in range(0, len(items), _BATCH):
            batch = list(items[start : start + _BATCH])
            try:
                check(batch)
                continue
            except CheckpointError:
                pass
            for item in batch:
                try:
                    check([item])
                except CheckpointCorruptError as error:
                    yield str(error)
                except (UnsafeCheckpointError, CheckpointMismatchError) as error:
                    self.unchecked.append(str(error))


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, nbytes: int) -> None:
        self._file, self._offset, self._nbytes, self._at = file, offset, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if self._at < 0:
            raise OSError(errno.EINVAL, "it begins later")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._nbytes - self._at, 0)
        self._file.seek(self._offset + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def _tensors(index: CheckpointIndex) -> list[str]:
    entries = index.metadata.state_dict_metadata
    return [fqn for fqn, entry in entries.items() if isinstance(entry, TensorStorageMetadata)]


def _small_files_damage(directory: str) -> Iterator[str]:
    common, seal = (os.path.join(directory, name) for name in (_COMMON_FILE, SEAL_FILE))
    if os.path.exists(common):
        try:
            with zipfile.ZipFile(common) as archive:
                damaged = archive.testzip()
        except Exception as error:  # zipfile has no common type for damage
            damaged = str(error)
        if damaged is not None:
            yield f"{common} is damaged ({damaged})"
    if os.path.exists(seal):
        try:
            with open(seal, "rb") as file:
                json.load(file)
        except (OSError, ValueError) as error:
            yield f"{seal} is damaged ({error})"
