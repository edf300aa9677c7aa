# SPDX-License-Identifier: Apache-2.0
"""``load_checkpoint``: find the checkpoint, decide what of it applies, load it, put it where it belongs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ckpt_fast import compat
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
)
from ckpt_fast.glu.layout import _is_model_section
from ckpt_fast.jobs import trace
from ckpt_fast.jobs.background import wait_staged
from ckpt_fast.pipeline.load.report import one_load
from ckpt_fast.ranks.lost import in_touch
from ckpt_fast.ranks.world import (
    get_rank_safe,
    note_rank_0,
    on_all_ranks,
    on_rank_0,
    warn_rank_0,
)
from ckpt_fast.run.config_checks import check_choices, warn_of_unused
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.contents.hugging_face import is_hf_source, load_hf_pretrained
from ckpt_fast.trainer.contents.state_dict import (
    apply_peft_adapter_filter_to_state_dict,
)
from ckpt_fast.trainer.contents.version import get_checkpoint_version, set_checkpoint_version
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.lineage import facts_of, resume
from ckpt_fast.trainer.load.announce import announce_loaded, what_was_tried
from ckpt_fast.trainer.load.base import choose_or_say, load_state_dict
from ckpt_fast.trainer.load.fit import Needs
from ckpt_fast.trainer.load.located import Located, locate
from ckpt_fast.trainer.load.plan import (
    LoadPlan,
    build_scaffold,
    drop_states_of_other_ranks,
    find_run_config,
    is_mimo,
    is_peft_resume,
    make_plan,
    own_run_config,
)
from ckpt_fast.trainer.load.restore import (
    counters_of,
    read_progress,
    restore_model,
    restore_optimizer,
    restore_rerun_and_rng,
    restore_train_state,
)
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places.catalog import Found
from ckpt_fast.trainer.places.locate import (
    _has_global_non_persistent_checkpoint,
    has_local_checkpoint,
    holds_checkpoint,
    older_checkpoints,
)
from ckpt_fast.trainer.places.paths import is_hf_checkpoint_dir, settle_directories


@trace.traced("load_checkpoint")
@in_touch()
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
        ValueError: a setting of ckpt_fast's own, such as ``on_corrupt``, has a value that it does not know.
        CheckpointError: on every rank, naming rank, path, cause and remedy.
    """
    wait_staged()  # a save in flight may still be reading what is loaded into
    settle_directories(state.cfg)
    ckpt_cfg = state.cfg.checkpoint
    warn_of_unused(ckpt_cfg)
    on_all_ranks(lambda: check_choices(ckpt_cfg))
    load_dir, pretrained = ckpt_cfg.load, ckpt_cfg.pretrained_checkpoint
    if pretrained is not None and not _has_resume_checkpoint(load_dir, ckpt_cfg, checkpointing_context):
        if not on_rank_0(lambda: holds_checkpoint(pretrained) or is_hf_checkpoint_dir(pretrained)):
            raise CheckpointNotFoundError(
                f"there is no checkpoint in load={load_dir!r}, and pretrained_checkpoint={pretrained!r} does "
                "not exist or holds none"
            )
        note_rank_0(f"there is nothing to resume in load={load_dir!r}: starting from {pretrained}")
        load_dir = pretrained
        ckpt_cfg.finetune = True

    run = LoadRun(
        ckpt_cfg,
        cfg=state.cfg,
        context=checkpointing_context,
        pg_collection=pg_collection,
        state=state,
        model=compat.unwrap_model(model),
        optimizer=optimizer,
        scheduler=opt_param_scheduler,
        strict=strict,
        skip_model_and_optimizer=skip_load_to_model_and_opt,
        module_name=module_name,
    )
    return _load_with_fall_back(run, load_dir)


def _load_with_fall_back(run: LoadRun, load_dir: str | None) -> tuple[int, int]:
    if is_hf_source(load_dir, run.ckpt_cfg):
        return _load_hugging_face(run, load_dir)
    chosen = choose_or_say(run, load_dir, run.ckpt_cfg.ckpt_step)
    if chosen is None:
        return 0, 0
    try:
        return _load_found(run, load_dir, chosen)
    except (CheckpointCorruptError, CheckpointNotFoundError) as error:
        return _load_older(run, load_dir, chosen, error)


def _load_older(run: LoadRun, load_dir: str | None, chosen: Found, error: CheckpointError) -> tuple[int, int]:
    """Go back, checkpoint by checkpoint, to the newest one of any tier that is whole. Collective.

    Raises:
        CheckpointError: ``error`` itself, where the user asked for one certain checkpoint or for no fall-back
            (``on_corrupt``), and when no older checkpoint can be loaded.
    """
    problem: CheckpointError = error
    tried: list[str] = []
    falls_back = getattr(run.ckpt_cfg, "on_corrupt", "fallback") == "fallback"
    for older in older_checkpoints(load_dir, run.ckpt_cfg, chosen, run.context) if falls_back else []:
        warn_rank_0(
            f"{problem} -- falling back to {older} ({older.tier}, iteration {older.iteration}; "
            "on_corrupt='fallback')"
        )
        try:
            return _load_found(run, str(older), older)
        except (CheckpointCorruptError, CheckpointNotFoundError) as older_error:
            problem = older_error
            tried.append(f"{older} ({older.tier}, iteration {older.iteration}): {older_error}")
    error.args = (f"{error}\n{what_was_tried(run.ckpt_cfg, chosen, tried, falls_back=falls_back)}",)
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
    run = LoadRun(
        _without_recovery(ckpt_cfg) if ignore_ckpt_step else ckpt_cfg,
        cfg=state.cfg,
        context=checkpointing_context,
        pg_collection=pg_collection,
        state=state,
        model=compat.unwrap_model(model),
        optimizer=optimizer,
        scheduler=opt_param_scheduler,
        strict=strict,
        skip_model_and_optimizer=skip_load_to_model_and_opt,
        module_name=module_name,
    )
    if is_hf_source(load_dir, ckpt_cfg):
        return _load_hugging_face(run, load_dir)
    chosen = choose_or_say(run, load_dir, None if ignore_ckpt_step else ckpt_cfg.ckpt_step)
    return (0, 0) if chosen is None else _load_found(run, load_dir, chosen)


def _load_hugging_face(run: LoadRun, load_dir: str | None) -> tuple[int, int]:
    skip = run.skip_model_and_optimizer
    return load_hf_pretrained(str(load_dir), run.state, run.model, run.optimizer, skip=skip)


def _load_found(run: LoadRun, load_dir: str | None, found: Found) -> tuple[int, int]:
    """``load_checkpoint`` of one checkpoint. Collective; result and errors are those of it."""
    with one_load(str(found), get_rank_safe(), is_announced=True) as report:
        plan, located, name = _restore_found(run, load_dir, found)
    announce_loaded(run, load_dir, plan, located, name, report)
    train_state = run.state.train_state
    return train_state.step, train_state.floating_point_operations_so_far


def _restore_found(run: LoadRun, load_dir: str | None, found: Found) -> tuple[LoadPlan, Located, Any]:
    """Collective. Load one checkpoint; what was planned, where it was found, and what it is called."""
    state, cfg = run.state, run.state.cfg
    with locate(run, load_dir, found) as located:
        run_config, progress = _read_history(run, located)
        plan = make_plan(run, located, run_config)
        adapters_only = is_peft_resume(cfg, located)
        is_strict = run.strict and not adapters_only
        needs = Needs(run, plan, located, model=is_strict and not run.skip_model_and_optimizer)

        def ask() -> dict[str, Any]:
            needs.require_common()
            return build_scaffold(run, plan)

        scaffold = on_all_ranks(ask)
        drop_states_of_other_ranks(plan, scaffold, located, run_config)
        left_alone = run.skip_model_and_optimizer and _can_leave_alone(cfg, located)
        reading = run
        if left_alone:
            scaffold, reading = _without_model_and_optimizer(scaffold, run)
        if adapters_only:
            scaffold = apply_peft_adapter_filter_to_state_dict(scaffold, cfg.peft)
        state_dict, name = load_state_dict(
            reading,
            located,
            scaffold,
            is_mimo=is_mimo(run_config, cfg),
            accept_missing=needs.accept_missing,
        )
        is_new = run.ckpt_cfg.finetune or found.is_release
        facts = None if is_new else facts_of(located.checkpoint, state_dict)

    def check() -> TrainState | None:
        needs.require_read(state_dict)
        return counters_of(state, progress, state_dict, located)

    # All that can be refused has been, on all ranks, when the first takes anything over.
    counters = on_all_ranks(check)
    _note_version(state_dict)

    @trace.traced("restore")
    def restore() -> None:
        if not run.skip_model_and_optimizer:
            restore_model(run, plan, located, state_dict, is_strict)
        restore_optimizer(run, plan, located, state_dict, left_alone=left_alone)
        restore_rerun_and_rng(plan, state_dict, cfg, run.groups)

    on_all_ranks(restore)
    restore_train_state(state, counters, located)
    resume(state, state.train_state.step, facts)
    return plan, located, name


def _read_history(run: LoadRun, located: Located) -> tuple[dict[str, Any] | None, TrainState | None]:
    """The configuration and the counters of the run that saved the checkpoint, as far as it has them beside
    the payload. Collective."""
    if located.kind is CheckpointType.LOCAL:
        return own_run_config(run.state.cfg), None

    def read() -> tuple[dict[str, Any] | None, TrainState | None]:
        with located.opened.named():
            return find_run_config(located), None if run.ckpt_cfg.finetune else read_progress(located)

    return on_rank_0(read)


def _note_version(state_dict: dict[str, Any]) -> None:
    set_checkpoint_version(state_dict.get("checkpoint_version", 0))
    note_rank_0(f" checkpoint version {get_checkpoint_version()}")


def _can_leave_alone(cfg: Any, located: Located) -> bool:
    """Whether nothing is restored by filling the scaffold: torch FSDP2 relies on that."""
    return located.kind is CheckpointType.GLOBAL and not getattr(cfg.dist, "use_torch_fsdp2", False)


def _without_model_and_optimizer(scaffold: dict[str, Any], run: LoadRun) -> tuple[dict[str, Any], LoadRun]:
    """The scaffold without what it would fill in place, and a load that does not miss it."""
    ckpt_cfg = copy.copy(run.ckpt_cfg)
    ckpt_cfg.dist_ckpt_strictness = "assume_ok_unexpected"
    kept = {key: part for key, part in scaffold.items() if key != "optimizer" and not _is_model_section(key)}
    return kept, replace(run, ckpt_cfg=ckpt_cfg)


def _without_recovery(ckpt_cfg: Any) -> Any:
    """Base weights of a PEFT run are not in its recovery checkpoints, which hold adapters."""
    ckpt_cfg = copy.copy(ckpt_cfg)
    ckpt_cfg.non_persistent_ckpt_type = None
    return ckpt_cfg
