# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint will fit, asked before anything is removed or written."""

from __future__ import annotations

import contextlib
import errno
import os
import re

from ckpt_fast import settings, system
from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.storage.commit import is_payload

# Headers, padding and metadata, next to the values.
OVERHEAD = 1.01


def has_room_beside(directory: str, nbytes: int) -> bool:
    """Whether the file system has room for so many bytes of values without losing any it has; see below."""
    free = _free_nbytes(directory)
    return free is None or free >= int(nbytes * OVERHEAD)


def require_space(directory: str, nbytes: int) -> None:
    """Refuse a save that the file system has no room for; one that is replaced counts as free.

    File systems that don't say how large they are (object stores), or that have quotas, can't be asked; there
    the write itself fails when it comes to that.

    Args:
        directory: the checkpoint; need not exist.
        nbytes: values that all ranks will write.

    Raises:
        CheckpointWriteError: errno ENOSPC, with both sizes.
    """
    free = _free_nbytes(directory)
    if free is None:
        return
    free += _replaced_nbytes(directory)
    needed = int(nbytes * OVERHEAD)
    if free < needed:
        raise CheckpointWriteError(
            f"cannot save to {directory}: the checkpoint takes about {needed / 1e9:.2f} GB, but its file "
            f"system has {free / 1e9:.2f} GB free. Nothing was written and no checkpoint was touched. Free "
            "space, or keep fewer checkpoints; CKPT_FAST_SPACE_CHECK=0 tries regardless.",
            errno.ENOSPC,
            directory,
        )


def file_system_of(directory: str) -> tuple[str, str]:
    """(type, device) of the file system that a directory is in, or will be; "" where that is not known."""
    path, found = os.path.realpath(directory), ("", "", "")
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            # The optional fields end with the dash; spaces in paths are escaped.
            mounted = _unescaped(left.split(" ")[4])
            if f"{path}/".startswith(f"{mounted.rstrip('/')}/") and len(mounted) >= len(found[2]):
                kind, device, *_ = right.split(" ")
                found = (kind, device, mounted)
    return found[0], found[1]


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _free_nbytes(directory: str) -> int | None:
    """The free space there; None if it is not needed or not known."""
    if not settings.space_check():
        return None
    existing = os.path.abspath(directory)
    while not os.path.isdir(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    try:
        free, total = system.disk_space(existing)
    except OSError:
        return None  # preparing the directory says better what is wrong with it
    return free if total else None


def _replaced_nbytes(directory: str) -> int:
    nbytes = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if is_payload(entry.name):
                status = os.stat(entry.path)  # on Windows, the entry itself does not know the links
                # A backup made of hard links keeps what has another name.
                nbytes += status.st_size if status.st_nlink == 1 else 0
    return nbytes
