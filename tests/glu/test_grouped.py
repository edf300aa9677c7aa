# SPDX-License-Identifier: Apache-2.0
"""Interleaved rows of grouped experts: Megatron-Core's TEGroupedMLP over a linear layer for the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

import ckpt_fast
from ckpt_fast.glu.layout import ContiguousChunk
from ckpt_fast.glu.model import _interleave_glu_tensor
from tests.helpers import run_ranks

K = 2
EXPERTS, ROWS, WIDTH = 4, 16, 6
PREFIX = "decoder.layers.0.mlp.experts."


class GroupedLinear(torch.nn.Module):
    """What a checkpoint sees of Transformer Engine's GroupedLinear, which can be built only on a GPU."""

    def __init__(self, count: int, inputs: int, outputs: int, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.count, self.groups = count, pg_collection
        for number in range(count):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.zeros(outputs, inputs)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return keys and offsets as Transformer Engine's layer in Megatron-Core does."""
        state: dict[str, Any] = {}
        alone = metadata["singleton_local_shards"]
        for number in range(self.count):
            expert = self.groups.ep.rank() * self.count + number
            place = (len(sharded_offsets), expert, self.groups.ep.size() * self.count)
            shards = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{number}")},
                f"{expert}.{prefix}" if alone else prefix,
                {"weight": 0},
                tuple(sharded_offsets) if alone else (*sharded_offsets, place),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            (shard,) = shards.values()
            shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
            state[f"{prefix}weight{number}"] = shard
        return state


def grouped_experts() -> TEGroupedMLP:
    ranks = dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        ffn_hidden_size=ROWS // 2,
        moe_ffn_hidden_size=ROWS // 2,
        num_moe_experts=EXPERTS,
        expert_model_parallel_size=ranks,
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layers: Any = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    return TEGroupedMLP(EXPERTS // ranks, config, layers, pg_collection=groups)


def fill(experts: TEGroupedMLP, rank: int, interleaved: bool) -> None:
    for number in range(experts.num_local_experts):
        expert = rank * experts.num_local_experts + number
        weight = torch.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) + 1000.0 * (expert + 1)
        with torch.no_grad():
            getattr(experts.linear_fc1, f"weight{number}").copy_(
                _interleave_glu_tensor(weight, K) if interleaved else weight
            )


def weights(experts: TEGroupedMLP) -> list[torch.Tensor]:
    return [getattr(experts.linear_fc1, f"weight{n}").detach() for n in range(experts.num_local_experts)]


def save_and_load(rank: int, directory: str, alone: bool) -> dict[str, bool]:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": alone}
    found = {}
    try:
        plain, interleaved = grouped_experts(), grouped_experts()
        fill(plain, rank, False)
        fill(interleaved, rank, True)
        shown = ContiguousChunk(interleaved, (K, None), False).sharded_state_dict(PREFIX, (), metadata)
        dist_checkpointing.save(shown, directory, ckpt_fast.FastSaveStrategy())

        stock = grouped_experts()
        loaded = dist_checkpointing.load(stock.sharded_state_dict(PREFIX, (), metadata), directory)
        stock.load_state_dict({key.removeprefix(PREFIX): value for key, value in loaded.items()})
        found["stock"] = all(map(torch.equal, weights(stock), weights(plain)))

        again = grouped_experts()
        wanted = ContiguousChunk(again, (K, None), True).sharded_state_dict(PREFIX, (), metadata)
        loaded = dist_checkpointing.load(wanted, directory, ckpt_fast.FastLoadStrategy())
        again.load_state_dict({key.removeprefix(PREFIX): value for key, value in loaded.items()})
        found["ours"] = all(map(torch.equal, weights(again), weights(interleaved)))
    finally:
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("alone", [False, True], ids=["one-tensor", "a-tensor-for-each-expert"])
def test_grouped_experts(tmp_path: Path, ranks: int, alone: bool) -> None:
    directory = os.path.join(tmp_path, "saved")
    os.mkdir(directory)
    found = run_ranks(save_and_load, ranks, directory, alone)
    assert found == [{"stock": True, "ours": True}] * ranks
