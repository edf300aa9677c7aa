# SPDX-License-Identifier: Apache-2.0
"""The row order of gated MLP weights: interleaved at run time, contiguous in a checkpoint.

Dim 0 of a gated ``linear_fc1`` weight or bias holds F gate rows W and F up rows V. *Contiguous* order is
[W, V]; *interleaved* order is [W0:k, V0:k, Wk:2k, Vk:2k, ...] with interleave size k. Each tensor-parallel
rank orders the rows it holds.

These functions reorder copies. What ``save_checkpoint`` and ``load_checkpoint`` do instead, without copies,
is in ``glu_layout``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.factory import require_whole_pairs
from ckpt_fast.glu.rows import RowMoves, permute_rows, require_pairs
from ckpt_fast.ranks.world import note_rank_0


def _interleave_glu_tensor(tensor: torch.Tensor, interleave_size: int) -> torch.Tensor:
    """Reorder dim 0 of an fc1 weight or bias from [W, V] to blocks [W0:k, V0:k, Wk:2k, Vk:2k, ...].

    Args:
        tensor: any dtype, device and strides; not modified.
        interleave_size: k.

    Returns:
        A new contiguous tensor of the same shape, dtype and device that shares no memory with ``tensor``
        and needs no gradient.

    Raises:
        CheckpointMismatchError: dim 0 is no multiple of 2k (also a RuntimeError), the tensor has no
            dimensions (also an IndexError), or k < 1.
    """
    return permute_rows(tensor, interleave_size, interleave=True, name="GLU tensor")


def _deinterleave_glu_tensor(tensor: torch.Tensor, interleave_size: int) -> torch.Tensor:
    """Reorder dim 0 of an fc1 weight or bias from blocks back to [W, V]: ``_interleave_glu_tensor`` undone.

    Arguments, result and errors are those of ``_interleave_glu_tensor``.
    """
    return permute_rows(tensor, interleave_size, interleave=False, name="GLU tensor")


def _apply_glu_interleave_to_tensor_data(
    tensor: torch.Tensor, interleave_size: int, interleave: bool
) -> torch.Tensor:
    """``_interleave_glu_tensor`` if ``interleave``, otherwise ``_deinterleave_glu_tensor``."""
    if interleave:
        return _interleave_glu_tensor(tensor, interleave_size)
    return _deinterleave_glu_tensor(tensor, interleave_size)


def _is_swiglu_fc1_checkpoint_key(
    key: str,
    *,
    include_routed_experts: bool = True,
    include_shared_experts: bool = False,
    include_dense: bool = True,
) -> bool:
    """Whether a state dict key names a fc1 weight or bias of a selected kind of MLP.

    Dense MLPs count only while ``USE_ACT_FUSION_FOR_DENSE=1``. Numbered weights of grouped experts
    (``linear_fc1.weight7``) are included, extra states, layer norms and adapters are not.
    """
    if "linear_fc1.weight" not in key and "linear_fc1.bias" not in key:
        return False
    if "shared_experts" in key:
        return include_shared_experts
    if "experts" in key:
        return include_routed_experts
    return include_dense and "mlp" in key and os.environ.get("USE_ACT_FUSION_FOR_DENSE") == "1"


def _process_state_dict_for_glu_interleaving(
    model_state_dict: dict[str, Any],
    interleave_size: int,
    interleave: bool = True,
    use_megatron_fsdp: bool = False,
    include_routed_experts: bool = True,
    include_shared_experts: bool = False,
    include_dense: bool = True,
) -> dict[str, Any]:
    """Reorder the rows of every selected fc1 weight and bias of a model state dict.

    Tensors, ShardedTensors, lists of ShardedTensors (an expanded factory), ShardedTensorFactories and
    ShardedObjects that hold a tensor are covered; those without data and all other values pass unchanged.

    Args:
        model_state_dict: one model chunk's (sharded) state dict; not modified. Anything but a dict is
            returned as it is.
        interleave: from contiguous to interleaved (loading) if True, otherwise back (saving).
        use_megatron_fsdp: selected values are DTensors of Megatron FSDP, unevenly cut along dim 0. Every
            rank of their mesh must call; the full tensor is gathered, reordered and cut again.

    Returns:
        A new dict in sorted key order.

    Raises:
        CheckpointMismatchError: as ``_interleave_glu_tensor``, naming the key.
        RuntimeError: ``use_megatron_fsdp`` without Megatron FSDP.
    """
    if not isinstance(model_state_dict, dict):
        return model_state_dict  # type: ignore[unreachable]  # callers need not look first
    if use_megatron_fsdp:
        _describe_uneven_shards(model_state_dict)
    processed: dict[str, Any] = {}
    moves, count = RowMoves(), 0
    # Sorted, so that the collectives of Megatron FSDP meet their like on the other ranks.
    for key in sorted(model_state_dict):
        value = processed[key] = model_state_dict[key]
        if not _is_swiglu_fc1_checkpoint_key(
            key,
            include_routed_experts=include_routed_experts,
            include_shared_experts=include_shared_experts,
            include_dense=include_dense,
        ):
            continue
        if use_megatron_fsdp:
            processed[key] = _permute_megatron_fsdp(key, value, interleave_size, interleave)
        else:
            processed[key] = _add_value(moves, key, value, interleave_size, interleave)
        count += processed[key] is not value
    moves.run()
    if count:
        verb = "interleaved" if interleave else "de-interleaved"
        note_rank_0(f"GLU rows: {verb} {count} fc1 weights and biases (interleave size {interleave_size})")
    return processed


def _get_model_glu_interleave_sizes(model: list[Any], cfg: Any) -> tuple[int | None, int | None]:
    """The active interleave sizes: (routed experts and dense MLPs, shared experts), None where off.

    The first model chunk's own configuration is asked, ``cfg.model`` where it has none.
    """
    model_config = getattr(cfg, "model", None)
    if model:
        # A chunk without a configuration (a stand-in, a wrapper unknown to Megatron) is no failure.
        with contextlib.suppress(Exception):
            model_config = compat.get_model_config(model[0])
    return (
        getattr(model_config, "moe_mlp_glu_interleave_size", None),
        getattr(model_config, "moe_shared_expert_glu_interleave_size", None),
    )


def _process_state_dict_for_model_glu_interleaving(
    model_state_dict: dict[str, Any],
    routed_interleave_size: int | None,
    shared_interleave_size: int | None,
    interleave: bool = True,
    use_megatron_fsdp: bool = False,
) -> dict[str, Any]:
    """Reorder the fc1 rows of each kind of MLP that has an interleave size.

    Dense MLPs go by the size of the routed experts. With both sizes None the input itself is returned;
    otherwise see ``_process_state_dict_for_glu_interleaving``.
    """
    if routed_interleave_size is not None and routed_interleave_size == shared_interleave_size:
        return _process_state_dict_for_glu_interleaving(
            model_state_dict,
            routed_interleave_size,
            interleave,
            use_megatron_fsdp,
            include_shared_experts=True,
        )
    if routed_interleave_size is not None:
        model_state_dict = _process_state_dict_for_glu_interleaving(
            model_state_dict, routed_interleave_size, interleave, use_megatron_fsdp
        )
    if shared_interleave_size is not None:
        model_state_dict = _process_state_dict_for_glu_interleaving(
            model_state_dict,
            shared_interleave_size,
            interleave,
            use_megatron_fsdp,
            include_routed_experts=False,
            include_shared_experts=True,
            include_dense=False,
        )
    return model_state_dict


def permute_value(key: str, value: Any, interleave_size: int, interleave: bool) -> Any:
    """A state dict value with its rows reordered; the value itself where it has no rows to reorder."""
    moves = RowMoves()
    permuted = _add_value(moves, key, value, interleave_size, interleave)
    moves.run()
    return permuted


def _add_value(moves: RowMoves, key: str, value: Any, interleave_size: int, interleave: bool) -> Any:
    """``permute_value`` as far as it can be done before ``moves.run``."""
    if isinstance(value, list):
        return _add_expanded_factory(moves, key, value, interleave_size, interleave)
    if isinstance(value, torch.Tensor):
        return moves.add(value, interleave_size, interleave, key)
    sharded = (compat.ShardedTensor, compat.ShardedObject, compat.ShardedTensorFactory)
    if not isinstance(value, sharded) or not isinstance(value.data, torch.Tensor):
        return value
    if isinstance(value, compat.ShardedTensorFactory):
        require_whole_pairs(key, value)
    return dataclasses.replace(value, data=moves.add(value.data, interleave_size, interleave, key))


def _add_expanded_factory(
    moves: RowMoves, key: str, shards: list[Any], interleave_size: int, interleave: bool
) -> Any:
    """The rows of shards that lie behind each other in one tensor, reordered across all of them."""
    if not shards or not all(
        isinstance(shard, compat.ShardedTensor) and shard.data is not None for shard in shards
    ):
        return shards
    rows = moves.add(torch.cat([shard.data for shard in shards]), interleave_size, interleave, key)
    pieces = torch.split(rows, [shard.data.shape[0] for shard in shards])
    return [dataclasses.replace(shard, data=piece) for shard, piece in zip(shards, pieces, strict=True)]


def _describe_uneven_shards(model_state_dict: dict[str, Any]) -> None:
    """Attach to every DTensor the position of its piece in the full tensor (collective)."""
    if compat.preprocess_state_dict_for_uneven_dtensor is None:
        raise RuntimeError("use_megatron_fsdp needs Megatron FSDP, which this Megatron-Core does not have")
    compat.preprocess_state_dict_for_uneven_dtensor(model_state_dict)


def _permute_megatron_fsdp(key: str, value: Any, interleave_size: int, interleave: bool) -> DTensor:
    """A DTensor of Megatron FSDP with its rows reordered over the whole mesh (collective)."""
    require_pairs(value, interleave_size, key)
    chunk = value._local_tensor.__create_chunk_list__()[0]
    piece = tuple(slice(start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
    permuted = permute_rows(_gather_pieces(key, value, piece), interleave_size, interleave, key)
    return DTensor.from_local(
        permuted[piece].clone(),  # a view would keep the full tensor alive
        device_mesh=value.device_mesh,
        placements=value.placements,
        shape=value.shape,
        stride=value.stride(),
    )


def _gather_pieces(key: str, value: DTensor, mine: tuple[slice, ...]) -> torch.Tensor:
    """The full tensor on every rank, from pieces of any sizes (collective over the sharded mesh dims).

    Megatron-Core's own function needs a backend whose all-gather takes tensors of different sizes.
    """
    places, data = [mine], value._local_tensor.detach().flatten()
    for dim, placement in enumerate(value.placements):
        if placement.is_replicate():
            continue
        group = value.device_mesh.get_group(dim)
        places_of_ranks: list[Any] = [None] * group.size()
        dist.all_gather_object(places_of_ranks, places, group=group)
        counts = [sum(map(_elements, of_rank)) for of_rank in places_of_ranks]
        padded = torch.nn.functional.pad(data, (0, max(counts) - data.numel()))
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded, group=group)
        data = torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])
        places = [place for of_rank in places_of_ranks for place in of_rank]
    if data.numel() != value.numel():
        raise CheckpointMismatchError(
            f"{key}: the ranks' pieces have {data.numel()} elements, but shape {tuple(value.shape)} has "
            f"{value.numel()}; the placements {value.placements} do not describe how it was cut"
        )
    full = data.new_empty(value.shape)
    for place, part in zip(places, torch.split(data, list(map(_elements, places))), strict=True):
        full[place] = part.view(full[place].shape)
    return full


def _elements(place: tuple[slice, ...]) -> int:
    return math.prod(dim.stop - dim.start for dim in place)
