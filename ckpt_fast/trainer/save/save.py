# SPDX-License-Identifier: Apache-2.0
"""``save_checkpoint``: collect the state, hand it to a door, publish, clean up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.errors import AsyncSaveError, CheckpointError
from ckpt_fast.glu.layout import (
    CONTIGUOUS,
    GLU_ROWS_KEY,
    Sizes,
)
from ckpt_fast.glu.model import _get_model_glu_interleave_sizes
from ckpt_fast.jobs import trace
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.jobs.report import counted_from
from ckpt_fast.pipeline.save.parts import SaveOptions
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.lost import in_touch
from ckpt_fast.ranks.world import note_rank_0, on_all_ranks
from ckpt_fast.retention.line import LINE, METRICS
from ckpt_fast.run.config_checks import check_choices
from ckpt_fast.settings import Settings
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer import experiment_loggers as loggers
from ckpt_fast.trainer.contents.data_position import FILES_KEY
from ckpt_fast.trainer.contents.fsdp import save_fsdp_dtensor, write_along
from ckpt_fast.trainer.contents.hugging_face import require_export, save_hf_copy
from ckpt_fast.trainer.contents.local import save_layer_wise_optimizer, save_local
from ckpt_fast.trainer.contents.state_dict import (
    _build_sharded_state_dict_metadata,
    uses_distributed_optimizer,
)
from ckpt_fast.trainer.lineage import LINE_KEY
from ckpt_fast.trainer.save.after_save import (
    announce_saved,
    fire_callbacks,
    logger_finalizer,
    rank_suffix,
    retain,
)
from ckpt_fast.trainer.save.async_save import end_save_to, make_room, schedule_async_save
from ckpt_fast.trainer.save.collect import Collection
from ckpt_fast.trainer.save.failures import FollowUp, note_success, remember, storage_errors_tolerated
from ckpt_fast.trainer.save.publish import save_errors_tolerated
from ckpt_fast.trainer.save.run import SaveRun
from ckpt_fast.trainer.save.staging import staging_policy
from ckpt_fast.trainer.save.surroundings import Surroundings, surroundings_of
from ckpt_fast.trainer.save.target import SaveTarget, choose_target

_FORMATS = ("torch_dist", "fsdp_dtensor")


@trace.traced("save_checkpoint")
@in_touch()
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
        checkpointing_context: kept by the caller between saves; holds strategies and the local manager. The
            numbers in its ``"metrics"``, a dict by name, are noted in the checkpoint for ``KeepBest``, and
            taken out of the context: they are of this save and of no later one.
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
            not published then; trackers and the previous checkpoint are untouched. ``on_save_error="warn"``
            makes it a warning; ``on_save_failure="continue"`` does if storage fails as a background save
            begins (a full disk, a directory that cannot be made), see ``maybe_finalize_async_save``.
        ValueError: ``non_persistent_ckpt_type`` is neither "local" nor "global", or there is no directory; on
            every rank, a setting or a metric is invalid, or ranks differ in what they do about failed
            background saves.
        NotImplementedError: ``ckpt_format`` is one that cannot be loaded either, or
            ``also_save_hf_checkpoint`` of a model that Megatron Bridge cannot export.
        UnavailableError: ``also_save_hf_checkpoint`` without Megatron Bridge.
    """
    begin = time.perf_counter()
    run = SaveRun(
        state,
        compat.unwrap_model(model),
        optimizer,
        opt_param_scheduler,
        train_data_iterator,
        checkpointing_context,
        pg_collection or compat.get_pg_collection(compat.unwrap_model(model)),
        module_name,
    )
    if run.is_async and not make_room(state, run.ckpt_cfg):
        return
    loggers.on_checkpointing_start(state)
    target = choose_target(run.ckpt_cfg, run.context, state.train_state.step, non_persistent_ckpt)
    end_save_to(state, run.ckpt_cfg, target.checkpoint_name)
    follow_up = FollowUp(run, target, callback_manager)
    with (
        save_errors_tolerated(run.ckpt_cfg, state.async_calls_queue),
        storage_errors_tolerated(run, target, follow_up),
    ):
        _announce(run, target)
        around = surroundings_of(run, target, num_floating_point_operations_so_far)
        ranks = rank_suffix(run.pg_collection, tensor_rank, pipeline_rank)
        metadata = _content_metadata(run, target)
        with counted_from(begin, is_announced=True):
            request = _hand_over(
                run,
                target,
                _collection(run, target, metadata, around, prebuilt_state_dict),
                metadata,
                around,
                preprocess_common_state_dict_fn,
            )
        _finalize(
            run,
            request,
            [
                *([] if _publishes_itself(run, target) else [lambda: _publish(run, target, around)]),
                lambda: note_success(state),
                lambda: announce_saved(run, target, ranks, request, begin),
                logger_finalizer(run, target),
                lambda: fire_callbacks(run, callback_manager),
                lambda: retain(run, target, around.publication.lineage),
            ],
            follow_up,
        )
        if run.is_async and run.state.async_calls_queue is not None:
            _announce_scheduled(request, target, begin)
    loggers.on_checkpointing_end(global_state=state, is_async_finalization=False)


def _announce(run: SaveRun, target: SaveTarget) -> None:
    ckpt_format = run.ckpt_cfg.ckpt_format
    label = "torch" if target.is_local else ckpt_format
    note_rank_0(f"saving checkpoint at iteration {target.step:7d} to {target.save_dir} in {label} format")
    if not target.is_local and ckpt_format not in _FORMATS:
        # What would be written could not be loaded.
        raise NotImplementedError(f"ckpt_format {ckpt_format!r} cannot be saved; use one of {_FORMATS}")
    if not target.is_local:
        require_export(run.cfg, run.model)


def _announce_scheduled(request: Any, target: SaveTarget, begin: float) -> None:
    note_rank_0(f"  scheduled an async checkpoint save at iteration {target.step:7d} to {target.save_dir}")
    if isinstance(request, SaveHandle):
        request.report.stall_s = time.perf_counter() - begin


def _publishes_itself(run: SaveRun, target: SaveTarget) -> bool:
    """Whether the trackers move along with the seal."""
    if target.is_local:
        return False
    return run.ckpt_cfg.ckpt_format != "fsdp_dtensor" or not object_storage(target.checkpoint_name)


def _publish(run: SaveRun, target: SaveTarget, around: Surroundings) -> None:
    """Collective. Errors are those of a background save, if it is one."""
    try:
        around.publish()
    except CheckpointError as error:
        if not run.is_async:
            raise
        raise AsyncSaveError(f"the save to {target.checkpoint_name} was not published: {error}") from error


def _glu_sizes(run: SaveRun) -> Sizes:
    return _get_model_glu_interleave_sizes(run.model, run.cfg)


def _content_metadata(run: SaveRun, target: SaveTarget) -> dict[str, Any]:
    metadata = _build_sharded_state_dict_metadata(uses_distributed_optimizer(run.cfg), run.ckpt_cfg)
    metadata["dp_cp_group"] = run.pg_collection.dp_cp
    if _glu_sizes(run) != (None, None) and target.is_torch_dist(run.ckpt_cfg):
        metadata[GLU_ROWS_KEY] = CONTIGUOUS
    return metadata


def _collection(
    run: SaveRun,
    target: SaveTarget,
    metadata: dict[str, Any],
    around: Surroundings,
    prebuilt: dict[str, Any] | None,
) -> Collection:
    def capture() -> None:
        # An odd one is refused on all ranks, while nothing has been touched.
        Settings.read()
        check_choices(run.ckpt_cfg)
        around.position.capture()
        metrics = run.context.pop(METRICS, None) if run.context else None
        around.publication.capture(run.state.train_state, metrics)

    return Collection(run, target, metadata, _glu_sizes(run), capture, prebuilt)


def _collect_local(collection: Collection, around: Surroundings) -> dict[str, Any]:
    state_dict = collection.everything()
    state_dict["train_state_metadata"] = around.publication.train_state
    state_dict[LINE_KEY] = around.publication.notes[LINE]
    state_dict[FILES_KEY] = [list(each) for each in around.position.records]
    return state_dict


def _hand_over(
    run: SaveRun,
    target: SaveTarget,
    collection: Collection,
    metadata: dict[str, Any],
    around: Surroundings,
    preprocess_common: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Any:
    """Give the state dict to the door of its format.

    Returns:
        With ``async_save`` the request to schedule. Otherwise the data is durable everywhere, and the
        SaveReport is returned where the format has one.
    """
    ckpt_cfg = run.ckpt_cfg
    options = SaveOptions(
        writers=ckpt_cfg.storage_writers_per_rank,
        snapshot=run.is_async,
        staging=staging_policy(run.model, run.optimizer) if run.is_async else None,
        host_buffer=getattr(ckpt_cfg, "host_buffer_bytes", None),
    )
    completion = around.completion({key: metadata[key] for key in (GLU_ROWS_KEY,) if key in metadata})
    if target.is_local:
        assert run.context is not None
        state_dict = ControlGroup().agree(lambda: _collect_local(collection, around))
        around.save_position()
        on_all_ranks(lambda: save_layer_wise_optimizer(run.optimizer, target.save_dir, run.pg_collection))
        notes = around.publication.notes
        return save_local(run.state, state_dict, run.context, target.step, run.pg_collection, notes)
    if ckpt_cfg.ckpt_format == "fsdp_dtensor":
        state_dict = ControlGroup().agree(collection.everything)
        if not _publishes_itself(run, target):
            around.save_position()
        return save_fsdp_dtensor(
            run.cfg,
            run.model,
            state_dict,
            target.checkpoint_name,
            options,
            completion,
            around.write_position,
            lambda directory: save_hf_copy(run.cfg, run.model, directory),
        )
    strategy, validate = _save_strategy(run)
    job = torch_dist.start_save(
        collection,
        target.checkpoint_name,
        strategy,
        options,
        completion,
        validate_access_integrity=validate,
        preprocess_common_before_consistency_check=preprocess_common,
        content_metadata=compat.clean_metadata_for_serialization(metadata),
        write_beside=around.write_position,
        reuse=ckpt_cfg.ckpt_assume_constant_structure,
    )
    write_along(job, lambda directory: _write_other_formats(run, directory))
    if run.is_async:
        return SaveHandle(job)
    job.write()
    return job.commit()


def _write_other_formats(run: SaveRun, directory: str) -> None:
    save_hf_copy(run.cfg, run.model, directory)
    if run.model and not getattr(run.cfg.dist, "use_decentralized_pg", False):
        compat.save_sharded_modelopt_state(run.model, directory, (run.ckpt_cfg.ckpt_format, 1))


def _save_strategy(run: SaveRun) -> tuple[Any, bool]:
    """The strategy, kept in the context between saves, and whether the sharding still needs validation."""
    ckpt_cfg, context, dp_cp = run.ckpt_cfg, run.context, run.pg_collection.dp_cp
    if context is not None and "save_strategy" in context:
        return context["save_strategy"], not ckpt_cfg.ckpt_assume_constant_structure
    strategy: Any = torch_dist.FastSaveStrategy(thread_count=ckpt_cfg.storage_writers_per_rank)
    validate = True
    if ckpt_cfg.fully_parallel_save and not isinstance(dp_cp, compat.SoloGroup):
        strategy = FastParallelSaveWrapper(strategy, dp_cp, do_cache_distribution=True)
    elif not ckpt_cfg.fully_parallel_save and len(run.model) == 1 and hasattr(run.model[0], "mimo_config"):
        # Modules of a multi-module model live on disjoint ranks; no rank sees the whole sharding.
        validate = False
    if context is not None:
        context["save_strategy"] = strategy
    return strategy, validate


def _finalize(
    run: SaveRun, request: Any, finalizers: Sequence[Callable[[], None]], follow_up: FollowUp
) -> None:
    """Run the finalizers now that the data is durable, or leave them to the request that is scheduled."""
    if not run.is_async:
        for finalizer in finalizers:
            finalizer()
        return
    for finalizer in finalizers:
        request.add_finalize_fn(finalizer)
    schedule_async_save(run.state, request)
    remember(run.state, follow_up)
