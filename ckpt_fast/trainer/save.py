# SPDX-License-Identifier: Apache-2.0
"""``save_checkpoint``: collect the state, hand it to a door, publish, clean up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckpt_fast import megatron
from ckpt_fast.callbacks import CallbackContext, should_fire
from ckpt_fast.doors import megatron_core
from ckpt_fast.pipeline.background import SaveHandle
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.types import SaveReport
from ckpt_fast.trainer import experiment_loggers as loggers
from ckpt_fast.trainer.async_save import is_empty_async_queue, schedule_async_save
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.fsdp import save_fsdp_dtensor
from ckpt_fast.trainer.glu import (
    _get_model_glu_interleave_sizes,
    _process_state_dict_for_model_glu_interleaving,
)
from ckpt_fast.trainer.local import save_layer_wise_optimizer, save_local
from ckpt_fast.trainer.locate import _NON_PERSISTENT_CKPT_SUBDIR
from ckpt_fast.trainer.paths import get_checkpoint_name
from ckpt_fast.trainer.publish import Publication
from ckpt_fast.trainer.ranks import barrier_if_distributed, is_last_rank, print_rank_0
from ckpt_fast.trainer.retention import cleanup_old_non_persistent_checkpoint
from ckpt_fast.trainer.rng import get_rng_state
from ckpt_fast.trainer.sidecars import maybe_save_dataloader_state
from ckpt_fast.trainer.state_dict import (
    _build_sharded_state_dict_metadata,
    _is_model_section,
    apply_peft_adapter_filter_to_state_dict,
    generate_state_dict,
    uses_distributed_optimizer,
)

_DATALOADER_STATE_SUBDIR = "energon"
_ASYNC_FORMATS = ("torch_dist", "fsdp_dtensor")


@dataclass(frozen=True)
class _Target:
    """Where a save goes. ``keep`` is how many checkpoints retention leaves; None: all."""

    ckpt_type: CheckpointType
    save_dir: str
    step: int
    keep: int | None

    @property
    def checkpoint_name(self) -> str:
        return get_checkpoint_name(self.save_dir, self.step, release=False)

    @property
    def is_local(self) -> bool:
        return self.ckpt_type is CheckpointType.LOCAL


def save_checkpoint(
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    num_floating_point_operations_so_far: int,
    checkpointing_context: dict[str, Any] | None = None,
    pipeline_rank: int | None = None,
    tensor_rank: int | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any | None = None,
    preprocess_common_state_dict_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    prebuilt_state_dict: dict[str, Any] | None = None,
    pg_collection: Any | None = None,
    callback_manager: Any | None = None,
    module_name: str | None = None,
) -> None:
    """Save a checkpoint. Collective: every rank calls it.

    Synchronous: on return the checkpoint is durable, published and selected by the trackers. With
    ``async_save`` it is staged and being written; ``maybe_finalize_async_save`` publishes it later, and until
    then the previous checkpoint stays selected and on disk.

    Args:
        state: GlobalState; ``cfg`` and ``train_state`` say what is saved and where.
        model: model chunks; [] with ``prebuilt_state_dict`` and ``pg_collection``.
        optimizer: may be None.
        opt_param_scheduler: may be None.
        num_floating_point_operations_so_far: cumulative FLOPs, stored with the train state.
        checkpointing_context: kept by the caller between saves; holds strategies and the local manager.
        pipeline_rank, tensor_rank: shown in the success line instead of the groups' ranks.
        non_persistent_ckpt: save for recovery only, as ``non_persistent_ckpt_type`` says.
        train_data_iterator: its state is saved when it can give one.
        preprocess_common_state_dict_fn: applied to the common state before ranks compare it.
        prebuilt_state_dict: saved instead of the state collected from model and optimizer.
        pg_collection: process groups; the model's own when None.
        callback_manager: its ``on_checkpoint_save`` callbacks fire when the checkpoint is published.
        module_name: namespace of the RNG state in a multi-module model.

    Raises:
        CheckpointWriteError, CheckpointError: on every rank, naming rank, path and cause. The checkpoint is
            not published then; trackers and the previous checkpoint are untouched.
        ValueError: ``non_persistent_ckpt_type`` is neither "local" nor "global".
        NotImplementedError: ``async_save`` with a format that cannot be saved in the background.
    """
    begin = time.perf_counter()
    cfg, ckpt_cfg = state.cfg, state.cfg.checkpoint
    context = checkpointing_context
    if ckpt_cfg.async_save and not is_empty_async_queue(state):
        print_rank_0("WARNING: Starting a checkpoint save before previous has finished.")
    loggers.on_checkpointing_start(state)
    model = megatron.unwrap_model(model)
    pg_collection = pg_collection or megatron.get_pg_collection(model)
    target = _choose_target(state, context, non_persistent_ckpt)
    _announce(target, ckpt_cfg)
    _save_beside(state, model, optimizer, train_data_iterator, target, pg_collection)

    metadata = _build_sharded_state_dict_metadata(uses_distributed_optimizer(cfg), ckpt_cfg)
    metadata["dp_cp_group"] = pg_collection.dp_cp
    state_dict, publication = ControlGroup().agree(
        lambda: (
            prebuilt_state_dict
            if prebuilt_state_dict is not None
            else _collect(
                state,
                model,
                optimizer,
                opt_param_scheduler,
                train_data_iterator,
                metadata,
                pg_collection,
                module_name,
            ),
            Publication(
                state,
                target.checkpoint_name,
                target.save_dir,
                num_floating_point_operations_so_far,
                success_suffix=_rank_suffix(pg_collection, tensor_rank, pipeline_rank),
                is_local=target.is_local,
            ),
        )
    )
    if prebuilt_state_dict is not None:
        print_rank_0("Using pre-built state dict (low-memory save)")
    state_dict = _to_checkpoint_layout(state_dict, model, cfg)
    request = _hand_over(
        state, model, state_dict, context, target, metadata, pg_collection, preprocess_common_state_dict_fn
    )

    def publish() -> None:
        ControlGroup().decide(publication.publish)

    finalizers: list[Callable[[], None]] = [
        publish,
        lambda: _tell_loggers(state, target),
        lambda: _fire_callbacks(callback_manager, state, model, optimizer),
        lambda: _retain(target, do_async=ckpt_cfg.async_save),
    ]
    for finalizer in finalizers:
        if ckpt_cfg.async_save:
            request.add_finalize_fn(finalizer)
        else:
            finalizer()
    if ckpt_cfg.async_save:
        schedule_async_save(state, request)
        print_rank_0(
            f"  scheduled an async checkpoint save at iteration {target.step:7d} to {target.save_dir}"
        )
    loggers.on_checkpointing_end(global_state=state, is_async_finalization=False)
    _report_stall(request, time.perf_counter() - begin)
    if not ckpt_cfg.async_save:
        barrier_if_distributed()


def _choose_target(state: Any, context: dict[str, Any] | None, non_persistent: bool) -> _Target:
    ckpt_cfg, step = state.cfg.checkpoint, state.train_state.step
    if not non_persistent:
        keep = ckpt_cfg.most_recent_k
        return _Target(CheckpointType.GLOBAL, ckpt_cfg.save, step, None if keep is None or keep < 0 else keep)
    kind = ckpt_cfg.non_persistent_ckpt_type
    if kind == "local":
        if not context or "local_checkpoint_manager" not in context:
            raise ValueError(
                "non_persistent_ckpt_type is 'local' but checkpointing_context has no "
                "'local_checkpoint_manager': pass what init_checkpointing_context(cfg.checkpoint) returns"
            )
        return _Target(CheckpointType.LOCAL, context["local_checkpoint_manager"].local_ckpt_dir, step, None)
    if kind == "global":
        save_dir = ckpt_cfg.non_persistent_global_ckpt_dir or os.path.join(
            ckpt_cfg.save, _NON_PERSISTENT_CKPT_SUBDIR
        )
        keep = ckpt_cfg.most_recent_k
        return _Target(CheckpointType.GLOBAL, save_dir, step, 2 if keep is None or keep < 0 else max(1, keep))
    raise ValueError(f"Invalid non_persistent_ckpt_type: {kind!r}. Must be 'local' or 'global'.")


def _announce(target: _Target, ckpt_cfg: Any) -> None:
    label = "torch" if target.is_local else ckpt_cfg.ckpt_format
    print_rank_0(f"saving checkpoint at iteration {target.step:7d} to {target.save_dir} in {label} format")
    if ckpt_cfg.async_save and not target.is_local and ckpt_cfg.ckpt_format not in _ASYNC_FORMATS:
        raise NotImplementedError(
            f"async_save is not available for ckpt_format {ckpt_cfg.ckpt_format!r}; use {_ASYNC_FORMATS}"
        )


def _save_beside(
    state: Any, model: list[Any], optimizer: Any, iterator: Any, target: _Target, pg_collection: Any
) -> None:
    """What is stored next to the checkpoint rather than in it."""
    path = getattr(state.cfg.dataset, "dataloader_save", None)
    save_root = state.cfg.checkpoint.save
    if path is None and save_root and hasattr(getattr(iterator, "iterable", None), "save_state"):
        path = os.path.join(save_root, _DATALOADER_STATE_SUBDIR)
    maybe_save_dataloader_state(model, iterator, target.step, path, pg_collection=pg_collection)
    if target.is_local:
        save_layer_wise_optimizer(optimizer, target.save_dir, pg_collection)


def _collect(
    state: Any,
    model: list[Any],
    optimizer: Any | None,
    scheduler: Any | None,
    iterator: Any | None,
    metadata: dict[str, Any],
    pg_collection: Any,
    module_name: str | None,
) -> dict[str, Any]:
    cfg, ckpt_cfg = state.cfg, state.cfg.checkpoint
    if "distrib_optim_sharding_type" in metadata:
        print_rank_0(
            f"Storing distributed optimizer sharded state of type {metadata['distrib_optim_sharding_type']}"
        )
    rng_state = None
    if ckpt_cfg.save_rng:
        rng_state = get_rng_state(
            data_parallel_random_init=cfg.rng.data_parallel_random_init,
            ckpt_format=ckpt_cfg.ckpt_format,
            pg_collection=pg_collection,
            module_name=module_name,
        )
    rerun_state = megatron.get_rerun_state_machine().state_dict(
        data_iterator=iterator, ckpt_format=ckpt_cfg.ckpt_format
    )
    return generate_state_dict(
        ckpt_cfg,
        model,
        optimizer,
        scheduler,
        rng_state,
        iteration=state.train_state.step,
        optim_sd_kwargs={"metadata": metadata},
        model_sd_kwargs={"metadata": metadata},
        rerun_state=rerun_state,
        pg_collection=pg_collection,
    )


def _to_checkpoint_layout(state_dict: dict[str, Any], model: list[Any], cfg: Any) -> dict[str, Any]:
    """GLU rows contiguous, as every checkpoint has them, and adapters only, if that is what is trained."""
    routed, shared = _get_model_glu_interleave_sizes(model, cfg)
    if routed is not None or shared is not None:
        print_rank_0(f"[GLU Interleaving] De-interleaving for the checkpoint (sizes {routed}, {shared})")
        use_megatron_fsdp = bool(getattr(cfg.ddp, "use_megatron_fsdp", False))
        for section in sorted(filter(_is_model_section, state_dict)):
            state_dict[section] = _process_state_dict_for_model_glu_interleaving(
                state_dict[section], routed, shared, interleave=False, use_megatron_fsdp=use_megatron_fsdp
            )
    if cfg.peft is not None:
        state_dict = apply_peft_adapter_filter_to_state_dict(state_dict, cfg.peft)
    return state_dict


def _hand_over(
    state: Any,
    model: list[Any],
    state_dict: dict[str, Any],
    context: dict[str, Any] | None,
    target: _Target,
    metadata: dict[str, Any],
    pg_collection: Any,
    preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Any:
    """Give the state dict to the door of its format.

    Returns:
        With ``async_save`` the request to schedule. Otherwise the data is durable everywhere, and the
        SaveReport is returned where the format has one.
    """
    ckpt_cfg = state.cfg.checkpoint
    if target.is_local:
        assert context is not None
        return save_local(state, state_dict, context, target.step, pg_collection)
    if ckpt_cfg.ckpt_format == "fsdp_dtensor":
        return save_fsdp_dtensor(state.cfg, model, state_dict, target.checkpoint_name)
    strategy, validate = _save_strategy(ckpt_cfg, model, context, pg_collection)
    job = megatron_core.start_save(
        state_dict,
        target.checkpoint_name,
        strategy,
        validate_access_integrity=validate,
        preprocess_common_before_consistency_check=preprocess_common,
        content_metadata=megatron.clean_metadata_for_serialization(metadata),
        snapshot=ckpt_cfg.async_save,
    )
    result: SaveHandle | SaveReport
    if ckpt_cfg.async_save:
        result = SaveHandle(job)
    else:
        job.write()
        result = job.commit()
    dist_cfg = state.cfg.dist
    if model and not (dist_cfg and getattr(dist_cfg, "use_decentralized_pg", False)):
        megatron.save_sharded_modelopt_state(model, target.checkpoint_name, (ckpt_cfg.ckpt_format, 1))
    return result


def _save_strategy(
    ckpt_cfg: Any, model: list[Any], context: dict[str, Any] | None, pg_collection: Any
) -> tuple[Any, bool]:
    """The strategy, kept in the context between saves, and whether the sharding still needs validation."""
    if context is not None and "save_strategy" in context:
        return context["save_strategy"], not ckpt_cfg.ckpt_assume_constant_structure
    strategy: Any = megatron_core.FastSaveStrategy(thread_count=ckpt_cfg.storage_writers_per_rank)
    validate = True
    if ckpt_cfg.fully_parallel_save and not isinstance(pg_collection.dp_cp, megatron.SoloGroup):
        strategy = megatron.FullyParallelSaveStrategyWrapper(
            strategy, pg_collection.dp_cp, ckpt_cfg.ckpt_assume_constant_structure
        )
    elif not ckpt_cfg.fully_parallel_save and len(model) == 1 and hasattr(model[0], "mimo_config"):
        # Modules of a multi-module model live on disjoint ranks; no rank sees the whole sharding.
        validate = False
    if context is not None:
        context["save_strategy"] = strategy
    return strategy, validate


def _tell_loggers(state: Any, target: _Target) -> None:
    if not target.is_local and is_last_rank():
        loggers.on_save_checkpoint_success(state, target.checkpoint_name, target.save_dir, target.step)


def _fire_callbacks(manager: Any | None, state: Any, model: list[Any], optimizer: Any | None) -> None:
    if should_fire(manager, "on_checkpoint_save"):
        assert manager is not None
        manager.fire(
            "on_checkpoint_save",
            CallbackContext(state=state, model=model, user_state=manager.user_state, optimizer=optimizer),
        )


def _retain(target: _Target, do_async: bool) -> None:
    if not target.is_local and target.keep is not None:
        cleanup_old_non_persistent_checkpoint(
            target.save_dir, leave_ckpt_num=target.keep, do_async=do_async, max_iteration=target.step
        )


def _report_stall(request: Any, stall_s: float) -> None:
    report = request.report if isinstance(request, SaveHandle) else request
    if not isinstance(report, SaveReport):
        return
    report.stall_s = stall_s
    if isinstance(request, SaveHandle):
        print_rank_0(f"  training waited {stall_s:.3f} s for this checkpoint; it is being written")
    else:
        print_rank_0(f"  training waited {stall_s:.3f} s for this checkpoint; {report}")


def _rank_suffix(pg_collection: Any, tensor_rank: int | None, pipeline_rank: int | None) -> str:
    """``[ t 1/2, p 1/1 ]``: 1-based tensor and pipeline ranks."""
    tensor = pg_collection.tp.rank() if tensor_rank is None else tensor_rank
    pipeline = pg_collection.pp.rank() if pipeline_rank is None else pipeline_rank
    return f"[ t {tensor + 1}/{pg_collection.tp.size()}, p {pipeline + 1}/{pg_collection.pp.size()} ]"
