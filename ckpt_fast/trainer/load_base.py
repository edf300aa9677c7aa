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
from ckpt_fast.doors.load_strategy import FastLoadStrategy
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError
from ckpt_fast.pipeline.group import ControlGroup
from ckpt_fast.pipeline.types import FileRecord
from ckpt_fast.pipeline.verify import require_complete
from ckpt_fast.trainer.catalog import Found, why_nothing
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.data_position import FILES_KEY, files_of, require_files
from ckpt_fast.trainer.fsdp import load_fsdp_dtensor_checkpoint
from ckpt_fast.trainer.local import load_local
from ckpt_fast.trainer.locate import (
    _NON_PERSISTENT_CKPT_SUBDIR,
    _get_checkpoint_format,
    choose_checkpoint,
)
from ckpt_fast.trainer.paths import file_exists, get_checkpoint_name, join_paths, settled
from ckpt_fast.trainer.ranks import barrier_if_distributed, on_rank_0, print_rank_0
from ckpt_fast.trainer.visibility import require_same_view

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
    step = None if ignore_ckpt_step else ckpt_cfg.ckpt_step
    chosen = choose_or_say(load_dir, ckpt_cfg, step, checkpointing_context)
    if chosen is None:
        return None, "", False, None
    return load_chosen(
        chosen,
        load_dir,
        ckpt_cfg,
        rank0=rank0,
        sharded_state_dict=sharded_state_dict,
        checkpointing_context=checkpointing_context,
        cfg=cfg,
        is_megatron_mimo=is_megatron_mimo,
        pg_collection=pg_collection,
    )


def choose_or_say(
    load_dir: str | None, ckpt_cfg: Any, step: int | None, context: dict[str, Any] | None
) -> Found | None:
    """The checkpoint to load; that there is none, and why, is said. Collective.

    Raises:
        SystemExit: there is none, and ``exit_on_missing_checkpoint`` is set.
    """
    _record_dataloader_state_dir(context, None)
    chosen = choose_checkpoint(load_dir, ckpt_cfg, step, context)
    if chosen is not None:
        return chosen
    why = on_rank_0(lambda: why_nothing(load_dir))
    if ckpt_cfg.exit_on_missing_checkpoint:
        print_rank_0(f">> '--exit-on-missing-checkpoint' set ... exiting: {why}")
        barrier_if_distributed()
        sys.exit(1)
    print_rank_0(f"WARNING: {why}: will not load any checkpoints and will start from random")
    return None


def load_chosen(
    chosen: Found,
    load_dir: str | None,
    ckpt_cfg: Any,
    *,
    rank0: bool = False,
    sharded_state_dict: dict[str, Any] | None = None,
    checkpointing_context: dict[str, Any] | None,
    cfg: Any,
    is_megatron_mimo: bool = False,
    pg_collection: Any,
) -> LoadedBase:
    """Load the state dict of one checkpoint. Collective; the rest is as in ``_load_base_checkpoint``."""
    position = on_rank_0(lambda: find_data_position(chosen, load_dir, ckpt_cfg))
    _record_dataloader_state_dir(checkpointing_context, position)
    if chosen.path and rank0:
        files = on_rank_0(lambda: _sound_data_files(chosen.path, position, ckpt_cfg))
        _record_dataloader_files(checkpointing_context, files)
    if chosen.tier == "persistent":
        return _load_global(
            chosen.root or chosen.path,
            ckpt_cfg,
            chosen.iteration if chosen.root else None,
            chosen.is_release,
            rank0=rank0,
            sharded_state_dict=sharded_state_dict,
            checkpointing_context=checkpointing_context,
            is_megatron_mimo=is_megatron_mimo,
            cfg=cfg,
            pg_collection=pg_collection,
            override=None if chosen.root else chosen.path,
        )
    return _load_non_persistent_base_checkpoint(
        chosen.root,
        ckpt_cfg,
        rank0,
        sharded_state_dict,
        chosen.iteration,
        checkpointing_context,
        cfg,
        is_megatron_mimo=is_megatron_mimo,
        pg_collection=pg_collection,
    )


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
    if rank0:
        require_same_view(path)
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
            sharded_state_dict, ckpt_cfg, checkpointing_context, pg_collection, non_persistent_iteration
        )
        files = [FileRecord(*each) for each in state_dict.pop(FILES_KEY, ())]
        _record_dataloader_files(checkpointing_context, files)
        position = checkpointing_context.get("dataloader_state_dir")
        ControlGroup().agree(lambda: require_files(position, files))
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
    strategy = FastLoadStrategy(verify=verify)
    if fully_parallel and torch.cuda.is_available():
        return megatron.FullyParallelLoadStrategyWrapper(strategy, pg_collection.dp_cp)
    return strategy


def _sound_data_files(checkpoint: str, position: str | None, ckpt_cfg: Any) -> list[FileRecord]:
    """The files of data loaders that the checkpoint vouches for; they are what they must be.

    Raises:
        CheckpointCorruptError: one is not, and the run goes on with it.
    """
    files = files_of(checkpoint)
    if not ckpt_cfg.finetune:
        require_files(position, files)
    return files


def _record_dataloader_files(context: dict[str, Any] | None, files: list[FileRecord]) -> None:
    if context is not None:
        context[FILES_KEY] = files


def _record_dataloader_state_dir(context: dict[str, Any] | None, directory: str | None) -> None:
    """Leave in the context where the data loader's state of the loaded checkpoint is."""
    if context is not None:
        context["dataloader_state_dir"] = directory


def find_data_position(chosen: Found, load_dir: str | None, ckpt_cfg: Any) -> str | None:
    """The directory of the data loader's states that belong to a checkpoint. Local.

    It is beside the iterations of the run that saved it, and one directory higher for the recovery
    checkpoints in its ``non_persistent``. Of several places the one that has this iteration is taken, or the
    first.
    """
    root = os.path.dirname(settled(chosen.path)) if chosen.path else ""
    places = [root] if root else [ckpt_cfg.save, load_dir]
    if os.path.basename(root) == _NON_PERSISTENT_CKPT_SUBDIR:
        places.insert(0, os.path.dirname(root))
    if root and root == ckpt_cfg.non_persistent_global_ckpt_dir:
        places.insert(0, ckpt_cfg.save)
    states = [join_paths(place, _DATALOADER_STATE_SUBDIR) for place in places if place]
    for directory in states:
        if chosen.iteration >= 0 and file_exists(get_checkpoint_name(directory, chosen.iteration)):
            return directory
    return states[0] if states else None
