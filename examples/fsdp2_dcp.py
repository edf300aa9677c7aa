# SPDX-License-Identifier: Apache-2.0
"""Train an FSDP2 model with plain PyTorch; ckpt_fast saves and loads it through torch DCP.

    torchrun --nproc-per-node 2 examples/fsdp2_dcp.py --directory ckpt

Run it again, and it continues where it stopped. The only differences from plain torch are the two classes
passed to ``dcp.async_save`` and ``dcp.load``; ``dcp.FileSystemReader`` can read the files too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt_fast import FastLoadPlanner, FastSavePlanner, FastStorageReader, FastStorageWriter


def build(device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into the model and optimizer; return its step, or 0 if there is none."""
    steps = [int(path.parent.name) for path in directory.glob("*/.metadata")]
    if not steps:
        return 0
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    reader = FastStorageReader(directory / str(max(steps)))
    dcp.load(state, storage_reader=reader, planner=FastLoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return max(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6, help="of this run")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    background = dist.new_group(backend="gloo")  # training's own group is in use while a save is in flight
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    model, optimizer = build(device)
    start = load(options.directory, model, optimizer)
    saving = None
    for step in range(start + 1, start + options.steps + 1):
        torch.manual_seed(step)
        batch = torch.randn(16, 64).to(device)
        loss = (model(batch) - batch).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss.item():.6f}", flush=True)
        if step % 3 == 0:
            if saving is not None:
                saving.result()  # waits for the previous save, and raises if it failed
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            writer = FastStorageWriter(options.directory / str(step))
            saving = dcp.async_save(
                state, storage_writer=writer, planner=FastSavePlanner(), process_group=background
            )
    if saving is not None:
        saving.result()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
