# SPDX-License-Identifier: Apache-2.0
"""Checks on a ``torch.save`` file before ``torch.load`` reads it: plain data, and no larger than declared?"""

from __future__ import annotations

import io
import zipfile

from ckpt_fast import native

# The end of the directory, which is the end of the archive.
_END_NBYTES = 22
_END_SIGNATURE = b"PK\x05\x06"
_NO_COMMENT = b"\0\0"
_ENCRYPTED = 1
_LOCAL_NBYTES = 30  # the fixed part of a member's header
# torch.save before archives: magic number, version, machine, the value, names of the storages behind it.
_LEGACY_PICKLES = 5


# Of an entry in the archive's directory.
_DIRECTORY = 0x10


def open_archive(payload: bytes) -> zipfile.ZipFile:
    """The archive, if it is one as ``torch.save`` makes it: nothing compressed, nothing twice.

    Raises:
        Exception: of whatever kind, if it is none: ``zipfile`` has no common type for damage.
    """
    end = payload[-_END_NBYTES:]
    if not end.startswith(_END_SIGNATURE) or not end.endswith(_NO_COMMENT):
        raise ValueError("it does not end as an archive of torch.save does")
    archive = zipfile.ZipFile(io.BytesIO(payload))
    members = archive.infolist()
    if len({member.filename for member in members}) != len(members):
        raise ValueError("it has two members of one name")
    for member in members:
        stored = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & _ENCRYPTED
        if not stored or member.compress_size != member.file_size:
            raise ValueError(f"{member.filename} is compressed or encrypted, as torch.save never does")
        if member.is_dir() or member.external_attr & _DIRECTORY:
            # torch would read nothing of it, and return whatever lies in memory.
            raise ValueError(f"{member.filename} is a directory, as torch.save never makes one")
    if sum(member.file_size for member in members) > len(payload):
        raise ValueError("its members are longer together than the whole")
    return archive


def member_content(payload: bytes, member: zipfile.ZipInfo) -> memoryview:
    """The bytes of a member of ``open_archive(payload)``; no copy is made."""
    lengths = payload[member.header_offset + 26 : member.header_offset + _LOCAL_NBYTES]
    names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    start = member.header_offset + _LOCAL_NBYTES + names
    return memoryview(payload)[start : start + member.file_size]


def require_sound(archive: zipfile.ZipFile) -> None:
    """Compare all checksums.

    Raises:
        Exception: of whatever kind, if one differs or a member cannot be read.
    """
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} differs")


def require_plain_pickles(payload: bytes, archive: zipfile.ZipFile | None) -> None:
    """``native.check_pickle`` of every pickle in an archive, or of those that another payload begins with.

    Raises:
        ValueError: one asks for more memory or time than its length justifies.
        Exception: of whatever kind, if one cannot be read.
    """
    if archive is not None:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                _require_plain(archive.read(name), name)
        return
    rest = memoryview(payload)
    for _ in range(_LEGACY_PICKLES):
        rest = rest[native.check_pickle(rest, archive=True) :]


def _require_plain(pickle: bytes, name: str) -> None:
    try:
        native.check_pickle(pickle, archive=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
