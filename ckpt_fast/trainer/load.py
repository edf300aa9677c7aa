# SPDX-License-Identifier: Apache-2.0
"""``load_checkpoint``: find the checkpoint, decide what of it applies, load it, put it where it belongs."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from ckpt_fast import megatron
from ckpt_fast.doors import megatron_core
from ckpt_fast.doors.common_state import load_common_state_dict
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)
from ckpt_fast.pipeline.background import wait_staged
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.trainer.announce import announce_loaded, announce_restored
from ckpt_fast.trainer.catalog import Found
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.glu import _get_model_glu_interleave_sizes
from ckpt_fast.trainer.glu_layout import contiguous_chunks, reorder_late, sizes_to_undo
from ckpt_fast.trainer.hugging_face import is_hf_source, load_hf_pretrained
from ckpt_fast.trainer.load_base import (
    choose_or_say,
    find_data_position,
    load_chosen,
    load_strategy,
)
from ckpt_fast.trainer.load_plan import (
    build_scaffold,
    drop_states_of_other_ranks,
    find_run_config,
    is_mimo,
    is_peft_resume,
    make_plan,
)
from ckpt_fast.trainer.locate import (
    _has_global_non_persistent_checkpoint,
    has_local_checkpoint,
    holds_checkpoint,
    older_checkpoints,
)
from ckpt_fast.trainer.paths import is_hf_checkpoint_dir, settle_directories
from ckpt_fast.trainer.ranks import (
    barrier_if_distributed,
    on_all_ranks,
    on_rank_0,
    print_rank_0,
)
from ckpt_fast.trainer.restore import (
    find_layer_wise_state,
    load_sections,
    read_progress,
    restore_model,
    restore_optimizer,
    restore_rerun_and_rng,
    restore_train_state,
)
from ckpt_fast.trainer.state_dict import (
    _generate_model_state_dict,
    _is_model_section,
    apply_peft_adapter_filter_to_state_dict,
    delete_extra_state,
)
from ckpt_fast.trainer.version import get_checkpoint_version, set_checkpoint_version
from ckpt_fast.trainer.visibility import require_same_view


def load_checkpoint(
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    pg_collection: Any | None = None,
    module_name: str | None = None,
) -> tuple[int, int]:
    """Load the checkpoint that the configuration names. Collective: every rank calls it.

    ``checkpoint.load`` is resumed from; if there is nothing in it, ``checkpoint.pretrained_checkpoint`` is
    loaded as the start of a finetuning run.

    Args:
        state: GlobalState; its train state is replaced by the checkpoint's.
        model: model chunks to load into.
        optimizer: optimizer to load into, or None.
        opt_param_scheduler: learning-rate scheduler to load into, or None.
        strict: model keys must match, except ``_extra_state``.
        checkpointing_context: kept by the caller between saves and loads.
        skip_load_to_model_and_opt: load everything else (iteration, scheduler, RNG) and leave model and
            optimizer alone. Where tensors can only be filled in place (torch FSDP2, fsdp_dtensor, local
            checkpoints), they are, and only the modules' ``load_state_dict`` is skipped.
        pg_collection: process groups; the model's own when None.
        module_name: namespace of the RNG state in a multi-module model.

    Returns:
        (iteration, floating-point operations so far); (0, 0) if there is nothing to load.

    Raises:
        FileNotFoundError: ``pretrained_checkpoint`` is set and does not exist.
        CheckpointCorruptError, CheckpointNotFoundError: the checkpoint is damaged or incomplete, and there is
            no older one that is whole, or ``on_corrupt`` is "raise".
        CheckpointError: on every rank, naming rank, path, cause and remedy.
    """
    wait_staged()  # a save in flight may still be reading what is loaded into
    settle_directories(state.cfg)
    ckpt_cfg = state.cfg.checkpoint
    load_dir, pretrained = ckpt_cfg.load, ckpt_cfg.pretrained_checkpoint
    if pretrained is not None and not _has_resume_checkpoint(load_dir, ckpt_cfg, checkpointing_context):
        if not on_rank_0(lambda: holds_checkpoint(pretrained) or is_hf_checkpoint_dir(pretrained)):
            raise CheckpointNotFoundError(
                f"there is no checkpoint in load={load_dir!r}, and pretrained_checkpoint={pretrained!r} does "
                "not exist or holds none"
            )
        print_rank_0(f"there is nothing to resume in load={load_dir!r}: starting from {pretrained}")
        load_dir = pretrained
        ckpt_cfg.finetune = True

    training = (state, model, optimizer, opt_param_scheduler, strict, checkpointing_context)
    options: dict[str, Any] = {
        "skip_load_to_model_and_opt": skip_load_to_model_and_opt,
        "pg_collection": pg_collection,
        "module_name": module_name,
    }
    if is_hf_source(load_dir, ckpt_cfg):
        return _load_checkpoint_from_path(load_dir, *training, **options)
    chosen = choose_or_say(load_dir, ckpt_cfg, ckpt_cfg.ckpt_step, checkpointing_context)
    if chosen is None:
        return 0, 0

    def load_from(path: str | None, checkpoint: Found) -> tuple[int, int]:
        return _load_chosen_checkpoint(checkpoint, path, ckpt_cfg, *training, **options)

    try:
        return load_from(load_dir, chosen)
    except (CheckpointCorruptError, CheckpointNotFoundError) as error:
        older = functools.partial(older_checkpoints, load_dir, ckpt_cfg, chosen, checkpointing_context)
        return _load_older(load_from, older, ckpt_cfg, error)


def _load_older(
    load_from: Callable[[str, Found], tuple[int, int]],
    list_older: Callable[[], list[Found]],
    ckpt_cfg: Any,
    error: CheckpointError,
) -> tuple[int, int]:
    """Go back, checkpoint by checkpoint, to the newest one of any tier that is whole. Collective.

    Raises:
        CheckpointError: ``error`` itself, where the user asked for one certain checkpoint or for no fall-back
            (``on_corrupt``), and when no older checkpoint can be loaded.
    """
    wanted = getattr(ckpt_cfg, "on_corrupt", "fallback")
    problem: CheckpointError = error
    for older in list_older() if wanted == "fallback" else []:
        print_rank_0(
            f"WARNING: {problem} -- falling back to {older} ({older.tier}, iteration {older.iteration}; "
            "on_corrupt='fallback')"
        )
        try:
            return load_from(str(older), older)
        except (CheckpointCorruptError, CheckpointNotFoundError) as older_error:
            problem = older_error
    if problem is not error:
        print_rank_0(f"WARNING: {problem} -- there is no older checkpoint to fall back to")
    raise error


def _has_resume_checkpoint(load_dir: str | None, ckpt_cfg: Any, context: dict[str, Any] | None) -> bool:
    """Whether the run has a checkpoint of its own, persistent or for recovery. Collective."""
    if on_rank_0(lambda: holds_checkpoint(load_dir) or is_hf_checkpoint_dir(load_dir)):
        return True
    return _has_global_non_persistent_checkpoint(load_dir, ckpt_cfg) or has_local_checkpoint(
        ckpt_cfg, context
    )


def _load_checkpoint_from_path(
    load_dir: str | None,
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
    ignore_ckpt_step: bool = False,
    pg_collection: Any | None = None,
    module_name: str | None = None,
) -> tuple[int, int]:
    """``load_checkpoint`` from a given directory. Collective.

    Args:
        load_dir: root of checkpoints or one checkpoint.
        ignore_ckpt_step: take the newest whatever ``ckpt_step`` says (base weights of a PEFT run).

    The other arguments, the result and the errors are those of ``load_checkpoint``.
    """
    ckpt_cfg = state.cfg.checkpoint
    if is_hf_source(load_dir, ckpt_cfg):
        chunks = megatron.unwrap_model(model)
        return load_hf_pretrained(str(load_dir), state, chunks, optimizer, skip=skip_load_to_model_and_opt)
    if ignore_ckpt_step:
        ckpt_cfg = _without_recovery(ckpt_cfg)
    step = None if ignore_ckpt_step else ckpt_cfg.ckpt_step
    chosen = choose_or_say(load_dir, ckpt_cfg, step, checkpointing_context)
    if chosen is None:
        return 0, 0
    return _load_chosen_checkpoint(
        chosen,
        load_dir,
        ckpt_cfg,
        state,
        model,
        optimizer,
        opt_param_scheduler,
        strict,
        checkpointing_context,
        skip_load_to_model_and_opt=skip_load_to_model_and_opt,
        pg_collection=pg_collection,
        module_name=module_name,
    )


def _load_chosen_checkpoint(
    chosen: Found,
    load_dir: str | None,
    ckpt_cfg: Any,
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    strict: bool,
    checkpointing_context: dict[str, Any] | None,
    *,
    skip_load_to_model_and_opt: bool,
    pg_collection: Any | None,
    module_name: str | None,
) -> tuple[int, int]:
    """``load_checkpoint`` of one checkpoint. Collective; arguments, result and errors are those of it."""
    cfg = state.cfg
    model = megatron.unwrap_model(model)
    pg_collection = pg_collection or megatron.get_pg_collection(model)
    load_base: Callable[..., Any] = functools.partial(
        load_chosen,
        chosen,
        load_dir,
        checkpointing_context=checkpointing_context,
        cfg=cfg,
        pg_collection=pg_collection,
    )
    common, checkpoint_name, release, ckpt_type = load_base(ckpt_cfg, rank0=True)
    run_config = find_run_config(common, checkpoint_name, ckpt_type, cfg)
    progress = None if ckpt_cfg.finetune else read_progress(common, checkpoint_name, ckpt_type)
    plan = make_plan(common, run_config, release, ckpt_type, cfg, model, optimizer)
    plan.metadata["dp_cp_group"] = pg_collection.dp_cp
    scaffold = on_all_ranks(
        lambda: build_scaffold(
            plan, state, model, optimizer, opt_param_scheduler, pg_collection, module_name, checkpoint_name
        )
    )
    drop_states_of_other_ranks(plan, scaffold, common, run_config, checkpoint_name, ckpt_type)
    adapters_only = is_peft_resume(cfg, checkpoint_name, ckpt_type)
    left_alone = skip_load_to_model_and_opt and _can_leave_alone(cfg, ckpt_type)
    if left_alone:
        scaffold, ckpt_cfg = _without_model_and_optimizer(scaffold, ckpt_cfg)
    if adapters_only:
        scaffold = apply_peft_adapter_filter_to_state_dict(scaffold, cfg.peft)
    state_dict, checkpoint_name, release, ckpt_type = load_base(
        ckpt_cfg, sharded_state_dict=scaffold, is_megatron_mimo=is_mimo(run_config, cfg)
    )
    _note_version(state_dict)
    restore_train_state(state, progress, state_dict, release, ckpt_type)

    def restore() -> None:
        if not skip_load_to_model_and_opt:
            restore_model(plan, model, state_dict, cfg, ckpt_type, strict and not adapters_only)
        restore_optimizer(
            plan,
            state_dict,
            cfg,
            optimizer,
            opt_param_scheduler,
            skip=skip_load_to_model_and_opt,
            left_alone=left_alone,
            layer_wise_path=find_layer_wise_state(optimizer, ckpt_type, checkpointing_context, pg_collection),
        )
        restore_rerun_and_rng(plan, state_dict, cfg, pg_collection)

    on_all_ranks(restore)
    announce_loaded(state, load_dir, checkpoint_name, ckpt_type, pg_collection)
    skipped = _skipped(optimizer, opt_param_scheduler, skip_load_to_model_and_opt)
    announce_restored(plan, chosen, ckpt_cfg, skipped, find_data_position(chosen, load_dir, ckpt_cfg))
    return state.train_state.step, state.train_state.floating_point_operations_so_far


def _skipped(optimizer: Any | None, scheduler: Any | None, skip_model_and_optimizer: bool) -> set[str]:
    """Parts of a checkpoint that the caller does not want, or has nothing to restore into."""
    absent = {part for part, goal in (("optimizer", optimizer), ("scheduler", scheduler)) if goal is None}
    return absent | {"weights", "optimizer"} if skip_model_and_optimizer else absent


def _note_version(state_dict: dict[str, Any]) -> None:
    set_checkpoint_version(state_dict.get("checkpoint_version", 0))
    print_rank_0(f" checkpoint version {get_checkpoint_version()}")


def _can_leave_alone(cfg: Any, ckpt_type: Any) -> bool:
    """Whether nothing is restored by filling the scaffold: torch FSDP2 relies on that."""
    return ckpt_type is CheckpointType.GLOBAL and not getattr(cfg.dist, "use_torch_fsdp2", False)


def _without_model_and_optimizer(scaffold: dict[str, Any], ckpt_cfg: Any) -> tuple[dict[str, Any], Any]:
    """The scaffold without what it would fill in place, and a config that does not miss it."""
    ckpt_cfg = copy.copy(ckpt_cfg)
    ckpt_cfg.dist_ckpt_strictness = "assume_ok_unexpected"
    kept = {key: part for key, part in scaffold.items() if key != "optimizer" and not _is_model_section(key)}
    return kept, ckpt_cfg


def _without_recovery(ckpt_cfg: Any) -> Any:
    """Base weights of a PEFT run are not in its recovery checkpoints, which hold adapters."""
    ckpt_cfg = copy.copy(ckpt_cfg)
    ckpt_cfg.non_persistent_ckpt_type = None
    return ckpt_cfg


def _load_model_weights_from_checkpoint(
    checkpoint_path: str,
    model: list[Any],
    fully_parallel_load: bool = False,
    return_state_dict: bool = False,
    dist_ckpt_strictness: str = "assume_ok_unexpected",
    strict: bool = True,
) -> Any:
    """Load model weights, and nothing else, from an iteration directory. Collective.

    Args:
        checkpoint_path: the iteration directory of a torch_dist checkpoint.
        model: model chunks to load into.
        fully_parallel_load: share the reads among data-parallel ranks.
        return_state_dict: return the state dict instead of giving it to the model's ``load_state_dict``. Its
            tensors are the model's own where the sharded state dict has them, and filled: GLU rows are in
            the model's order.
        dist_ckpt_strictness: how keys that do not match are treated.
        strict: model keys must match, except ``_extra_state``.

    Returns:
        None; with ``return_state_dict`` the state dict, or for the two ``return_*`` strictness modes
        (state dict, missing keys, unexpected keys).
    """
    wait_staged()
    require_same_view(checkpoint_path)
    common = ControlGroup().agree(lambda: load_common_state_dict(checkpoint_path))
    metadata = megatron.load_content_metadata(preloaded_state_dict=common)
    print_rank_0(f"sharded_state_dict metadata loaded from the checkpoint: {metadata}")
    megatron.restore_modelopt_state(model, common)
    model = megatron.unwrap_model(model)
    pg_collection = megatron.get_pg_collection(model)
    sizes = sizes_to_undo(metadata or {}, None, None, _get_model_glu_interleave_sizes(model, None))
    chunks = contiguous_chunks(model, sizes, is_loading=True)
    scaffold = on_all_ranks(
        lambda: _generate_model_state_dict(chunks, {"metadata": metadata}, pg_collection=pg_collection)
    )
    loaded = megatron_core.load(
        scaffold,
        checkpoint_path,
        strategy=load_strategy(fully_parallel_load, pg_collection),
        strict=dist_ckpt_strictness,
    )
    state_dict = loaded[0] if isinstance(loaded, tuple) else loaded
    for section in filter(_is_model_section, state_dict):
        delete_extra_state(state_dict[section])
    on_all_ranks(lambda: reorder_late(chunks, state_dict))
    if return_state_dict:
        return loaded
    on_all_ranks(lambda: load_sections(model, state_dict, strict))
    del common, scaffold, loaded
    state_dict.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    barrier_if_distributed()
    return None
