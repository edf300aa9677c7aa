# SPDX-License-Identifier: Apache-2.0
"""Saves in the background: handing a request to the run's queue, and publishing it once it is written."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from ckpt_fast import compat
from ckpt_fast.ranks.world import get_rank_safe, note_rank_0, warn_rank_0
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.trainer.save import failures
from ckpt_fast.trainer.save.publish import save_errors_tolerated

if TYPE_CHECKING:
    from ckpt_fast.config import CheckpointConfig
    from ckpt_fast.state import GlobalState

logger = logging.getLogger(__name__)


def schedule_async_save(global_state: GlobalState, async_request: Any) -> None:
    """Hand a save to the queue of ``global_state``. Collective.

    Without a queue the request is executed here and now: its data would never be written otherwise.

    Args:
        global_state: its ``async_calls_queue`` may be None.
        async_request: a save handle, or an AsyncRequest of the queue's own package.

    Raises:
        AsyncSaveError: without a queue, on every rank, if any rank could not write its data.
    """
    queue = global_state.async_calls_queue
    if queue is not None:
        queue.schedule_async_request(async_request)
        return
    _warn_without_queue()
    queue = AsyncCallsQueue()
    queue.schedule_async_request(async_request)
    queue.maybe_finalize_async_calls(True)
    queue.close()


def make_room(global_state: GlobalState, ckpt_cfg: CheckpointConfig) -> bool:
    """Whether a new save may begin, as ``on_save_in_progress`` says. Collective.

    Raises:
        AsyncSaveError: on every rank, if a save before failed; see ``maybe_finalize_async_save``.
        ValueError: on every rank, what is to be done then is invalid or not the same everywhere.
    """
    failures.agree_on_policy(global_state, ckpt_cfg)
    policy = getattr(ckpt_cfg, "on_save_in_progress", "wait")
    if policy == "queue" or is_empty_async_queue(global_state):
        return True
    maybe_finalize_async_save(global_state, ckpt_cfg)
    if is_empty_async_queue(global_state):
        return True
    if policy == "skip":
        warn_rank_0(
            "no checkpoint is saved now: the one before is still being written (on_save_in_progress='skip')"
        )
        return False
    _say_that_training_waits()
    maybe_finalize_async_save(global_state, ckpt_cfg, blocking=True)
    return True


def end_save_to(global_state: GlobalState, ckpt_cfg: CheckpointConfig, directory: str) -> None:
    """Finalize the saves in flight if one of them is to ``directory``, which is saved to again. Collective.

    Raises:
        AsyncSaveError: on every rank, if a save before failed; see ``maybe_finalize_async_save``.
    """
    in_flight = [handle.directory for handle in getattr(global_state.async_calls_queue, "handles", ())]
    if directory not in in_flight:
        return
    note_rank_0(f"training waits for the save to {directory} that is in flight: it is saved to again")
    maybe_finalize_async_save(global_state, ckpt_cfg, blocking=True)


def maybe_finalize_async_save(
    global_state: GlobalState,
    ckpt_cfg: CheckpointConfig,
    blocking: bool = False,
    terminate: bool = False,
) -> None:
    """Publish the saves whose data is written on all ranks. Collective.

    Without ``blocking``, nobody waits for storage: the coordinator publishes in a thread, and a later call
    runs what follows a save (callbacks, retention), or raises what went wrong.

    With ``on_save_failure="continue"``, a failed save is one line of warning, and training goes on. The call
    with ``terminate`` is the last of a run (the documented one at the end of training is
    ``blocking=True, terminate=True``): it raises if the last save failed, also if that was found out in an
    earlier call. ``blocking`` alone is not taken for the end of the run.

    Args:
        global_state: holds the queue.
        ckpt_cfg: with ``async_save`` off there is nothing to do.
        blocking: wait for all saves in flight.
        terminate: wait for them as well, and close the queue afterwards.

    Raises:
        AsyncSaveError: on every rank, if a save failed. Not with ``on_save_error="warn"``; with
            ``on_save_failure="continue"`` if it was the last one of the run, if more than
            ``max_failed_saves`` failed in a row, or if a rank was lost.
        CheckpointWriteError: the same, of a last save whose storage failed before it could go on in the
            background.
    """
    if not ckpt_cfg.async_save:
        return
    queue = global_state.async_calls_queue
    if queue is None:
        return
    if blocking and not is_empty_async_queue(global_state):
        note_rank_0("Unfinalized async checkpoint saves. Finalizing them synchronously now.")
    with save_errors_tolerated(ckpt_cfg, queue):
        failures.finalize(queue, ckpt_cfg, blocking=blocking, is_last=terminate)
    if terminate:
        queue.close()


def is_empty_async_queue(global_state: GlobalState) -> bool:
    """True if no save is in flight; the same on all ranks, as scheduling and finalising are collective."""
    queue = global_state.async_calls_queue
    return queue is None or int(queue.get_num_unfinalized_calls()) == 0


def get_save_and_finalize_callbacks(writer: Any, save_state_dict_ret: Any) -> Any:
    """An nvidia-resiliency-ext request that writes with ``writer`` and then finishes the checkpoint.

    Args:
        writer: a FileSystemWriterAsync whose data has been prepared.
        save_state_dict_ret: what ``save_state_dict_async_plan`` returned for it.

    Raises:
        UnavailableError: nvidia-resiliency-ext is not installed.
    """
    finish = compat.save_state_dict_async_finalize
    if finish is None:
        raise compat.UnavailableError(
            "saving fsdp_dtensor checkpoints in the background needs nvidia-resiliency-ext: "
            "pip install nvidia-resiliency-ext, or use async_save=False"
        )
    save_fn, preload_fn, save_args = writer.get_save_function_and_args()

    def finalize() -> None:
        finish(*save_state_dict_ret)

    return compat.NVRxAsyncRequest(save_fn, save_args, [finalize], async_fn_kwargs={}, preload_fn=preload_fn)


@functools.cache
def _warn_without_queue() -> None:
    """Once per process: the user meant saves to overlap with training."""
    if get_rank_safe() == 0:
        logger.warning(
            "async_save is on but no queue of background saves was initialised: saves are executed "
            "synchronously. Call state.initialize_async_checkpoint_worker() before training."
        )


@functools.cache
def _say_that_training_waits() -> None:
    """Once per process: each save says how long training was held up."""
    warn_rank_0(
        "Starting a checkpoint save before previous has finished: training waits for the one before, which "
        "is still being written. Saves are asked for faster than the file system takes them "
        "(on_save_in_progress='wait')"
    )
