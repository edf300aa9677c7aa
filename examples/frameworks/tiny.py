# SPDX-License-Identifier: Apache-2.0
"""What the examples for frameworks have in common: a small model, its data, and where its checkpoints are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WIDTH = 24


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="of the run's checkpoints")
    parser.add_argument("--steps", type=int, default=4, help="of this run; it saves every second one")
    parser.add_argument("--background", action="store_true", help="save in the background, where one can")
    return parser.parse_args()


def layers() -> nn.Sequential:
    """Return a model, the same on every rank."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 37), nn.GELU(), nn.Linear(37, WIDTH), nn.LayerNorm(WIDTH))


def batch(step: int, rank: int = 0) -> torch.Tensor:
    """Return what a rank trains on in a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, WIDTH, generator=generator)


def newest(directory: Path) -> Path | None:
    """Return the newest of the checkpoints, which have their steps as names."""
    found = [path for path in directory.glob("*") if path.stem.isdigit() and any(path.rglob(".metadata"))]
    return max(found, key=lambda path: int(path.stem), default=None)


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model under FSDP2, and its optimizer, which has taken a step: its moments are there."""
    model = layers()
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train_step(model, optimizer, 0)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    """Take a step; returns this rank's loss."""
    loss = model(batch(step, dist.get_rank())).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def report(step: int, loss: Any) -> None:
    """Print a rank's loss with all its digits."""
    print(f"rank {dist.get_rank()} step {step} loss {float(loss):.9e}", flush=True)
