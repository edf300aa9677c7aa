# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints: per-node files kept by nvidia-resiliency-ext's manager, for fast recovery."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.pipeline.load.parts import require_memory
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import barrier_if_distributed, warn_rank_0
from ckpt_fast.trainer.places.paths import ensure_directory_exists

_STRUCTURE = "local_checkpoint_structure"
_MOST_SHOWN = 5


def save_local(
    state: Any,
    state_dict: dict[str, Any],
    context: dict[str, Any],
    step: int,
    pg_collection: Any,
    notes: Mapping[str, Any],
) -> Any:
    """Collective. Save through the context's local checkpoint manager.

    Args:
        state_dict: holds the train state as well (``train_state_metadata``): there are no files beside it.
        notes: what the checkpoint notes of its run, where the manager is ours.

    Returns:
        The manager's request with ``async_save``, else None: every rank has written then.

    Raises:
        CheckpointError: on every rank: one could not save, or has ended.
        RuntimeError: Megatron-Core or nvidia-resiliency-ext lacks what local checkpoints need.
    """
    ckpt_cfg = state.cfg.checkpoint
    _warn_of_modelopt()
    tensor_aware_state_dict = compat.import_tensor_aware_state_dict()
    structure = _structure_of(state_dict)
    is_known = ckpt_cfg.ckpt_assume_constant_structure and ControlGroup().all_true(
        structure == context.get(_STRUCTURE)
    )
    local_state_dict, context["local_checkpoint_cache"] = ControlGroup().agree(
        lambda: tensor_aware_state_dict.from_state_dict(
            state_dict,
            algo=ckpt_cfg.non_persistent_local_ckpt_algo,
            cached_metadata=context.get("local_checkpoint_cache") if is_known else None,
            parallelization_group=pg_collection.dp_cp,
        )
    )
    context[_STRUCTURE] = structure  # of what the cache was made for
    manager = context["local_checkpoint_manager"]
    options = {"notes": notes} if _is_ours(manager) else {}
    request = manager.save(local_state_dict, step, is_async=bool(ckpt_cfg.async_save), **options)
    if not ckpt_cfg.async_save:
        barrier_if_distributed()
    return request


def _is_ours(manager: Any) -> bool:
    return hasattr(manager, "load_iteration")


@functools.cache
def _warn_of_modelopt() -> None:
    """Once per process."""
    if compat.uses_modelopt():
        warn_rank_0("Local checkpointing does not support nvidia_modelopt.")


def forget(context: dict[str, Any]) -> None:
    """Local, on every rank. Let the next save find out again which rank keeps what."""
    context.pop(_STRUCTURE, None)


def _structure_of(state_dict: dict[str, Any]) -> list[Any]:
    """The inputs that determine which rank keeps what."""
    return [
        (
            entry.key,
            entry.replica_id,
            getattr(entry, "global_shape", None),
            getattr(entry, "global_offset", None),
            getattr(entry.data, "shape", None),
            getattr(entry.data, "dtype", None),
        )
        for entry in compat.nested_values(state_dict)
        if isinstance(entry, (compat.ShardedTensor, compat.ShardedTensorFactory, compat.ShardedObject))
    ]


def load_local(
    sharded_state_dict: dict[str, Any],
    ckpt_cfg: Any,
    context: dict[str, Any],
    pg_collection: Any,
    iteration: int,
) -> tuple[dict[str, Any], Any]:
    """Collective. (state dict, checkpoint id) of a local checkpoint of the same layout.

    No tensor of the sharded state dict is touched: the state dict has others, for ``load_state_dict``.

    Raises:
        CheckpointCorruptError: on every rank: it is not whole.
        CheckpointMismatchError: on every rank: it lacks what is asked for, or has it in another shape; or a
            tensor to load into is on the meta device.
    """

    def require_all_memory() -> None:
        for entry in compat.nested_values(sharded_state_dict):
            # A plain tensor has ``data``, too, but is replaced, not loaded into.
            if hasattr(entry, "key") and isinstance(entry.data, torch.Tensor):
                require_memory(entry.key, entry.data)

    group = ControlGroup()
    group.agree(require_all_memory)
    manager = context["local_checkpoint_manager"]
    # That of nvidia-resiliency-ext loads its newest.
    local_state_dict, checkpoint_id = (
        manager.load_iteration(iteration) if _is_ours(manager) else manager.load()
    )
    # Megatron-Core only asserts that it is there, after ranks have exchanged tensors.
    group.agree(lambda: _require_fit(local_state_dict, sharded_state_dict, checkpoint_id))
    state_dict = group.agree(
        lambda: local_state_dict.to_state_dict(
            sharded_state_dict,
            algo=ckpt_cfg.non_persistent_local_ckpt_algo,
            parallelization_group=pg_collection.dp_cp,
        )
    )
    return state_dict, checkpoint_id


def _require_fit(local_state_dict: Any, sharded_state_dict: dict[str, Any], checkpoint_id: Any) -> None:
    """Local. Check that a local checkpoint has what is asked for, in the right shapes.

    Raises:
        CheckpointMismatchError: naming some of what does not fit.
    """
    saved = {_place_of(each): each for each in compat.nested_values(local_state_dict.sharded_state_dict)}
    wanted, _, _ = compat.load_preprocess(sharded_state_dict)
    misfits = []
    for entry in compat.nested_values(compat.extract_sharded_base(wanted)[0]):
        found = saved.get(_place_of(entry))
        shapes = [tuple(getattr(each, "local_shape", ())) for each in (entry, found)]
        if found is None:
            misfits.append(f"it has no {entry.key} at {tuple(entry.global_offset)}")
        elif shapes[0] != shapes[1]:
            misfits.append(f"{entry.key} has the shape {shapes[1]} in it, and {shapes[0]} here")
    if misfits:
        more = f" (and {len(misfits) - _MOST_SHOWN} more)" if len(misfits) > _MOST_SHOWN else ""
        raise CheckpointMismatchError(
            f"the local checkpoint {checkpoint_id} does not fit this run: {'; '.join(misfits[:_MOST_SHOWN])}"
            f"{more}. Nothing was loaded. A local checkpoint is for the same model on the same layout; load "
            "a global one."
        )


def _place_of(entry: Any) -> tuple[Any, ...]:
    """What Megatron-Core finds an entry by."""
    if isinstance(entry, compat.ShardedTensor):
        return entry.key, tuple(entry.global_offset), str(entry.flattened_range)
    return entry.key, tuple(entry.global_offset), tuple(entry.global_shape), "object"


def layer_wise_optimizer_path(local_ckpt_dir: str, pg_collection: Any) -> str:
    """The path of a rank's layer-wise optimizer state next to local checkpoints."""
    return os.path.join(local_ckpt_dir, f"layer_wise_optimizer_{pg_collection.dp.rank()}.pt")


def save_layer_wise_optimizer(optimizer: Any | None, local_ckpt_dir: str, pg_collection: Any) -> None:
    """Write the state of a layer-wise optimizer, which a local checkpoint cannot hold; others: nothing."""
    if not is_layer_wise(optimizer) or getattr(optimizer, "is_stub_optimizer", False):
        return
    assert optimizer is not None
    path = layer_wise_optimizer_path(local_ckpt_dir, pg_collection)
    ensure_directory_exists(path)
    optimizer.save_state_dict_to_file(path)


def is_layer_wise(optimizer: Any | None) -> bool:
    """Whether the optimizer keeps whole layers per data-parallel rank."""
    return isinstance(optimizer, compat.LayerWiseDistributedOptimizer)
