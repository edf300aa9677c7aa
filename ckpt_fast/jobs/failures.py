# SPDX-License-Identifier: Apache-2.0
"""Saves that fail, for those who may go on without them: the policy, what has failed, and the error in other
words."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ckpt_fast.errors import (
    AsyncSaveError,
    CheckpointError,
    CheckpointWriteError,
    RankLostError,
    StorageError,
)
from ckpt_fast.ranks.group import ControlGroup


class FailurePolicy(NamedTuple):
    """What is done about a background save that fails.

    Attributes:
        goes_on: training continues.
        most: after no more than so many failures in a row.
    """

    goes_on: bool
    most: int

    def __str__(self) -> str:
        if not self.goes_on:
            return "raise if a background save fails"
        return f"go on after up to {self.most} failed background saves"


def agreed_policy(group: ControlGroup, read: Callable[[], FailurePolicy]) -> FailurePolicy:
    """Collective. The policy of all ranks. One that goes on alone would wait for the others for ever.

    Raises:
        ValueError: on every rank: ``read`` raised it on one, or ranks have different policies.
    """
    policies = group.all_gather(group.agree(read, keep_kind=True))
    for rank, policy in enumerate(policies):
        if policy != policies[0]:
            raise ValueError(
                f"rank 0 would {policies[0]}, rank {rank} would {policy}: set on_save_failure and "
                "max_failed_saves (CKPT_FAST_ON_SAVE_FAILURE, CKPT_FAST_MAX_FAILED_SAVES) alike on all ranks"
            )
    return policies[0]


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
