# SPDX-License-Identifier: Apache-2.0
"""What a load says: what was restored, from where, and what could not be; what was tried if nothing could."""

from __future__ import annotations

import os
from typing import Any

import torch

from ckpt_fast.pipeline.load.report import LoadReport
from ckpt_fast.ranks.world import get_rank_safe, is_last_rank, print_rank_0
from ckpt_fast.trainer import experiment_loggers as loggers
from ckpt_fast.trainer.contents.data_position import places_of
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.located import Located
from ckpt_fast.trainer.load.plan import LoadPlan
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places.catalog import Found
from ckpt_fast.trainer.places.paths import get_checkpoint_name


def announce_loaded(
    run: LoadRun,
    load_dir: str | None,
    plan: LoadPlan,
    located: Located,
    checkpoint_name: Any,
    report: LoadReport,
) -> None:
    """Tell the log and the experiment loggers, when all ranks have loaded. Local.

    Args:
        run, plan, located: the load.
        load_dir: where the checkpoint was looked for.
        checkpoint_name: what it is called; an id of another package for local ones.
        report: of what was read.
    """
    state, kind = run.state, located.kind
    if kind is CheckpointType.LOCAL and not isinstance(checkpoint_name, (str, bytes, os.PathLike)):
        checkpoint_name = str(checkpoint_name)
    tp, pp = run.groups.tp, run.groups.pp
    if get_rank_safe() == 0:
        print_rank_0(
            f"  successfully loaded checkpoint from {load_dir} [ t {tp.rank() + 1}/{tp.size()}, "
            f"p {pp.rank() + 1}/{pp.size()} ] at iteration {state.train_state.step}: "
            f"{_restored(run, plan, located)}; {report}"
        )
    if is_last_rank():
        loggers.on_load_checkpoint_success(state, checkpoint_name, load_dir or checkpoint_name)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if state.train_state.step > 0:
        loggers.on_checkpoint_loaded(is_local_chkpt=kind is CheckpointType.LOCAL, global_state=state)


def _restored(run: LoadRun, plan: LoadPlan, located: Located) -> str:
    """Which parts of a checkpoint were restored, and which were not, for what reason."""
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
    line = f"restored from {found} ({found.tier}): {', '.join(restored) or 'nothing'}"
    if left:
        line += f"; not restored: {', '.join(left)}"
    if not ckpt_cfg.finetune:
        directory = position and found.iteration >= 0 and get_checkpoint_name(position, found.iteration)
        is_there = directory and places_of(directory)
        line += f"; position in the data: {directory if is_there else 'none was saved'}"
    return line


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


def what_was_tried(ckpt_cfg: Any, chosen: Found, tried: list[str], *, falls_back: bool) -> str:
    """Whether older checkpoints were tried, which, and what was wrong with them."""
    if tried:
        listed = "".join(f"\n  {each}" for each in tried)
        return f"Older checkpoints were tried, and none could be loaded:{listed}"
    if not falls_back:
        return "Older checkpoints were not tried (on_corrupt='raise')."
    if ckpt_cfg.ckpt_step is not None:
        return f"Older checkpoints were not tried: ckpt_step={ckpt_cfg.ckpt_step} names this one."
    if chosen.root or chosen.tier == "local":
        return "There is no older checkpoint to fall back to."
    return "Other checkpoints were not tried: load names this one."
