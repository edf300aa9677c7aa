# SPDX-License-Identifier: Apache-2.0
"""The steps after a checkpoint is published: the line for the user, loggers, callbacks, retention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ckpt_fast.callbacks import CallbackContext, should_fire
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.save.seal import last_report
from ckpt_fast.ranks.world import is_last_rank, on_all_ranks, print_rank_0
from ckpt_fast.retention.line import Lineage
from ckpt_fast.trainer import experiment_loggers as loggers
from ckpt_fast.trainer.lineage import lineage_of
from ckpt_fast.trainer.places.locate import _get_global_non_persistent_checkpoint_dirs
from ckpt_fast.trainer.places.retention import (
    cleanup_old_dataloader_states,
    delete_old,
    remove_replaced,
)
from ckpt_fast.trainer.save.run import SaveRun, dataloader_path
from ckpt_fast.trainer.save.target import SaveTarget


def logger_finalizer(run: SaveRun, target: SaveTarget) -> Callable[[], None]:
    """A function that reports the save to the experiment loggers, with the settings as they are now."""
    to_mlflow = bool(getattr(run.cfg.logger, "mlflow_log_artifacts", True))

    def tell() -> None:
        if not target.is_local and is_last_rank():
            loggers.on_save_checkpoint_success(
                run.state, target.checkpoint_name, target.save_dir, target.step, to_mlflow
            )

    return tell


def fire_callbacks(run: SaveRun, manager: Any | None) -> None:
    """Collective: a callback may be on some ranks only, and its error is raised on all."""

    def fire() -> None:
        if should_fire(manager, "on_checkpoint_save"):
            assert manager is not None
            context = CallbackContext(
                state=run.state, model=run.model, user_state=manager.user_state, optimizer=run.optimizer
            )
            manager.fire("on_checkpoint_save", context)

    on_all_ranks(fire)


def retain(run: SaveRun, target: SaveTarget, lineage: Lineage) -> None:
    """Delete what no policy keeps.

    Args:
        run, target: the save.
        lineage: the line that it belongs to. If the run has gone back since, what it was resumed from stays.
    """
    if target.policies:
        now = lineage_of(run.state)
        origin = now.origin if now is not lineage else None
        delete_old(
            target.save_dir,
            target.policies,
            do_async=run.is_async,
            max_iteration=target.step,
            protected=() if origin is None else (origin.iteration,),
        )
    states = dataloader_path(run)
    roots = (run.ckpt_cfg.save, *_get_global_non_persistent_checkpoint_dirs(None, run.ckpt_cfg))
    for root in filter(None, (*roots, states)):
        remove_replaced(root, roots)
    # A directory that the user chose is the user's to clean.
    if states and not getattr(run.cfg.dataset, "dataloader_save", None):
        cleanup_old_dataloader_states(states, roots, target.step)


def announce_saved(run: SaveRun, target: SaveTarget, ranks: str, request: Any, begin: float) -> None:
    """Say that a checkpoint is published: how long training waited for it, and when its bytes were durable.

    Args:
        run, target: the save.
        ranks: see ``rank_suffix``.
        request: a SaveHandle, or the SaveReport of a save that is over.
        begin: when the call that saves began (``time.perf_counter``).
    """
    kind = "local checkpoint" if target.is_local else "checkpoint"
    line = f"  successfully saved {kind} from iteration {target.step:7d} to {target.save_dir} {ranks}"
    facts = request.report if isinstance(request, SaveHandle) else request
    if target.is_local and not isinstance(facts, SaveReport):
        # Their manager answers with requests of another package.
        facts = last_report()
    if isinstance(facts, SaveReport):
        if not (run.is_async and run.state.async_calls_queue is not None):
            facts.stall_s = time.perf_counter() - begin
        line += f": {facts}"
    print_rank_0(line)


def rank_suffix(pg_collection: Any, tensor_rank: int | None, pipeline_rank: int | None) -> str:
    """``[ t 1/2, p 1/1 ]``: 1-based tensor and pipeline ranks."""
    tensor = pg_collection.tp.rank() if tensor_rank is None else tensor_rank
    pipeline = pg_collection.pp.rank() if pipeline_rank is None else pipeline_rank
    return f"[ t {tensor + 1}/{pg_collection.tp.size()}, p {pipeline + 1}/{pg_collection.pp.size()} ]"
