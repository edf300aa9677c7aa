# SPDX-License-Identifier: Apache-2.0
"""What the bytes of a file say: its checksums, and whether an archive is whole by its own."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import zipfile
import zlib
from typing import Any, BinaryIO

import torch

from ckpt_fast.format.torch_archive import open_archive

_PART = 1 << 20
_ARCHIVE = b"PK"


def digest_of(path: str, algorithm: str) -> str:
    """The digest of a file in hexadecimal digits, by the name that ``hashlib`` has for the algorithm."""
    found = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while part := file.read(_PART):
            found.update(part)
    return found.hexdigest()


def block_crcs(file: BinaryIO, offset: int, nbytes: int, block_nbytes: int) -> list[int]:
    """The CRC-32 of each block of a range of a file; of fewer if the file ends before."""
    file.seek(offset)
    crcs = []
    for begin in range(0, nbytes, block_nbytes):
        part = file.read(min(block_nbytes, nbytes - begin))
        crcs.append(zlib.crc32(part))
    return crcs


class Slice(io.RawIOBase):
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


def archive_problem(
    file: BinaryIO, offset: int, nbytes: int, *, skip: str | None = None, deep: bool = True
) -> str | None:
    """What is wrong with the archive in a range of a file, by its own structure and checksums; None: nothing.

    Args:
        file: opened for reading.
        offset, nbytes: the archive.
        skip: do not read members whose names contain this.
        deep: read the members, and not only the directory of the archive.
    """
    try:
        with zipfile.ZipFile(Slice(file, offset, nbytes)) as archive:
            members = archive.infolist()
            if not members:
                return "it is an empty archive"
            if len({member.filename for member in members}) != len(members):
                return "it has two members of one name"
            for member in members:
                if skip is not None and skip in member.filename:
                    continue
                if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                    return f"{member.filename} is compressed, as torch.save never does"
                with archive.open(member) as content:
                    while deep and content.read(_PART):
                        pass
    except Exception as error:  # zipfile has no common type for damage
        return str(error) or type(error).__name__
    return None


def whole_archive(content: bytes) -> bool:
    """Whether a small file is an archive of ``torch.save`` whose own checksums are right."""
    try:
        return open_archive(content).testzip() is None
    except Exception:  # zipfile has no common type for damage
        return False


def require_readable(content: bytes) -> None:
    """Let torch's own reader take a small archive apart; nothing is unpickled.

    Raises:
        RuntimeError: it refuses what other readers of archives overlook.
    """
    reader: Any = getattr(torch._C, "PyTorchFileReader", None)
    if reader is None or not content.startswith(_ARCHIVE):
        return
    archive = reader(io.BytesIO(content))
    for name in archive.get_all_records():
        archive.get_record(name)


def file_archive_problem(path: str, deep: bool = True) -> str | None:
    """``archive_problem`` of a file as a whole."""
    with open(path, "rb") as file:
        return archive_problem(file, 0, os.fstat(file.fileno()).st_size, deep=deep)
