# SPDX-License-Identifier: Apache-2.0
"""Putting a loaded state dict where it belongs: train state, model, optimizer, scheduler, RNG."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError, DamagedFileError
from ckpt_fast.glu.layout import LOCAL_SIZES_KEY, Sizes, _is_model_section, reorder_late, require_same_sizes
from ckpt_fast.glu.model import (
    _get_model_glu_interleave_sizes,
    _process_state_dict_for_model_glu_interleaving,
)
from ckpt_fast.ranks.world import warn_rank_0
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.contents.local import is_layer_wise, layer_wise_optimizer_path
from ckpt_fast.trainer.contents.megatron_lm import ARGUMENTS, _get_train_state_from_state_dict
from ckpt_fast.trainer.contents.rng import restore_rng_state
from ckpt_fast.trainer.contents.state_dict import RERUN_KEY, _load_model_state_dict
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.located import Located
from ckpt_fast.trainer.load.plan import LoadPlan
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRAIN_STATE_FILE,
    get_checkpoint_train_state_filename,
    iteration_of,
)
from ckpt_fast.trainer.places.trackers import read_train_state


def read_progress(located: Located) -> TrainState | None:
    """The progress of the run that saved a non-local checkpoint. Read on rank 0, for all ranks.

    Returns:
        None where only the payload says it: in Megatron-LM's of the format fsdp_dtensor.

    Raises:
        DamagedFileError: ``train_state.pt`` cannot be read, is of another iteration, or is missing in a
            checkpoint that is not Megatron-LM's.
    """
    path, checkpoint = get_checkpoint_train_state_filename(located.name), located.opened
    if checkpoint.holds(TRAIN_STATE_FILE):
        train_state = read_train_state.read_from(checkpoint, TRAIN_STATE_FILE)
        _require_same_iteration(int(train_state.step), path, located)
        return train_state
    if checkpoint.holds(CONFIG_FILE) or not _has_arguments(located):
        raise DamagedFileError(
            f"{path} is missing: nobody can tell how far the run had come. Restore the file, load another "
            "checkpoint, or take the weights alone (finetune=True)."
        )
    return _get_train_state_from_state_dict(located.common) if located.kind is CheckpointType.GLOBAL else None


def _has_arguments(located: Located) -> bool:
    """Whether the arguments of Megatron-LM are in the checkpoint. Local."""
    if located.kind is CheckpointType.GLOBAL:
        return ARGUMENTS in located.common
    return any(name.partition(".")[0] == ARGUMENTS for name in located.opened.index.names)


def _require_same_iteration(step: int, path: str, located: Located) -> None:
    named, common = iteration_of(str(located.name)), located.common
    others = {f"the directory's name says {named}": named if named >= 0 else step}
    if isinstance(common.get("iteration"), int):
        others[f"its common state says {common['iteration']}"] = common["iteration"]
    for what, iteration in others.items():
        if iteration != step:
            raise DamagedFileError(
                f"{path} is of iteration {step}, but {what}. One of them is of another save, or damaged. "
                "Restore it, or load another checkpoint."
            )


def counters_of(
    state: Any, progress: TrainState | None, state_dict: dict[str, Any], located: Located
) -> TrainState | None:
    """The counters to go on from: those that ``read_progress`` read or those in the loaded state. Local.

    Returns:
        None for finetuning, which keeps its own.
    """
    if state.cfg.checkpoint.finetune:
        return None
    return progress or _loaded_train_state(state_dict, located.kind)


def restore_train_state(state: Any, counters: TrainState | None, located: Located) -> None:
    """Take over the counters."""
    if counters is not None:
        state.train_state = counters
    if counters is None or located.found.is_release:
        state.train_state.step = 0
    if counters is not None:
        compat.update_num_microbatches(
            consumed_samples=state.train_state.consumed_train_samples, verbose=True
        )


def _loaded_train_state(state_dict: dict[str, Any], kind: CheckpointType) -> TrainState:
    if kind is not CheckpointType.LOCAL:
        return _get_train_state_from_state_dict(state_dict)
    train_state = TrainState(step=state_dict.get("iteration", 0))
    if "train_state_metadata" in state_dict:
        train_state.load_state_dict(state_dict["train_state_metadata"])
    else:
        warn_rank_0("the local checkpoint has no train state; only the iteration is restored")
    return train_state


def restore_model(
    run: LoadRun, plan: LoadPlan, located: Located, state_dict: dict[str, Any], strict: bool
) -> None:
    """Give the model its state, with GLU rows in the order it has them.

    Raises:
        CheckpointMismatchError: a section does not fit its chunk, or the rows of a local checkpoint do not.
    """
    sizes = _get_model_glu_interleave_sizes(run.model, run.state.cfg)
    if located.kind is CheckpointType.LOCAL:
        require_same_sizes(state_dict.get(LOCAL_SIZES_KEY, (None, None)), sizes, "The rows of gated MLPs")
    elif located.kind is CheckpointType.FSDP_DTENSOR:
        _interleave_fsdp(state_dict, sizes, run.state.cfg)
    else:
        reorder_late(plan.chunks, state_dict)
    load_sections(run.model, state_dict, strict)


def load_sections(model: list[Any], state_dict: dict[str, Any], strict: bool) -> None:
    """Give each chunk its section; of several chunks, one may have none: a pipeline stage without layers.

    Raises:
        CheckpointMismatchError: a section does not fit its chunk, or the only chunk has none.
    """
    if len(model) == 1:
        if "model" not in state_dict:
            raise CheckpointMismatchError(
                f"the checkpoint has no model section, but {', '.join(state_dict)}. Load it into as many "
                "model chunks as it was saved from."
            )
        _load_model_state_dict(model[0], state_dict["model"], strict)
        return
    for number, chunk in enumerate(model):
        if f"model{number}" in state_dict:
            _load_model_state_dict(chunk, state_dict[f"model{number}"], strict)


def _interleave_fsdp(state_dict: dict[str, Any], sizes: Sizes, cfg: Any) -> None:
    use_megatron_fsdp = bool(getattr(getattr(cfg, "ddp", None), "use_megatron_fsdp", False))
    for section in sorted(filter(_is_model_section, state_dict)):
        state_dict[section] = _process_state_dict_for_model_glu_interleaving(
            state_dict[section], *sizes, use_megatron_fsdp=use_megatron_fsdp
        )


def restore_optimizer(
    run: LoadRun, plan: LoadPlan, located: Located, state_dict: dict[str, Any], *, left_alone: bool
) -> None:
    """Give optimizer and scheduler their state; ``left_alone``: nothing was loaded for the optimizer."""
    optimizer, scheduler = run.optimizer, run.scheduler
    if not plan.optimizer:
        if not left_alone:
            reload_model_params(state_dict, run.state.cfg, optimizer)
        return
    layer_wise_path = _find_layer_wise_state(run, located)
    try:
        if (
            not run.skip_model_and_optimizer
            and optimizer is not None
            and not getattr(optimizer, "is_stub_optimizer", False)
        ):
            if layer_wise_path is not None:
                optimizer.load_state_dict_from_file(layer_wise_path)
            else:
                # Local checkpoints copy into leaf parameters.
                with torch.no_grad(), compat.keep_adam_steps(optimizer):
                    optimizer.load_state_dict(compat.fit_to_members(optimizer, state_dict["optimizer"]))
                _restore_step_counts(optimizer)
        if scheduler is not None:
            key = "lr_scheduler" if "lr_scheduler" in state_dict else "opt_param_scheduler"
            saved = state_dict[key]
            if isinstance(scheduler, compat.OptimizerParamScheduler):
                scheduler.num_steps = 0  # the saved steps are added to those it has taken
            scheduler.load_state_dict(saved)
    except KeyError as error:
        warn_rank_0(
            f"Unable to load the optimizer from the checkpoint: {error} is missing. Set load_optim=False or "
            "finetune=True to start with a fresh one.",
            logging.ERROR,
        )
        raise


def _restore_step_counts(optimizer: Any) -> None:
    """Give torch's own Adam back its step counts, one tensor per parameter.

    Megatron-Core's distributed optimizer leaves all parameters with one shared tensor that is zero, unless
    Transformer Engine or Apex brings the Adam: each update would then scale its moments wrongly.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state.get(parameter, {})
                if "step" in group and isinstance(state.get("step"), torch.Tensor):
                    state["step"] = torch.full_like(state["step"], float(group["step"]))


def reload_model_params(state_dict: dict[str, Any] | None, cfg: Any, optimizer: Any | None) -> None:
    """Without restored optimizer state its master parameters follow the loaded weights.

    Args:
        state_dict: the loaded checkpoint, for ``load_main_params_from_ckpt``; None where there is none.
    """
    mixed_precision = getattr(cfg.model, "fp16", False) or getattr(cfg.model, "bf16", False)
    if not mixed_precision or optimizer is None or getattr(cfg.ddp, "use_megatron_fsdp", False):
        return
    if state_dict is not None and cfg.checkpoint.load_main_params_from_ckpt:
        optimizer.reload_model_params(state_dict=state_dict)
    else:
        optimizer.reload_model_params()


def _find_layer_wise_state(run: LoadRun, located: Located) -> str | None:
    if located.kind is not CheckpointType.LOCAL or not is_layer_wise(run.optimizer):
        return None
    assert run.context is not None
    return layer_wise_optimizer_path(run.context["local_checkpoint_manager"].local_ckpt_dir, run.groups)


def restore_rerun_and_rng(plan: LoadPlan, state_dict: dict[str, Any], cfg: Any, pg_collection: Any) -> None:
    if plan.rerun and RERUN_KEY in state_dict:
        try:
            compat.get_rerun_state_machine().load_state_dict(state_dict[RERUN_KEY])
        except Exception as error:
            warn_rank_0(f"Unable to restore the rerun state machine: {error}. Exiting ...", logging.ERROR)
            sys.exit(1)
    if not plan.rng:
        return
    try:
        restore_rng_state(
            state_dict,
            ckpt_format=cfg.checkpoint.ckpt_format,
            data_parallel_random_init=cfg.rng.data_parallel_random_init,
            pg_collection=pg_collection,
        )
    except KeyError as error:
        warn_rank_0(
            f"Unable to load the RNG state: {error} is missing. Set load_rng=False or finetune=True to go on "
            "without it. Exiting ...",
            logging.ERROR,
        )
        sys.exit(1)
