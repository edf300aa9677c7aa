# SPDX-License-Identifier: Apache-2.0
"""GLU rows of tensors that several ranks hold: tensor-parallel MLPs, DTensors, Megatron FSDP. Over gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.model import (
    _deinterleave_glu_tensor,
    _interleave_glu_tensor,
    _process_state_dict_for_glu_interleaving,
)
from tests.helpers import run_ranks

EXPERT = "decoder.layers.0.mlp.experts.local_experts.0."
WEIGHT = EXPERT + "linear_fc1.weight"
BIAS = EXPERT + "linear_fc1.bias"
K = 2


@contextlib.contextmanager
def gated_mlp_state(rank: int) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """Build a real tensor-parallel gated MLP whose fc1 rows are in run-time order.

    Yields:
        (state dict, the global contiguous weight, this rank's weight as it is in memory).
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    world_size = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=4,
        num_attention_heads=2,
        ffn_hidden_size=8,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=world_size,
    )
    mlp = MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    gate_and_up = torch.arange(16 * 4.0).reshape(2, world_size, 8 // world_size, 4)
    mine = _interleave_glu_tensor(gate_and_up[:, rank].reshape(-1, 4), K)
    with torch.no_grad():
        mlp.linear_fc1.weight.copy_(mine)
        mlp.linear_fc1.bias.copy_(mine[:, 0])
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = mlp.sharded_state_dict(prefix=EXPERT, metadata={"dp_cp_group": group})
    try:
        yield state, gate_and_up.reshape(16, 4), mine
    finally:
        parallel_state.destroy_model_parallel()


def stored_tensor(shards: list[Any], like: torch.Tensor) -> torch.Tensor:
    """Return the checkpoint's tensor after every rank has written its shards."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [(shard.global_slice(), shard.data) for shard in shards])
    stored = torch.full_like(like, -1.0)
    for parts in everywhere:
        for place, data in parts:
            stored[place] = data
    return stored


def tensor_parallel_mlp(rank: int) -> None:
    with gated_mlp_state(rank) as (state, whole, mine):
        assert isinstance(state[WEIGHT], compat.ShardedTensorFactory)
        saved = _process_state_dict_for_glu_interleaving(state, K, interleave=False)
        assert torch.equal(state[WEIGHT].data, mine)
        factory = saved[WEIGHT]
        compat.apply_factories(saved)
        assert torch.equal(stored_tensor(saved[WEIGHT], whole), whole)
        assert torch.equal(stored_tensor(saved[BIAS], whole[:, 0]), whole[:, 0])

        # What a load returns: the stored shards, merged by the same factory, in run-time order.
        read = {WEIGHT: [shard.data.clone() for shard in saved[WEIGHT]]}
        merged = compat.apply_factory_merges(read, {WEIGHT: factory})
        loaded = _process_state_dict_for_glu_interleaving(merged, K, interleave=True)
        assert torch.equal(loaded[WEIGHT], mine)


def low_memory_save(rank: int) -> None:
    """Expand factories before the rows are reordered: the shards are the same as with the opposite order."""
    with gated_mlp_state(rank) as (state, _, _):
        late = _process_state_dict_for_glu_interleaving(state, K, interleave=False)
        compat.apply_factories(late)
        compat.apply_factories(state)
        early = _process_state_dict_for_glu_interleaving(state, K, interleave=False)
        for expected, shard in zip(late[WEIGHT], early[WEIGHT], strict=True):
            assert torch.equal(shard.data, expected.data)
            assert shard.global_slice() == expected.global_slice()
            assert shard.global_shape == expected.global_shape


# Rows of each rank. Megatron FSDP splits a buffer of many weights, so some ranks get none of one.
CUTS = {1: ([12],), 2: ([6, 6], [7, 5], [12, 0]), 3: ([5, 0, 7], [1, 10, 1])}


def fsdp_dtensor(whole: torch.Tensor, rank: int, cut: list[int]) -> DTensor:
    """Shard rows as Megatron FSDP does, along one dimension of a mesh that also replicates."""
    mesh = init_device_mesh("cpu", (1, len(cut)), mesh_dim_names=("outer", "dp"))
    piece = whole.split(cut)[rank].clone()
    placements = [Replicate(), Shard(0)]
    return DTensor.from_local(piece, mesh, placements, shape=whole.shape, stride=whole.stride())


def megatron_fsdp(rank: int) -> None:
    for cut in CUTS[dist.get_world_size()]:
        for dtype in (torch.float32, torch.bfloat16):
            permuted_pieces(rank, cut, dtype)


def permuted_pieces(rank: int, cut: list[int], dtype: torch.dtype) -> None:
    whole = torch.arange(12 * 3).reshape(12, 3).to(dtype)
    other = torch.ones(2)
    for interleave, permute in ((True, _interleave_glu_tensor), (False, _deinterleave_glu_tensor)):
        value = fsdp_dtensor(whole, rank, cut)
        state = {WEIGHT: value, "other": other}
        result = _process_state_dict_for_glu_interleaving(state, 3, interleave, use_megatron_fsdp=True)
        assert list(result) == [WEIGHT, "other"] and result["other"] is other
        new = result[WEIGHT]
        expected = fsdp_dtensor(permute(whole, 3), rank, cut)
        assert torch.equal(new.to_local(), expected.to_local())
        assert new.to_local().untyped_storage().nbytes() == new.to_local().nbytes
        assert (new.shape, new.stride(), new.placements) == (value.shape, value.stride(), value.placements)
        assert new.device_mesh == value.device_mesh
        assert torch.equal(value.to_local(), fsdp_dtensor(whole, rank, cut).to_local())


def megatron_fsdp_rejects_unpaired_rows(rank: int) -> None:
    value = fsdp_dtensor(torch.zeros(12, 3), rank, CUTS[dist.get_world_size()][0])
    with pytest.raises(CheckpointMismatchError, match=r"linear_fc1.weight.*\(12, 3\).*size 4"):
        _process_state_dict_for_glu_interleaving({WEIGHT: value}, 4, use_megatron_fsdp=True)


def plain_dtensors(rank: int) -> None:
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(16 * 4.0).reshape(16, 4)
    for placement in (Replicate(), Shard(0), Shard(1)):
        value = DTensor.from_local(
            whole if placement.is_replicate() else whole.chunk(world_size, placement.dim)[rank].contiguous(),
            mesh,
            [placement],
        )
        result = _process_state_dict_for_glu_interleaving({WEIGHT: value}, 4)[WEIGHT]
        assert isinstance(result, DTensor)
        assert torch.equal(result.full_tensor(), _interleave_glu_tensor(whole, 4))
        assert torch.equal(value.full_tensor(), whole)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("check", [tensor_parallel_mlp, low_memory_save, plain_dtensors])
def test_ranks(check: Callable[[int], None], world_size: int) -> None:
    run_ranks(check, world_size)


@pytest.mark.skipif(
    compat.preprocess_state_dict_for_uneven_dtensor is None,
    reason="this Megatron-Core has no Megatron FSDP",
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("check", [megatron_fsdp, megatron_fsdp_rejects_unpaired_rows])
def test_megatron_fsdp_ranks(check: Callable[[int], None], world_size: int) -> None:
    run_ranks(check, world_size)
