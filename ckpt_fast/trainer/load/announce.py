# SPDX-License-Identifier: Apache-2.0
"""The log messages after a load: what was restored, from where, and what could not be restored."""

from __future__ import annotations

import os
from typing import Any

import torch

from ckpt_fast.ranks.world import get_rank_safe, is_last_rank, print_rank_0
from ckpt_fast.trainer import experiment_loggers as loggers
from ckpt_fast.trainer.contents.data_position import places_of
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.located import Located
from ckpt_fast.trainer.load.plan import LoadPlan
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places.paths import get_checkpoint_name


def announce_loaded(run: LoadRun, load_dir: str | None, checkpoint_name: Any, kind: CheckpointType) -> None:
    """Tell the log and the experiment loggers, when all ranks have loaded. Local."""
    state = run.state
    if kind is CheckpointType.LOCAL and not isinstance(checkpoint_name, (str, bytes, os.PathLike)):
        checkpoint_name = str(checkpoint_name)
    tp, pp = run.groups.tp, run.groups.pp
    print_rank_0(
        f"  successfully loaded checkpoint from {load_dir} [ t {tp.rank() + 1}/{tp.size()}, "
        f"p {pp.rank() + 1}/{pp.size()} ] at iteration {state.train_state.step}"
    )
    if is_last_rank():
        loggers.on_load_checkpoint_success(state, checkpoint_name, load_dir or checkpoint_name)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if state.train_state.step > 0:
        loggers.on_checkpoint_loaded(is_local_chkpt=kind is CheckpointType.LOCAL, global_state=state)


def announce_restored(run: LoadRun, plan: LoadPlan, located: Located) -> None:
    """One line of which parts of a checkpoint were restored, and which were not, for what reason. Local."""
    if get_rank_safe() != 0:
        return
    found, position, ckpt_cfg, skipped = located.found, located.position, run.ckpt_cfg, _skipped(run)
    planned = {
        "weights": True,
        "optimizer": plan.optimizer,
        "scheduler": plan.scheduler,
        "RNG": plan.rng,
        "rerun state": plan.rerun,
        "counters": not ckpt_cfg.finetune,
    }
    restored = [part for part, wanted in planned.items() if wanted and part not in skipped]
    reasons = {part: _reason(part, ckpt_cfg, skipped) for part in planned} | plan.lost
    left = [f"{part} ({reason})" for part, reason in reasons.items() if part not in restored and reason]
    line = f"  resumed from {found} ({found.tier}): {', '.join(restored) or 'nothing'}"
    if left:
        line += f"; not restored: {', '.join(left)}"
    if not ckpt_cfg.finetune:
        directory = position and found.iteration >= 0 and get_checkpoint_name(position, found.iteration)
        is_there = directory and places_of(directory)
        line += f"; position in the data: {directory if is_there else 'none was saved'}"
    print_rank_0(line)


def _skipped(run: LoadRun) -> set[str]:
    """Parts of a checkpoint that the caller does not want, or has nothing to restore into."""
    goals = (("optimizer", run.optimizer), ("scheduler", run.scheduler))
    absent = {part for part, goal in goals if goal is None}
    return absent | {"weights", "optimizer"} if run.skip_model_and_optimizer else absent


def _reason(part: str, ckpt_cfg: Any, skipped: set[str]) -> str:
    """Why a part was not wanted; empty where it was."""
    if part in skipped:
        return "not asked for"
    if ckpt_cfg.finetune:
        return "finetune"
    setting = {"optimizer": "load_optim", "scheduler": "load_optim", "RNG": "load_rng"}.get(part, "")
    return f"{setting}=False" if setting and not getattr(ckpt_cfg, setting) else ""
