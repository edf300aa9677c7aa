# SPDX-License-Identifier: Apache-2.0
"""Small files of a checkpoint, read whole: regular ones, at once, never more than they say they have."""

from __future__ import annotations

import errno
import os
import stat

from ckpt_fast import system
from ckpt_fast.errors import CheckpointCorruptError

# No metadata, state of a data loader or object of a known run comes near.
LARGEST_FILE = 4 << 30
# Trackers, seals, configurations: what people could have written.
LARGEST_TEXT = 16 << 20

_OPENING = os.O_RDONLY | system.open_flags("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY")
_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def read_small_file(path: str | os.PathLike[str], limit: int = LARGEST_FILE) -> bytes:
    """Local. The content of a regular file, or of one that a symbolic link leads to.

    Args:
        path: the file.
        limit: the most bytes that a file of this kind has.

    Raises:
        CheckpointCorruptError: it is a FIFO, a socket, a device or a directory, which nobody waits for, or it
            is longer than ``limit``.
        OSError: it cannot be opened or read; FileNotFoundError if it is not there.
    """
    try:
        # A FIFO is opened at once that way, and not when somebody writes to it.
        descriptor = os.open(path, _OPENING)
    except OSError as error:
        if error.errno == errno.ENXIO:  # sockets
            _require_regular(path, os.stat(path))
        if isinstance(error, NotADirectoryError):  # it would be in what is a file
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from error
        raise
    try:
        status = os.fstat(descriptor)
        _require_regular(path, status)
        if status.st_size > limit:
            raise CheckpointCorruptError(
                f"{os.fspath(path)} has {status.st_size} bytes, and no such file has more than {limit}: it "
                "is damaged. Load an earlier iteration, or restore the file."
            )
        parts, left = [], status.st_size
        while left > 0 and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def ends_so(path: str | os.PathLike[str], nbytes: int, ending: bytes) -> bool:
    """Local. Whether a file is there, has this length, and ends with these bytes."""
    try:
        descriptor = os.open(path, _OPENING)
    except OSError:
        return False
    try:
        if os.fstat(descriptor).st_size != nbytes:
            return False
        os.lseek(descriptor, -len(ending), os.SEEK_END)
        return os.read(descriptor, len(ending)) == ending
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _require_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
        raise CheckpointCorruptError(
            f"{os.fspath(path)} is a {kind}, where a checkpoint has a regular file. Load an earlier "
            "iteration, or restore the file."
        )
