# SPDX-License-Identifier: Apache-2.0
"""The kinds of failure a user can meet.

Every message says what failed, where (rank, path, tensor) and what to do about it. Where a built-in
type is the natural one to catch, the kind derives from it as well.
"""

from __future__ import annotations

import os


class CheckpointError(Exception):
    """Base of every error that ckpt_fast raises on its own account."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint, or no file of one, where one was asked for."""

    # OSError formats its arguments as (errno, strerror); ours is one plain message.
    __str__ = Exception.__str__


class UnknownFormatError(CheckpointNotFoundError, NotImplementedError):
    """The directory exists, but is not a checkpoint of a known format."""


class CheckpointCorruptError(CheckpointError):
    """Bytes on disk are not what was written: truncated, altered, or half a checkpoint."""


class DamagedFileError(CheckpointCorruptError, RuntimeError):
    """A small file of a checkpoint (train state, configuration, tracker) is missing, empty or altered."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The checkpoint is sound but does not fit what was asked of it (keys, shapes, format, layout)."""


class CheckpointWriteError(CheckpointError, OSError):
    """Writing failed. ``errno`` and ``filename`` are those of the failed call.

    Args:
        message: the whole text shown to the user.
        errno: the operating system's error number, or None when there is none.
        filename: the path that could not be written.
    """

    def __init__(
        self, message: str, errno: int | None = None, filename: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(message)
        self.errno = errno
        self.filename = os.fspath(filename) if filename is not None else None

    __str__ = Exception.__str__

    def __reduce__(self) -> tuple[type[CheckpointWriteError], tuple[object, ...]]:
        return type(self), (str(self), self.errno, self.filename)


class UnsafeCheckpointError(CheckpointError):
    """Loading would have to run code contained in the checkpoint, or would for what is to be saved."""


class AsyncSaveError(CheckpointError, RuntimeError):
    """A background save failed; ``__cause__`` is the first error."""
