# SPDX-License-Identifier: Apache-2.0
"""Train an FSDP2 model with plain PyTorch; a CheckpointManager saves, prunes and restores.

    torchrun --nproc-per-node 2 examples/checkpoint_manager.py --directory ckpt

Run it again, on as many ranks as you like, and it continues where it stopped. SIGTERM, which schedulers send
before they end a job, lets all ranks save and stop.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt_fast import CheckpointManager, KeepBest, KeepNewest


def build(device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


class Training:
    """Model and optimizer as ``state_dict`` and ``load_state_dict``, which a manager calls."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.model, self.optimizer = build(device)

    def step(self, number: int) -> float:
        torch.manual_seed(number)
        batch = torch.randn(16, 64).to(self.device)
        loss = (self.model(batch) - batch).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6, help="of this run")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    training = Training(device)
    policies = [KeepNewest(2), KeepBest(1, "loss")]
    with CheckpointManager(
        options.directory, policies=policies, save_every=3, save_on=signal.SIGTERM
    ) as manager:
        start = manager.restore({"training": training}) or 0
        for step in range(start + 1, start + options.steps + 1):
            loss = training.step(step)
            if dist.get_rank() == 0:
                print(f"step {step} loss {loss:.6f}", flush=True)
            if manager.should_save(step):
                manager.save(step, {"training": training}, metrics={"loss": loss})
            if manager.stopping:
                break
    if dist.get_rank() == 0:
        print(manager.wait(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
