# SPDX-License-Identifier: Apache-2.0
"""Choosing the checkpoint to load, and reading its state dict; the documented loaders of a state dict."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
from ckpt_fast.format.types import FileRecord
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import barrier_if_distributed, on_rank_0, warn_rank_0
from ckpt_fast.trainer.contents.data_position import FILES_KEY, require_files
from ckpt_fast.trainer.contents.fsdp import load_fsdp_dtensor
from ckpt_fast.trainer.contents.local import load_local
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.located import (
    Located,
    locate,
    opened_torch_dist,
    record_data_files,
    record_data_position,
)
from ckpt_fast.trainer.load.run import LoadRun
from ckpt_fast.trainer.places.catalog import NOTHING, Found, why_nothing
from ckpt_fast.trainer.places.locate import choose_checkpoint
from ckpt_fast.trainer.places.paths import get_checkpoint_name

Paths = Collection[tuple[Any, ...]]
LoadedBase = tuple[dict[str, Any] | None, Any, bool, CheckpointType | None]


def choose_or_say(run: LoadRun, load_dir: str | None, step: int | None) -> Found | None:
    """The checkpoint to load; if there is none, the reason is logged. Collective.

    Raises:
        SystemExit: there is none, and ``exit_on_missing_checkpoint`` is set.
    """
    record_data_position(run.context, None)
    chosen = choose_checkpoint(load_dir, run.ckpt_cfg, step, run.context)
    if chosen is not None:
        return chosen
    why = on_rank_0(lambda: why_nothing(load_dir))
    if run.ckpt_cfg.exit_on_missing_checkpoint:
        warn_rank_0(f">> '--exit-on-missing-checkpoint' set ... exiting: {why}", logging.ERROR)
        barrier_if_distributed()
        sys.exit(1)
    warn_rank_0(f"{why}: will not load any checkpoints and will start from random")
    return None


def load_state_dict(
    run: LoadRun,
    located: Located,
    sharded_state_dict: dict[str, Any] | None,
    *,
    is_mimo: bool = False,
    accept_missing: Callable[[Paths, Paths], None] = lambda *_: None,
) -> tuple[dict[str, Any], Any]:
    """The parts of a checkpoint that the sharded state dict requests, and the checkpoint's name. Collective.

    Args:
        is_mimo: a multi-module model, whose sharding no rank can validate.
        accept_missing: see ``torch_dist.load``; for checkpoints of that format.

    Raises:
        CheckpointError: on every rank, naming the rank that failed.
        RuntimeError: there is no sharded state dict.
    """
    if located.kind is CheckpointType.LOCAL:
        return _load_local(run, located, sharded_state_dict)
    if located.kind is CheckpointType.FSDP_DTENSOR:
        state_dict = load_fsdp_dtensor(
            located.name, run.ckpt_cfg, sharded_state_dict, run.cfg, located.opened
        )
        return state_dict, located.name
    if sharded_state_dict is None:
        raise RuntimeError("loading a distributed checkpoint needs a sharded state dict, which was not given")
    strategy = load_strategy(
        run.ckpt_cfg.fully_parallel_load, run.groups, getattr(run.ckpt_cfg, "verify_on_load", None)
    )
    if run.context is not None:
        run.context["load_strategy"] = strategy
    loaded = torch_dist.load(
        sharded_state_dict,
        located.name,
        checkpoint=located.opened,
        common=located.common,
        strategy=strategy,
        strict=run.ckpt_cfg.dist_ckpt_strictness,
        validate_access_integrity=not (is_mimo and not run.ckpt_cfg.fully_parallel_save),
        accept_missing=accept_missing,
    )
    return loaded[0] if isinstance(loaded, tuple) else loaded, located.name


def _load_local(
    run: LoadRun, located: Located, sharded_state_dict: dict[str, Any] | None
) -> tuple[dict[str, Any], Any]:
    assert sharded_state_dict is not None and run.context is not None
    state_dict, checkpoint_id = load_local(
        sharded_state_dict, run.ckpt_cfg, run.context, run.groups, located.found.iteration
    )
    files = [FileRecord(*each) for each in state_dict.pop(FILES_KEY, ())]
    record_data_files(run.context, files)
    ControlGroup().agree(lambda: require_files(located.position, files))
    return state_dict, checkpoint_id


def load_strategy(fully_parallel: bool, pg_collection: Any, verify: bool | None = None) -> Any:
    """Our load strategy, sharing the reads among data-parallel ranks where a GPU can exchange them.

    Without one every rank reads what it needs: the exchange of Megatron-Core goes through GPU memory, and a
    second read of the same bytes comes from the page cache.
    """
    strategy = FastLoadStrategy(verify=verify)
    if fully_parallel and torch.cuda.is_available():
        return compat.FullyParallelLoadStrategyWrapper(strategy, pg_collection.dp_cp)
    return strategy


# --- Documented --------------------------------------------------------------------------------------------


def _load_base_checkpoint(
    load_dir: str | None,
    ckpt_cfg: Any,
    rank0: bool = False,
    sharded_state_dict: dict[str, Any] | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    ignore_ckpt_step: bool = False,
    cfg: Any | None = None,
    is_megatron_mimo: bool = False,
    *,
    pg_collection: Any,
) -> LoadedBase:
    """Choose the checkpoint, as ``choose_checkpoint`` says, and load its state dict. Collective.

    Args:
        load_dir: root of checkpoints, one checkpoint, or None.
        ckpt_cfg: CheckpointConfig.
        rank0: read the common state only.
        sharded_state_dict: what to load; needed unless ``rank0``.
        checkpointing_context: holds the local checkpoint manager; the load strategy is left in it.
        ignore_ckpt_step: take the newest whatever ``ckpt_step`` says.
        cfg: the whole config, for formats that preprocess.
        is_megatron_mimo: a multi-module model, whose sharding no rank can validate.
        pg_collection: process groups.

    Returns:
        (state dict, checkpoint, release, type); (None, "", False, None) when there is nothing to load.

    Raises:
        SystemExit: nothing to load, and ``exit_on_missing_checkpoint``.
        AssertionError: the checkpoint is of another format than configured.
        NotImplementedError: it is of no known format, or Hugging Face weights.
    """
    run = LoadRun(ckpt_cfg, cfg, checkpointing_context, pg_collection)
    chosen = choose_or_say(run, load_dir, None if ignore_ckpt_step else ckpt_cfg.ckpt_step)
    if chosen is None:
        return None, "", False, None
    with locate(run, load_dir, chosen) as located:
        return _load_base(run, located, rank0, sharded_state_dict, is_megatron_mimo)


def _load_non_persistent_base_checkpoint(
    non_persistent_global_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    non_persistent_iteration: int,
    checkpointing_context: dict[str, Any] | None = None,
    cfg: Any | None = None,
    *,
    is_megatron_mimo: bool = False,
    pg_collection: Any,
) -> LoadedBase:
    """Load a recovery checkpoint of type "global" or "local". Collective; arguments as of the base loader.

    Raises:
        ValueError: another type.
        CheckpointError: see ``load_checkpoint``.
    """
    kind = ckpt_cfg.non_persistent_ckpt_type
    assert kind is not None, "non_persistent_ckpt_type is not set"
    if kind == "global":
        path = get_checkpoint_name(non_persistent_global_dir, non_persistent_iteration)
        found = Found("recovery", non_persistent_global_dir, non_persistent_iteration, path)
    elif kind == "local":
        found = Found("local", "", non_persistent_iteration, "")
    else:
        raise ValueError(f"Invalid non_persistent_ckpt_type: {kind!r}. Must be 'local' or 'global'.")
    run = LoadRun(ckpt_cfg, cfg, checkpointing_context, pg_collection)
    with locate(run, non_persistent_global_dir, found) as located:
        return _load_base(run, located, rank0, sharded_state_dict, is_megatron_mimo)


def _load_global_dist_base_checkpoint(
    load_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int | None,
    release: bool,
    checkpoint_path_override: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    is_megatron_mimo: bool = False,
    *,
    pg_collection: Any,
) -> LoadedBase:
    """Load a torch_dist checkpoint. Collective; arguments as of the base loader.

    Args:
        checkpoint_path_override: the iteration directory itself, instead of ``load_dir`` and ``iteration``.

    Raises:
        RuntimeError: neither ``rank0`` nor a sharded state dict was given.
        CheckpointError: on every rank, naming the rank that failed.
    """
    if not rank0 and sharded_state_dict is None:
        raise RuntimeError("loading a distributed checkpoint needs a sharded state dict, which was not given")
    path = checkpoint_path_override or get_checkpoint_name(load_dir, iteration or 0, release)
    found = Found("persistent", "", NOTHING if iteration is None else iteration, path, is_release=release)
    run = LoadRun(ckpt_cfg, None, checkpointing_context, pg_collection)
    with opened_torch_dist(path) as (opened, common):
        located = Located(found, CheckpointType.GLOBAL, opened, common)
        return _load_base(run, located, rank0, sharded_state_dict, is_megatron_mimo)


def _load_base(
    run: LoadRun,
    located: Located,
    common_state_only: bool,
    sharded_state_dict: dict[str, Any] | None,
    is_mimo: bool,
) -> LoadedBase:
    if common_state_only:
        return located.common, located.name, located.found.is_release, located.kind
    state_dict, name = load_state_dict(run, located, sharded_state_dict, is_mimo=is_mimo)
    return state_dict, name, located.found.is_release, located.kind
