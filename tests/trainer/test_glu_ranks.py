# SPDX-License-Identifier: Apache-2.0
"""GLU rows of tensors that several ranks hold: tensor-parallel MLPs, DTensors, Megatron FSDP. Over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ckpt_fast import megatron
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.trainer.glu import (
    _deinterleave_glu_tensor,
    _interleave_glu_tensor,
    _process_state_dict_for_glu_interleaving,
)

EXPERT = "decoder.layers.0.mlp.experts.local_experts.0."
WEIGHT = EXPERT + "linear_fc1.weight"
K = 2


def start(rank: int, workers: list[Callable[[int, int], None]], world_size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for worker in workers:
        worker(rank, world_size)
    dist.barrier()
    # A gloo thread may still let go of a collective's tensors, which aborts an interpreter that is ending.
    os._exit(0)


def gated_mlp_state(rank: int, world_size: int) -> tuple[dict[str, object], torch.Tensor, torch.Tensor]:
    """The sharded state dict of a real tensor-parallel gated MLP whose fc1 rows are in run-time order.

    Returns:
        (state dict, the global contiguous weight, this rank's weight as it is in memory).
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

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
    return state, gate_and_up.reshape(16, 4), mine


def tensor_parallel_mlp(rank: int, world_size: int) -> None:
    from megatron.core import parallel_state

    state, whole, mine = gated_mlp_state(rank, world_size)
    assert isinstance(state[WEIGHT], megatron.ShardedTensorFactory)
    saved = _process_state_dict_for_glu_interleaving(state, K, interleave=False)
    assert torch.equal(state[WEIGHT].data, mine)
    factories = dict(saved)
    megatron.apply_factories(saved)

    for name, expected in (("weight", whole), ("bias", whole[:, 0])):
        shards = saved[f"{EXPERT}linear_fc1.{name}"]
        parts = [(shard.global_slice(), shard.data) for shard in shards]
        everywhere: list[object] = [None] * world_size
        dist.all_gather_object(everywhere, parts)
        stored = torch.full_like(expected, -1.0)
        for place, data in (part for parts in everywhere for part in parts):  # type: ignore[attr-defined]
            stored[place] = data
        assert torch.equal(stored, expected), "the checkpoint does not hold [W, V]"

    # What a load gives back: the stored shards, merged by the same factory, brought into run-time order.
    merged = megatron.apply_factory_merges(
        {WEIGHT: [shard.data.clone() for shard in saved[WEIGHT]]}, {WEIGHT: factories[WEIGHT]}
    )
    loaded = _process_state_dict_for_glu_interleaving(merged, K, interleave=True)
    assert torch.equal(loaded[WEIGHT], mine)
    parallel_state.destroy_model_parallel()


def low_memory_save(rank: int, world_size: int) -> None:
    """Factories expanded before the rows are reordered give the same shards as factories reordered first."""
    from megatron.core import parallel_state

    state, _, _ = gated_mlp_state(rank, world_size)
    late = _process_state_dict_for_glu_interleaving(state, K, interleave=False)
    megatron.apply_factories(late)
    megatron.apply_factories(state)
    early = _process_state_dict_for_glu_interleaving(state, K, interleave=False)
    for expected, shard in zip(late[WEIGHT], early[WEIGHT], strict=True):
        assert torch.equal(shard.data, expected.data)
        assert (shard.global_offset, shard.global_shape) == (expected.global_offset, expected.global_shape)
    parallel_state.destroy_model_parallel()


def fsdp_dtensor(whole: torch.Tensor, rank: int, world_size: int) -> DTensor:
    """Rows dealt out as Megatron FSDP does, but in equal parts: gloo's all_gather takes no others."""
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    piece = whole.chunk(world_size)[rank].clone()
    return DTensor.from_local(piece, mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())


def megatron_fsdp(rank: int, world_size: int) -> None:
    whole = torch.arange(12 * 3.0).reshape(12, 3)
    other = torch.ones(2)
    for interleave, permute in ((True, _interleave_glu_tensor), (False, _deinterleave_glu_tensor)):
        value = fsdp_dtensor(whole, rank, world_size)
        state = {WEIGHT: value, "other": other}
        result = _process_state_dict_for_glu_interleaving(state, 3, interleave, use_megatron_fsdp=True)
        assert list(result) == [WEIGHT, "other"] and result["other"] is other
        new = result[WEIGHT]
        expected = fsdp_dtensor(permute(whole, 3), rank, world_size)
        assert torch.equal(new.to_local(), expected.to_local())
        assert new.to_local().untyped_storage().nbytes() == new.to_local().nbytes
        assert (new.shape, new.stride(), new.placements) == (value.shape, value.stride(), value.placements)
        assert new.device_mesh == value.device_mesh
        assert torch.equal(value.to_local(), fsdp_dtensor(whole, rank, world_size).to_local())


def megatron_fsdp_rejects_unpaired_rows(rank: int, world_size: int) -> None:
    value = fsdp_dtensor(torch.zeros(12, 3), rank, world_size)
    with pytest.raises(CheckpointMismatchError, match=r"linear_fc1.weight.*\(12, 3\).*size 4"):
        _process_state_dict_for_glu_interleaving({WEIGHT: value}, 4, use_megatron_fsdp=True)


def plain_dtensors(rank: int, world_size: int) -> None:
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
def test_ranks(world_size: int, tmp_path: Path) -> None:
    # One set of processes for all: starting them takes longer than what they do.
    workers = [tensor_parallel_mlp, low_memory_save, plain_dtensors]
    if megatron.gather_uneven_dtensor_to_full_tensor is not None:
        workers += [megatron_fsdp, megatron_fsdp_rejects_unpaired_rows]
    arguments = (workers, world_size, str(tmp_path / "store"))
    torch.multiprocessing.spawn(start, args=arguments, nprocs=world_size)
