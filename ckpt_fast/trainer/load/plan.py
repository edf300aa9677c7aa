# SPDX-License-Identifier: Apache-2.0
"""The load plan: which parts of a checkpoint apply to this run, decided before anything is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ckpt_fast import compat
from ckpt_fast.errors import DamagedFileError
from ckpt_fast.glu.layout import (
    Sizes,
    contiguous_chunks,
    require_same_fsdp_optimizer,
    require_whole_parameters,
    sizes_to_undo,
)
from ckpt_fast.glu.model import _get_model_glu_interleave_sizes
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import note_rank_0, warn_rank_0
from ckpt_fast.trainer.contents.megatron_lm import ARGUMENTS, _extract_megatron_lm_args_from_state_dict
from ckpt_fast.trainer.contents.rng import RNG_KEY, get_rng_state, has_rng_state
from ckpt_fast.trainer.contents.state_dict import (
    RERUN_KEY,
    _build_sharded_state_dict_metadata,
    generate_state_dict,
    uses_distributed_optimizer,
)
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.located import Located
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places.locate import _get_global_non_persistent_checkpoint_dirs
from ckpt_fast.trainer.places.paths import CONFIG_FILE, get_checkpoint_run_config_filename
from ckpt_fast.trainer.places.trackers import read_run_config


@dataclass
class LoadPlan:
    """The parts of the checkpoint that apply to this run, decided before anything is loaded.

    Attributes:
        optimizer, scheduler, rng, rerun: restore this part.
        metadata: content metadata the scaffold is built with.
        glu_sizes: (routed, shared) interleave sizes of rows that the checkpoint has contiguous and the model
            interleaved, to be scattered while they are read.
        lost: part to why it cannot be restored though the user wants it.
        chunks: the model as the scaffold is built from it, rows in the checkpoint's order.
    """

    optimizer: bool = False
    scheduler: bool = False
    rng: bool = False
    rerun: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    glu_sizes: Sizes = (None, None)
    lost: dict[str, str] = field(default_factory=dict)
    chunks: list[Any] = field(default_factory=list)


def find_run_config(located: Located) -> dict[str, Any] | None:
    """The configuration a checkpoint that is not local was saved with. On rank 0, for all.

    Returns:
        None when an fsdp_dtensor checkpoint has none.

    Raises:
        DamagedFileError: ``run_config.yaml`` is damaged or empty, or missing where Megatron-LM's arguments
            are not there either.
    """
    path = get_checkpoint_run_config_filename(located.name)
    if located.opened.holds(CONFIG_FILE):
        config: dict[str, Any] | None = read_run_config.read_from(located.opened, CONFIG_FILE)
        if config is None:
            raise DamagedFileError(
                f"{path} is empty: the configuration of the run is lost. Restore it, or load another "
                "checkpoint."
            )
        return config
    if located.kind is CheckpointType.FSDP_DTENSOR:
        return None
    if ARGUMENTS not in located.common:
        raise DamagedFileError(
            f"{path} is missing, and {located.name} is no checkpoint of Megatron-LM, which has arguments "
            "instead: its layout is not known. Restore the file, or load another checkpoint."
        )
    note_rank_0(f"there is no run_config.yaml in {located.name}; reading it as a Megatron-LM checkpoint")
    return _extract_megatron_lm_args_from_state_dict(located.common)


def own_run_config(cfg: Any) -> dict[str, Any]:
    """A local checkpoint has no config of its own: it is of this very run."""
    model, checkpoint = cfg.model, cfg.checkpoint
    return {
        "model": {
            "tensor_model_parallel_size": model.tensor_model_parallel_size,
            "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
            "encoder_tensor_model_parallel_size": getattr(model, "encoder_tensor_model_parallel_size", 0),
            "encoder_pipeline_model_parallel_size": getattr(model, "encoder_pipeline_model_parallel_size", 0),
        },
        "checkpoint": {
            "save_optim": checkpoint.save_optim,
            "save_rng": checkpoint.save_rng,
            "fully_parallel_save": checkpoint.fully_parallel_save,
        },
    }


def is_mimo(run_config: dict[str, Any] | None, cfg: Any) -> bool:
    key = "megatron_mimo_parallelism_config"
    return key in ((run_config or {}).get("model") or {}) or hasattr(cfg.model, key)


def _layout_difference(run_config: dict[str, Any] | None, cfg: Any) -> str:
    """How this run's (TP, PP) differ from the checkpoint's; empty if they are equal or unknown."""
    saved_model = (run_config or {}).get("model")
    if not saved_model or is_mimo(run_config, cfg):
        return ""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    ours = tuple(getattr(cfg.model, name, None) for name in names)
    saved = tuple(saved_model.get(name) for name in names)
    if ours == saved or None in ours + saved:
        return ""
    return f"(TP, PP) mismatch after resume ({ours} vs {saved} from checkpoint)"


def _expert_difference(run_config: dict[str, Any] | None, cfg: Any) -> str:
    """The same for the expert parallelism of a model with experts."""
    name = "expert_model_parallel_size"
    ours, saved = getattr(cfg.model, name, None), ((run_config or {}).get("model") or {}).get(name)
    if not getattr(cfg.model, "num_moe_experts", None) or ours == saved or None in (ours, saved):
        return ""
    return f"EP mismatch after resume ({ours} vs {saved} from checkpoint)"


def make_plan(run: LoadRun, located: Located, run_config: dict[str, Any] | None) -> LoadPlan:
    """Decide what to restore.

    Raises:
        RuntimeError: TP, PP or EP changed, and the optimizer's sharding does not allow it.
        CheckpointMismatchError: GLU rows are stored in an order that does not fit this run.
    """
    cfg, ckpt_cfg, common = run.state.cfg, run.state.cfg.checkpoint, located.common
    saved = (run_config or {}).get("checkpoint") or {}
    difference = _layout_difference(run_config, cfg)
    resume = not located.found.is_release and not ckpt_cfg.finetune
    plan = LoadPlan()
    plan.rng = resume and ckpt_cfg.load_rng and not difference and saved.get("save_rng", True)
    plan.rerun = resume and not difference and RERUN_KEY in common
    plan.optimizer = plan.scheduler = resume and ckpt_cfg.load_optim and saved.get("save_optim", True)
    if resume and difference:
        warn_rank_0(f"{difference}: RNG and rerun state will be ignored")
        plan.lost["RNG"] = "saved for another layout"
        if RERUN_KEY in common:
            plan.lost["rerun state"] = "saved for another layout"
    if resume and ckpt_cfg.load_optim and not plan.optimizer:
        warn_rank_0("the checkpoint was saved without optimizer: it starts fresh from the loaded weights")
        plan.lost["optimizer"] = plan.lost["scheduler"] = "the checkpoint was saved without"
    if resume and ckpt_cfg.load_rng and not saved.get("save_rng", True):
        warn_rank_0("the checkpoint was saved without RNG states: ranks keep those they were seeded with")
        plan.lost["RNG"] = "the checkpoint was saved without"
    sizes = _get_model_glu_interleave_sizes(run.model, cfg)
    if located.kind is not CheckpointType.GLOBAL:
        plan.metadata = _build_sharded_state_dict_metadata(uses_distributed_optimizer(cfg), ckpt_cfg)
        if plan.optimizer and run.optimizer is not None and located.kind is CheckpointType.FSDP_DTENSOR:
            require_same_fsdp_optimizer(run_config, sizes)
    else:
        plan.metadata = dict(compat.load_content_metadata(preloaded_state_dict=common) or {})
        plan.glu_sizes = sizes_to_undo(plan.metadata, run_config, ckpt_cfg, sizes)
        if plan.optimizer and run.optimizer is not None and uses_distributed_optimizer(cfg):
            experts = _expert_difference(run_config, cfg)
            _settle_sharding_type(plan.metadata, saved, difference or experts)
        note_rank_0(f"sharded_state_dict metadata loaded from the checkpoint: {plan.metadata}")
    plan.metadata["dp_cp_group"] = run.groups.dp_cp
    return plan


def _settle_sharding_type(metadata: dict[str, Any], saved: dict[str, Any], difference: str) -> None:
    """Fill in the optimizer's sharding type where an old checkpoint lacks it; check that it allows the load.

    Raises:
        RuntimeError: TP, PP or EP changed, and the checkpoint's sharding does not allow it.
    """
    if "distrib_optim_sharding_type" not in metadata:
        metadata["distrib_optim_sharding_type"] = (
            "fully_sharded_model_space" if saved.get("fully_parallel_save") else "dp_zero_gather_scatter"
        )
    kind = metadata["distrib_optim_sharding_type"]
    if difference and kind not in compat.DistributedOptimizer.checkpoint_fully_reshardable_formats:
        raise RuntimeError(
            f"{difference}: not supported for the distributed optimizer's sharding type {kind!r}. Save with "
            "dist_ckpt_optim_fully_reshardable=True to be able to change TP, PP or EP, or load with "
            "load_optim=False."
        )


def build_scaffold(run: LoadRun, plan: LoadPlan) -> dict[str, Any]:
    """The sharded state dict that asks for what the plan restores. Local."""
    cfg, ckpt_cfg, model = run.state.cfg, run.state.cfg.checkpoint, run.model
    is_fsdp = ckpt_cfg.ckpt_format == "fsdp_dtensor"
    rng_state = rerun_state = None
    if plan.rng:
        rng_state = get_rng_state(
            cfg.rng.data_parallel_random_init,
            ckpt_cfg.ckpt_format,
            pg_collection=run.groups,
            module_name=run.module_name,
        )
    if plan.rerun:
        rerun_state = compat.get_rerun_state_machine().state_dict(
            data_iterator=None, ckpt_format=ckpt_cfg.ckpt_format, force=True
        )
    with contextlib.ExitStack() as stack:
        if ckpt_cfg.finetune and model and hasattr(model[0], "hide_loss_modules"):
            for chunk in model:
                stack.enter_context(chunk.hide_loss_modules())
        plan.chunks = contiguous_chunks(model, plan.glu_sizes, is_loading=True)
        scaffold = generate_state_dict(
            ckpt_cfg,
            plan.chunks,
            run.optimizer if plan.optimizer else None,
            run.scheduler if plan.scheduler else None,
            rng_state,
            iteration=1 if is_fsdp else None,
            optim_sd_kwargs={"metadata": plan.metadata, "is_loading": True},
            model_sd_kwargs={"metadata": plan.metadata},
            rerun_state=rerun_state,
            pg_collection=run.groups,
        )
    if "optimizer" in scaffold:
        require_whole_parameters(
            plan.chunks,
            plan.metadata,
            "Load it without optimizer (load_optim=False), or, if it was saved by a run with this "
            "interleaving that stored its rows as they were in memory, with load_glu_rows='interleaved'.",
        )
    if rng_state is None:
        # save_rng inserts the key even where nothing is to be loaded.
        scaffold.pop(RNG_KEY, None)
    if is_fsdp:
        scaffold["_model"] = model
    return scaffold


def drop_states_of_other_ranks(
    plan: LoadPlan, scaffold: dict[str, Any], located: Located, run_config: dict[str, Any] | None
) -> None:
    """Do without RNG and rerun states that are not there for every rank of this run. Collective.

    Rerun states are stored by rank, and with expert parallelism RNG states by data-parallel rank, so that a
    run of another size finds none under its own names. In a multi-module model they bear the module's name.
    """
    if located.kind is not CheckpointType.GLOBAL:
        return
    wanted = {key: _sharded_objects(scaffold.get(key)) for key in (RNG_KEY, RERUN_KEY)}
    saved_model = (run_config or {}).get("model") or {}
    may_differ = bool(wanted[RERUN_KEY]) or any(
        len(each.global_shape) > 2
        or each.key != RNG_KEY
        or saved_model.get("expert_model_parallel_size") != 1
        for each in wanted[RNG_KEY]
    )
    ranks = ControlGroup()
    if ranks.all_true(not may_differ):
        return
    saved = ranks.agree(lambda: _saved_names(located.opened))
    for key, objects in wanted.items():
        if ranks.all_true(all(each.unique_key in saved for each in objects)):
            continue
        scaffold.pop(key, None)
        if key == RERUN_KEY:
            plan.rerun = False
            plan.lost["rerun state"] = "saved by other ranks"
        elif not has_rng_state(located.common):
            plan.rng = False
            plan.lost["RNG"] = "saved by other ranks"
        warn_rank_0(_DROPPED[key].format(located.name))


_DROPPED = {
    RNG_KEY: (
        "{} has no RNG states for the ranks of this run: it was saved with another number of "
        "data-parallel ranks and expert parallelism, or without them. Every rank keeps the state it was "
        "seeded with."
    ),
    RERUN_KEY: (
        "{} has no rerun states for the ranks of this run: it was saved by another number of ranks. "
        "A step that was to be run again is not."
    ),
}


def _sharded_objects(part: Any) -> list[Any]:
    values = compat.nested_values(part) if isinstance(part, dict) else [part]
    return [each for each in values if isinstance(each, compat.ShardedObject)]


def _saved_names(checkpoint: OpenCheckpoint) -> Collection[str]:
    with checkpoint.named():
        return checkpoint.index.names


def is_peft_resume(cfg: Any, located: Located) -> bool:
    """Whether the checkpoint holds adapters only: a PEFT run's own, not its base model."""
    ckpt_cfg = cfg.checkpoint
    if cfg.peft is None or ckpt_cfg.finetune:
        return False
    if located.kind is CheckpointType.LOCAL:
        return True
    own = [ckpt_cfg.load, *_get_global_non_persistent_checkpoint_dirs(ckpt_cfg.load, ckpt_cfg)]
    # A directory may have been named as a root or as the checkpoint itself.
    directory = str(located.name).rstrip("/")
    places = {directory, os.path.dirname(directory)}
    pretrained = (ckpt_cfg.pretrained_checkpoint or "").rstrip("/")
    return pretrained not in places and any(root and root.rstrip("/") in places for root in own)
