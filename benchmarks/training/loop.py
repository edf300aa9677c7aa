# SPDX-License-Identifier: Apache-2.0
"""A training run: the model of examples/train_gpt.py, in bf16 with a distributed Adam."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpt_fast import compat

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
import train_gpt

_ROOT = Path(__file__).resolve().parents[2]
_SEED = 1234


def start() -> torch.device:
    """Join torchrun's process group, or start one of a single rank; return the rank's device."""
    if not dist.is_torchelastic_launched():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return train_gpt.initialize(argparse.Namespace(tensor_model_parallel_size=1, seed=_SEED))


class Loop:
    """A training run that can be continued step by step.

    Args:
        layers, hidden_size: the model's shape.
        device: where ``start`` has put this rank.

    Attributes:
        args: the settings of examples/train_gpt.py.
        steps: taken so far. The first is taken at once, so that the optimizer has its state.
    """

    def __init__(self, layers: int, hidden_size: int, device: torch.device) -> None:
        self.args = argparse.Namespace(
            num_layers=layers,
            hidden_size=hidden_size,
            ffn_hidden_size=2 * hidden_size,
            num_attention_heads=2,
            seq_length=16,
            micro_batch_size=1,
            dropout=0.0,
            bf16=True,
            use_distributed_optimizer=True,
            tensor_model_parallel_size=1,
            seed=_SEED,
            lr=1e-3,
            train_iters=10**6,
            text=_ROOT / "LICENSE",
            save=None,
            load=None,
            save_interval=1,
            async_save=True,
        )
        self.device = device
        self.model = train_gpt.build_model(self.args, device)
        self.optimizer, self.scheduler = train_gpt.build_optimizer(self.args, self.model)
        self._text = train_gpt.ByteText(self.args.text, self.args.seq_length, _SEED)
        self.steps = 0
        self.step()

    def step(self) -> float:
        """Train one step; returns the seconds it took."""
        begin = time.perf_counter()
        batch = self._text.batch(self.steps, self.args.micro_batch_size)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        train_gpt.train_step(self.args, self.model, self.optimizer, self.scheduler, batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps += 1
        return time.perf_counter() - begin

    def sharded_state_dict(self) -> dict[str, Any]:
        """Build what a user of Megatron-Core passes to ``dist_checkpointing.save``."""
        metadata = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
        model = compat.unwrap_model(self.model)[0].sharded_state_dict(metadata=metadata)
        return {
            "iteration": self.steps,
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict({"model": model}, metadata=metadata),
            "opt_param_scheduler": self.scheduler.state_dict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Build what a user of torch passes to ``dcp.async_save``: the state dicts of model and torch's Adam.

        Each rank's Adam has its part of the parameters, by number. The master weights are its parameters,
        of which its state dict has the numbers only.
        """
        return {
            "iteration": self.steps,
            "model": compat.unwrap_model(self.model)[0].state_dict(),
            f"optimizer.{dist.get_rank()}": {
                str(number): {**adam.state_dict(), "master": dict(enumerate(_parameters(adam)))}
                for number, adam in enumerate(self._adams())
            },
            "scheduler": self.scheduler.state_dict(),
        }

    def tensors(self) -> list[torch.Tensor]:
        """Return this rank's tensors: its share of the optimizer, and on rank 0 the model."""
        found = [] if dist.get_rank() else [p.detach() for p in self.model[0].parameters()]
        for adam in self._adams():
            found += _parameters(adam)
            values = [value for state in adam.state.values() for value in state.values()]
            found += [value for value in values if torch.is_tensor(value)]
        return found

    def _adams(self) -> list[torch.optim.Optimizer]:
        members = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [member.optimizer for member in members]

    @property
    def nbytes(self) -> int:
        """Collective. Bytes of all ranks' tensors, as they are saved."""
        return self._totals()[1]

    def describe(self) -> str:
        """Collective. The model's shape and size, in words."""
        count, nbytes = self._totals()
        return (
            f"GPT of {self.args.num_layers} layers of {self.args.hidden_size}, bf16 with Adam: "
            f"{count} tensors, {nbytes / 1e6:.0f} MB"
        )

    def _totals(self) -> tuple[int, int]:
        tensors = self.tensors()
        totals = torch.tensor([len(tensors), sum(tensor.nbytes for tensor in tensors)])
        dist.all_reduce(totals)
        return int(totals[0]), int(totals[1])


def _parameters(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter.detach() for group in adam.param_groups for parameter in group["params"]]
