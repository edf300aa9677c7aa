# SPDX-License-Identifier: Apache-2.0
"""Errors of saves, for those who go on without the save: what has failed, and the error in other words."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from ckpt_fast.errors import (
    AsyncSaveError,
    CheckpointError,
    CheckpointWriteError,
    RankLostError,
    StorageError,
)


def is_rank_lost(error: BaseException) -> bool:
    """Whether a rank has ended or does not answer: no collective can follow."""
    return any(isinstance(each, RankLostError) for each in _causes(error))


def is_of_storage(error: BaseException) -> bool:
    """Whether storage failed, and not a program whose error is an OSError, too. Only the rank where it
    happened knows."""
    return any(map(_says_storage, _causes(error)))


def like(error: CheckpointError, text: str) -> CheckpointError:
    """An error of the same kind with another text, and without what the frames of ``error`` keep alive."""
    if isinstance(error, CheckpointWriteError):
        return CheckpointWriteError(text, error.errno, error.filename)
    return AsyncSaveError(text)


def one_line(error: BaseException) -> str:
    """The text of an error, in one line."""
    return " ".join(str(error).splitlines())


def _says_storage(error: BaseException) -> bool:
    if isinstance(error, CheckpointWriteError):
        return error.errno != errno.EBUSY and (error.errno is not None or error.__cause__ is not None)
    return isinstance(error, StorageError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
