# SPDX-License-Identifier: Apache-2.0
"""The kinds of failure a user can meet.

Every message says what failed, where (rank, path, tensor) and what to do about it. Where a built-in
type is the natural one to catch, the kind derives from it as well.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any


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


class StorageError(CheckpointError, OSError):
    """Object storage cannot be reached, or refuses a request; that says nothing about the checkpoint."""

    __str__ = Exception.__str__


class UnsafeCheckpointError(CheckpointError):
    """Loading would have to run code contained in the checkpoint, or would for what is to be saved."""


class AsyncSaveError(CheckpointError, RuntimeError):
    """A background save failed; ``__cause__`` is the first error."""


class RankLostError(CheckpointError):
    """Another rank has ended or does not answer. Nothing collective can follow."""


class UnavailableError(ImportError):
    """A part of an optional package was used that is not installed; the text names the package."""


@contextlib.contextmanager
def also_raised_as(foreign: type[BaseException]) -> Iterator[None]:
    """A block, or as a decorator a function, whose CheckpointErrors can be caught as ``foreign`` as well.

    For entry points that implement another library's interface: their callers catch that library's errors.
    Such an error is the same object in all other respects, and travels to other ranks.
    """
    try:
        yield
    except CheckpointError as error:
        if not isinstance(error, foreign):
            error.__class__ = _joined(type(error), foreign)
        raise


_classes: dict[tuple[type[CheckpointError], type[BaseException]], type[CheckpointError]] = {}


def _joined(own: type[CheckpointError], foreign: type[BaseException]) -> type[CheckpointError]:
    """The class that is both, by the name of ``own``, whose text and arguments it has; one for each two."""

    def reduce(error: CheckpointError) -> tuple[Any, ...]:
        reduced: Any = own.__reduce__(error)
        return (_rebuild, (own, foreign, reduced[1]), *reduced[2:])

    if (own, foreign) not in _classes:
        members = {
            "__module__": own.__module__,
            "__doc__": own.__doc__,
            "__str__": own.__str__,
            "__reduce__": reduce,
        }
        _classes[own, foreign] = type(own.__name__, (own, foreign), members)
    return _classes[own, foreign]


def _rebuild(
    own: type[CheckpointError], foreign: type[BaseException], arguments: tuple[Any, ...]
) -> CheckpointError:
    return _joined(own, foreign)(*arguments)
