# SPDX-License-Identifier: Apache-2.0
"""Background saves that fail while training goes on: what is cleaned up, what is said, when it is too many.

A failed save is the same error on every rank (``ControlGroup``), so all ranks come here together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

from ckpt_fast import compat, settings
from ckpt_fast.callbacks import CallbackContext
from ckpt_fast.doors.dcp.direct import save as dcp_save
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.doors.megatron.torch_dist import FastSaveStrategy
from ckpt_fast.errors import AsyncSaveError, CheckpointError
from ckpt_fast.jobs import metrics, untold
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.jobs.failures import (
    FailurePolicy,
    agreed_policy,
    is_of_storage,
    is_rank_lost,
    like,
    one_line,
)
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.jobs.worker import LEAVE_S, Task
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import get_rank_safe, on_all_ranks, warn_rank_0
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.run.config_checks import check_choices
from ckpt_fast.storage import commit
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer.contents import hugging_face, local, sidecars
from ckpt_fast.trainer.places import catalog
from ckpt_fast.trainer.places.locate import _get_global_non_persistent_checkpoint_dirs
from ckpt_fast.trainer.places.paths import CONFIG_FILE, TRAIN_STATE_FILE, get_checkpoint_name
from ckpt_fast.trainer.save.run import SaveRun
from ckpt_fast.trainer.save.target import SaveTarget

logger = logging.getLogger(__name__)
_EVENT = "on_checkpoint_save_failed"


def policy_of(ckpt_cfg: Any) -> FailurePolicy:
    """What the configuration says, which may lack the fields, or else the environment.

    Raises:
        ValueError: naming the field or variable that is invalid.
    """
    check_choices(ckpt_cfg)
    action = getattr(ckpt_cfg, "on_save_failure", None) or settings.on_save_failure()
    most = getattr(ckpt_cfg, "max_failed_saves", None) or settings.max_failed_saves()
    return FailurePolicy(action == "continue", most)


def agree_on_policy(state: Any, ckpt_cfg: Any) -> None:
    """Collective, before the first save of a queue. A rank that goes on alone would wait for the others.

    Raises:
        ValueError: on every rank: the policy of a rank is invalid, or differs from that of another.
    """
    queue = state.async_calls_queue
    if not isinstance(queue, AsyncCallsQueue) or queue.failures.is_policy_agreed:
        return
    agreed_policy(ControlGroup(), lambda: policy_of(ckpt_cfg))
    queue.failures.is_policy_agreed = True


class FollowUp:
    """What follows if one save fails and training goes on.

    Args:
        run, target: the save.
        callback_manager: its ``on_checkpoint_save_failed`` callbacks fire.
    """

    def __init__(self, run: SaveRun, target: SaveTarget, callback_manager: Any | None) -> None:
        self._run = run
        self._target = target
        self._callbacks = callback_manager
        # What was there before: another checkpoint, perhaps of a format that ckpt_fast does not write.
        self._others: set[str] = set()
        if run.is_async and self._removes():
            with contextlib.suppress(OSError):
                self._others = {name for name in os.listdir(self.directory) if not commit.is_payload(name)}

    @property
    def directory(self) -> str:
        """The checkpoint."""
        return self._target.checkpoint_name

    def forget(self) -> None:
        """Local. Let the next save reuse nothing."""
        context = self._run.context if self._run.context is not None else {}
        strategy = context.get("save_strategy")
        for each in (strategy, getattr(strategy, "base_strategy", None)):
            if isinstance(each, (FastSaveStrategy, FastParallelSaveWrapper)):
                each.forget()
        dcp_save.forget()
        local.forget(context)

    def remove_files(self) -> None:
        """Local. Remove what the save has left in its directory, where nobody writes any more."""
        if self._removes():
            _remove_unfinished(self.directory, self._others)

    def remove_directory(self) -> None:
        """Local. Remove the directory of a save that has hardly begun, if it is empty."""
        if self._removes():
            with contextlib.suppress(OSError):
                os.rmdir(self.directory)

    def newest(self) -> str:
        """Local. The newest checkpoint there is, for the log. Does not wait long for storage that hangs."""
        task = Task("ckpt_fast-look", self._look, lambda: None)
        try:
            task.start()
            if not task.wait(LEAVE_S):
                return "the storage does not say which checkpoint is the newest"
            return task.result()
        except Exception as error:
            return f"nobody can tell which checkpoint is the newest ({error})"

    def fire(self, error: CheckpointError, failed_saves: int) -> None:
        """Collective: a callback may be on some ranks only, and its error is raised on all."""
        manager, run = self._callbacks, self._run

        def fire() -> None:
            # Bridge's managers know the events of Bridge only.
            if manager is not None and _EVENT in getattr(manager, "events", ()):
                context = CallbackContext(
                    state=run.state,
                    model=run.model,
                    user_state=manager.user_state,
                    optimizer=run.optimizer,
                    save_error=error,
                    failed_saves=failed_saves,
                )
                manager.fire(_EVENT, context)

        on_all_ranks(fire)

    def _removes(self) -> bool:
        return get_rank_safe() == 0 and not (self._target.is_local or object_storage(self.directory))

    def _look(self) -> str:
        cfg = self._run.ckpt_cfg
        roots = [cfg.save] if cfg.save else []
        if cfg.non_persistent_ckpt_type == "global":
            roots += _get_global_non_persistent_checkpoint_dirs(None, cfg)
        found = [(catalog.published(root), root) for root in roots]
        best, root = max(found, key=lambda each: each[0].iteration, default=(catalog.Published(), ""))
        if best.iteration == catalog.NOTHING:
            return "there is no checkpoint to resume from yet"
        return f"the newest checkpoint is {get_checkpoint_name(root, best.iteration, best.is_release)}"


def remember(state: Any, follow_up: FollowUp) -> None:
    """Local. Do what ``follow_up`` says if the save that was scheduled last fails in the background."""
    if isinstance(state.async_calls_queue, AsyncCallsQueue):
        state.async_calls_queue.handles[-1].follow_up = follow_up


def note_success(state: Any) -> None:
    """Local, on every rank. A save of the run succeeded."""
    if isinstance(state.async_calls_queue, AsyncCallsQueue):
        state.async_calls_queue.failures.end()


def finalize(queue: Any, ckpt_cfg: Any, *, blocking: bool, is_last: bool) -> None:
    """Collective. Finalize what all ranks have written, and go on after failures as far as is allowed.

    Args:
        queue: of background saves.
        ckpt_cfg: CheckpointConfig.
        blocking: wait for all saves in flight.
        is_last: the run ends: wait for all, and raise if the last save has failed, even if that was reported
            before.

    Raises:
        AsyncSaveError: on every rank, if a save failed that training may not go on without.
        CheckpointWriteError: the same, of a last save that storage kept from going on in the background.
    """
    in_flight: list[SaveHandle] = list(getattr(queue, "handles", ()))
    raised: CheckpointError | None = None
    while True:
        try:
            queue.maybe_finalize_async_calls(blocking or is_last)
            break
        except AsyncSaveError as error:
            # They end in order: this one failed, and those before it were published.
            before, in_flight = in_flight, list(getattr(queue, "handles", ()))
            ended = before[: len(before) - len(in_flight)]
            if not _may_go_on(queue, ckpt_cfg, error) or not ended:
                raise
            failed = ended[-1]
            follow_up = failed.follow_up
            if ControlGroup().all_true(failed.abandon(0.0)) and follow_up is not None:
                follow_up.remove_files()
            try:
                _go_on(queue, ckpt_cfg, error, follow_up, failed.report, is_last=is_last and not in_flight)
            except CheckpointError as too_many:
                # Nobody will come for those that are still in flight, and one of them may be good.
                if not (is_last and in_flight):
                    raise
                raised = raised or too_many
    if raised is not None:
        raise raised
    if is_last and isinstance(queue, AsyncCallsQueue) and queue.failures.untold is not None:
        last, queue.failures.untold = queue.failures.untold, None
        raise like(last, f"the last save of the run failed, and training went on without it: {last}")


@contextlib.contextmanager
def storage_errors_tolerated(run: SaveRun, target: SaveTarget, follow_up: FollowUp) -> Iterator[None]:
    """Collective. A block that begins a background save: if storage fails in it, training goes on as if
    that had happened later.

    Any other error (a state that cannot be saved, a bug, an interruption) is raised.
    """
    try:
        yield
    except CheckpointError as error:
        queue, ckpt_cfg = run.state.async_calls_queue, run.ckpt_cfg
        if not run.is_async or not _may_go_on(queue, ckpt_cfg, error):
            raise
        # Only the rank where it happened sees the cause.
        if ControlGroup().all_true(not is_of_storage(error)):
            raise
        report = SaveReport(target.checkpoint_name)
        untold.forget(report.directory)
        follow_up.remove_directory()
        _go_on(queue, ckpt_cfg, error, follow_up, report, is_last=False)


def _may_go_on(queue: Any, ckpt_cfg: Any, error: CheckpointError) -> bool:
    if not isinstance(queue, AsyncCallsQueue) or not queue.failures.is_policy_agreed:
        return False
    return policy_of(ckpt_cfg).goes_on and not is_rank_lost(error)


def _go_on(
    queue: AsyncCallsQueue,
    ckpt_cfg: Any,
    error: CheckpointError,
    follow_up: FollowUp | None,
    report: SaveReport,
    *,
    is_last: bool,
) -> None:
    """Collective. Forget it and say so; raise if that was one failure too many, or the last save of a run."""
    failures, most = queue.failures, policy_of(ckpt_cfg).most
    failures.count += 1
    failures.untold = None
    if follow_up is not None:
        follow_up.forget()
        report.directory = follow_up.directory
    text = one_line(error)
    report.error = text
    metrics.notify(report, get_rank_safe())
    is_raised = failures.count > most or is_last
    if not is_raised:
        failures.untold = like(error, str(error))
        newest = follow_up.newest() if follow_up is not None and get_rank_safe() == 0 else ""
        warn_rank_0(
            f"{text}. Training continues without it (on_save_failure='continue'), and "
            f"{newest or 'the newest checkpoint is as before'}. Failed saves in a row: {failures.count} of "
            f"{most} allowed."
        )
    if follow_up is not None:
        follow_up.fire(error, failures.count)
    if failures.count > most:
        raise like(
            error,
            f"{failures.count} background saves in a row failed, more than max_failed_saves={most} allows. "
            f"The last: {error}",
        ) from error
    if is_last:
        raise error


def _remove_unfinished(directory: str, others: set[str]) -> None:
    """Remove the files of a checkpoint that was not completed, and the directory if nothing else is in it.

    Args:
        directory: the checkpoint.
        others: names that are not the save's.
    """
    try:
        if not os.path.isdir(directory):
            return
        if commit.seals_among(os.listdir(directory)):
            return  # whole: only what follows the seal has failed, or all was written beside an older one
        commit.invalidate(directory)
        commit.remove_files(directory, {CONFIG_FILE, TRAIN_STATE_FILE} - others)
        for name in {sidecars.TOKENIZER_DIR, hugging_face._HF_WEIGHTS_SUBDIR, compat.MODELOPT_DIR} - others:
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    except (OSError, CheckpointError) as error:
        logger.warning("what the failed save has left in %s is not removed: %s", directory, error)
