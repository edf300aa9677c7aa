# SPDX-License-Identifier: Apache-2.0
"""Background saves of a manager that fail: training goes on without them, so many times in a row, or ends.

A failed save is the same error on every rank (``ControlGroup``), so all ranks come here together.
"""

from __future__ import annotations

import logging
from typing import get_args

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.jobs import metrics
from ckpt_fast.jobs.failures import (
    FailurePolicy,
    agreed_policy,
    is_of_storage,
    is_rank_lost,
    like,
    one_line,
)
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.settings import OnSaveFailure

logger = logging.getLogger(__name__)


class FailedSaves:
    """The failures in a row, and what is done about the next one.

    Args:
        group: the ranks that save together.
        action, most: see ``CheckpointManager``; None: what the environment says.

    Raises:
        ValueError: one of them makes no sense.
    """

    def __init__(self, group: ControlGroup, action: OnSaveFailure | None, most: int | None) -> None:
        if action is not None and action not in get_args(OnSaveFailure):
            raise ValueError(f"on_save_failure={action!r}: use one of {', '.join(get_args(OnSaveFailure))}")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise ValueError(f"max_failed_saves={most!r} is not a positive whole number")
        self._group = group
        self._asked = action, most
        self._policy: FailurePolicy | None = None
        self._count = 0
        self._last: CheckpointError | None = None

    def agree(self) -> None:
        """Collective, once. A rank that goes on alone would wait for the others forever.

        Raises:
            ValueError: on every rank: a rank does something else about failures than the others, or a
                variable of the environment makes no sense there.
        """
        if self._policy is None:
            self._policy = agreed_policy(self._group, self._read)

    def end(self) -> None:
        """Local, on every rank. A save was published."""
        self._count, self._last = 0, None

    def add(self, error: BaseException, directory: str, newest: int | None) -> None:
        """Local, on every rank. A save has failed: say so, and return if training may go on.

        Args:
            error: the same on all ranks.
            directory: the checkpoint.
            newest: the step that was published last, as far as this run knows.

        Raises:
            BaseException: ``error``; if there were too many in a row, one that says so.
        """
        if self._policy is None or not self._may_go_on(error):
            raise error
        assert isinstance(error, CheckpointError)
        most = self._policy.most
        self._count, self._last = self._count + 1, None
        report = SaveReport(directory, error=one_line(error))
        metrics.notify(report, self._group.global_rank)
        if self._count > most:
            raise like(
                error,
                f"{self._count} saves in a row failed, more than max_failed_saves={most} allows. The last: "
                f"{error}",
            ) from error
        self._last = like(error, str(error))
        if self._group.is_coordinator:
            logger.warning(
                "%s. Training continues without it (on_save_failure='continue'); the newest checkpoint of "
                "this run is %s. Failed saves in a row: %d of %d allowed.",
                report.error,
                "none" if newest is None else f"of step {newest}",
                self._count,
                most,
            )

    def require_storage(self, error: CheckpointError) -> None:
        """Collective. Return if training may go on after an error with which a save was not begun.

        What the program got wrong is raised: only storage that fails may work again.

        Raises:
            CheckpointError: ``error``.
        """
        if not self._may_go_on(error):
            raise error
        # Only the rank where it happened sees the cause.
        if self._group.all_true(not is_of_storage(error)):
            raise error

    def raise_last(self) -> None:
        """Local, on every rank. The run ends: its last save must not have failed.

        Raises:
            CheckpointError: it has, although that was said before. Once.
        """
        last, self._last = self._last, None
        if last is not None:
            raise like(last, f"the last save failed, and training went on without it: {last}")

    def _may_go_on(self, error: BaseException) -> bool:
        goes_on = self._policy is not None and self._policy.goes_on
        return goes_on and isinstance(error, CheckpointError) and not is_rank_lost(error)

    def _read(self) -> FailurePolicy:
        action, most = self._asked
        action = action or settings.on_save_failure()
        return FailurePolicy(action == "continue", most or settings.max_failed_saves())
