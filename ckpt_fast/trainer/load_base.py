# SPDX-License-Identifier: Apache-2.0
"""Finding the checkpoint to load, and reading its state dict.

Each loader is called twice by ``load_checkpoint``: with ``rank0=True`` for the facts that decide what to ask
for (common state, iteration, kind), then with the sharded state dict that asks for it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from ckpt_fast import megatron
from ckpt_fast.doors import megatron_core
from ckpt_fast.doors.common_state import COMMON_FILE, load_common_state_dict
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.verify import require_complete
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.fsdp import load_fsdp_dtensor_checkpoint
from ckpt_fast.trainer.local import load_local
from ckpt_fast.trainer.locate import (
    _DIRECT_ITERATION_DIR_SENTINEL,
    _get_checkpoint_format,
    _get_global_non_persistent_checkpoint_dirs,
    _get_non_persistent_iteration,
    _resolve_checkpoint_iteration,
    newest_global_non_persistent_checkpoint,
)
from ckpt_fast.trainer.paths import file_exists, get_checkpoint_name, join_paths
from ckpt_fast.trainer.ranks import barrier_if_distributed, on_rank_0, print_rank_0

LoadedBase = tuple[dict[str, Any] | None, Any, bool, CheckpointType | None]

_DATALOADER_STATE_SUBDIR = "energon"


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
    """Choose the checkpoint and load its state dict. Collective.

    A directory that is a checkpoint itself is taken as it is. Otherwise an explicit ``ckpt_step`` wins;
    without one, the newest of the persistent and the recovery checkpoints (on a tie the recovery one).

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
    _record_dataloader_state_dir(checkpointing_context, None)
    step = None if ignore_ckpt_step else ckpt_cfg.ckpt_step
    iteration, release = _resolve_checkpoint_iteration(load_dir=load_dir, ckpt_step_override=step)
    options: dict[str, Any] = {
        "rank0": rank0,
        "sharded_state_dict": sharded_state_dict,
        "checkpointing_context": checkpointing_context,
        "is_megatron_mimo": is_megatron_mimo,
        "cfg": cfg,
        "pg_collection": pg_collection,
    }
    if iteration == _DIRECT_ITERATION_DIR_SENTINEL:
        assert load_dir is not None
        root = os.path.dirname(load_dir.rstrip("/"))
        if root in _get_global_non_persistent_checkpoint_dirs(ckpt_cfg.load, ckpt_cfg):
            root = _root_of_recovery(root, ckpt_cfg.load, ckpt_cfg) or root
        _record_dataloader_state_dir(checkpointing_context, root)
        return _load_global(load_dir, ckpt_cfg, None, False, override=load_dir, **options)
    if step is None:
        recovery_dir, recovery = _newest_recovery(load_dir, ckpt_cfg, checkpointing_context)
        if recovery != -1 and recovery >= iteration:
            _record_dataloader_state_dir(
                checkpointing_context, _root_of_recovery(recovery_dir, load_dir, ckpt_cfg)
            )
            return _load_non_persistent_base_checkpoint(
                recovery_dir,
                ckpt_cfg,
                rank0,
                sharded_state_dict,
                recovery,
                checkpointing_context,
                cfg,
                is_megatron_mimo=is_megatron_mimo,
                pg_collection=pg_collection,
            )
        if recovery != -1:
            print_rank_0(
                f"WARNING: the recovery checkpoint of iteration {recovery} is older than the persistent "
                f"one of {iteration}, which is loaded"
            )
    if iteration == -1:
        return _nothing_found(load_dir, ckpt_cfg, rank0)
    assert load_dir is not None
    _record_dataloader_state_dir(checkpointing_context, load_dir)
    return _load_global(load_dir, ckpt_cfg, iteration, release, **options)


def _nothing_found(load_dir: str | None, ckpt_cfg: Any, rank0: bool) -> LoadedBase:
    if not rank0:
        print_rank_0(f"WARNING: could not find a tracker or a checkpoint in {load_dir}")
        print_rank_0("    will not load any checkpoints and will start from random")
    if ckpt_cfg.exit_on_missing_checkpoint:
        print_rank_0(f">> '--exit-on-missing-checkpoint' set ... exiting: no checkpoint in {load_dir}")
        barrier_if_distributed()
        sys.exit(1)
    return None, "", False, None


def _load_global(
    load_dir: str,
    ckpt_cfg: Any,
    iteration: int | None,
    release: bool,
    *,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    checkpointing_context: dict[str, Any] | None,
    is_megatron_mimo: bool,
    cfg: Any | None,
    pg_collection: Any,
    override: str | None = None,
) -> LoadedBase:
    path = override or get_checkpoint_name(load_dir, iteration or 0, release)
    found = on_rank_0(lambda: _require_sound(path, ckpt_cfg.ckpt_format))
    if found == "torch_dist":
        return _load_global_dist_base_checkpoint(
            load_dir,
            ckpt_cfg,
            rank0,
            sharded_state_dict,
            iteration,
            release,
            checkpoint_path_override=override,
            checkpointing_context=checkpointing_context,
            is_megatron_mimo=is_megatron_mimo,
            pg_collection=pg_collection,
        )
    return load_fsdp_dtensor_checkpoint(
        load_dir,
        ckpt_cfg,
        rank0,
        sharded_state_dict,
        iteration,
        release,
        checkpoint_path_override=override,
        checkpointing_context=checkpointing_context,
        cfg=cfg,
    )


def _require_sound(path: str, configured: str) -> str:
    """The format of the checkpoint, "torch_dist" or "fsdp_dtensor", whose files are all there."""
    if not os.path.isdir(path) and not megatron.object_storage(path):
        raise CheckpointNotFoundError(
            f"the tracker names {path}, which does not exist. Was it deleted or moved? Set ckpt_step to an "
            "iteration that is there."
        )
    found = _get_checkpoint_format(path)
    if found == "fsdp_dtensor" and file_exists(join_paths(path, COMMON_FILE)):
        raise CheckpointCorruptError(
            f"{path} is a torch_dist checkpoint that lacks its metadata.json: the save was interrupted, or "
            "the file was deleted. Load an earlier iteration."
        )
    if found == "hf":
        raise NotImplementedError(
            f"Checkpoint format hf not supported: {path} holds Hugging Face weights and no training state. "
            "Give the directory as checkpoint.pretrained_checkpoint to start from them."
        )
    if found != configured:
        raise AssertionError(
            f"{path} is a {found} checkpoint, but checkpoint.ckpt_format is {configured}; set it to {found!r}"
        )
    if found == "torch_dist" or not megatron.object_storage(path):
        with megatron.checkpoint_files(path) as files:
            require_complete(files)
    return found


def _newest_recovery(load_dir: str | None, ckpt_cfg: Any, context: dict[str, Any] | None) -> tuple[str, int]:
    if ckpt_cfg.non_persistent_ckpt_type == "global":
        return newest_global_non_persistent_checkpoint(load_dir, ckpt_cfg)
    return "", _get_non_persistent_iteration("", ckpt_cfg.non_persistent_ckpt_type, context)


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
        return _load_global(
            non_persistent_global_dir,
            ckpt_cfg,
            non_persistent_iteration,
            False,
            rank0=rank0,
            sharded_state_dict=sharded_state_dict,
            checkpointing_context=checkpointing_context,
            is_megatron_mimo=is_megatron_mimo,
            cfg=cfg,
            pg_collection=pg_collection,
        )
    if kind == "local":
        if rank0:
            return {}, non_persistent_iteration, False, CheckpointType.LOCAL
        assert sharded_state_dict is not None and checkpointing_context is not None
        state_dict, checkpoint_id = load_local(
            sharded_state_dict, ckpt_cfg, checkpointing_context, pg_collection
        )
        return state_dict, checkpoint_id, False, CheckpointType.LOCAL
    raise ValueError(f"Invalid non_persistent_ckpt_type: {kind!r}. Must be 'local' or 'global'.")


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
    if rank0:
        name = checkpoint_path_override or get_checkpoint_name(load_dir, iteration or 0, release)
        state_dict = ControlGroup().agree(lambda: load_common_state_dict(name))
        return state_dict, name, release, CheckpointType.GLOBAL
    if sharded_state_dict is None:
        raise RuntimeError("loading a distributed checkpoint needs a sharded state dict, which was not given")
    name = checkpoint_path_override or get_checkpoint_name(load_dir, iteration or 0, release)
    strategy = load_strategy(
        ckpt_cfg.fully_parallel_load, pg_collection, getattr(ckpt_cfg, "verify_on_load", None)
    )
    if checkpointing_context is not None:
        checkpointing_context["load_strategy"] = strategy
    state_dict = megatron_core.load(
        sharded_state_dict,
        name,
        strategy=strategy,
        strict=ckpt_cfg.dist_ckpt_strictness,
        validate_access_integrity=not (is_megatron_mimo and not ckpt_cfg.fully_parallel_save),
    )
    if isinstance(state_dict, tuple):
        state_dict = state_dict[0]
    return state_dict, name, release, CheckpointType.GLOBAL


def load_strategy(fully_parallel: bool, pg_collection: Any, verify: bool | None = None) -> Any:
    """Our load strategy, sharing the reads among data-parallel ranks where a GPU can exchange them.

    Without one every rank reads what it needs: the exchange of Megatron-Core goes through GPU memory, and a
    second read of the same bytes comes from the page cache.
    """
    strategy = megatron_core.FastLoadStrategy(verify=verify)
    if fully_parallel and torch.cuda.is_available():
        return megatron.FullyParallelLoadStrategyWrapper(strategy, pg_collection.dp_cp)
    return strategy


def _record_dataloader_state_dir(context: dict[str, Any] | None, base_dir: str | None) -> None:
    """Leave in the context where the data loader's state of the loaded checkpoint is."""
    if context is not None:
        context["dataloader_state_dir"] = base_dir and os.path.join(base_dir, _DATALOADER_STATE_SUBDIR)


def _root_of_recovery(recovery_dir: str, load_dir: str | None, ckpt_cfg: Any) -> str | None:
    """The root a recovery checkpoint's data loader state lies in: that of the run that saved it."""
    is_default = ckpt_cfg.non_persistent_ckpt_type == "global" and not ckpt_cfg.non_persistent_global_ckpt_dir
    if is_default and load_dir and os.path.dirname(recovery_dir) == load_dir.rstrip("/"):
        return load_dir
    root: str | None = ckpt_cfg.save
    return root
