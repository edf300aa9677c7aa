# SPDX-License-Identifier: Apache-2.0
"""Lightning Fabric with FSDP2. The script knows nothing of ckpt_fast:

    torchrun --nproc-per-node 2 -m ckpt_fast.run examples/frameworks/lightning_fabric.py --directory ckpt

Run it again, and it continues where it stopped. Without ``-m ckpt_fast.run``, torch's own code saves; each
can read the other's checkpoints.
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from tiny import batch, layers, newest, options, report
from torch.distributed.fsdp import fully_shard


def parallelize(model: torch.nn.Module, mesh: object) -> torch.nn.Module:
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def main() -> None:
    arguments = options(__doc__)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(parallelize))
    fabric.launch()
    model = fabric.setup(layers())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))

    state = {"model": model, "optimizer": optimizer, "step": 0}
    if (path := newest(arguments.directory)) is not None:
        model(batch(0)).sum().backward()  # the optimizer gets its moments in a step
        optimizer.step()
        optimizer.zero_grad()
        fabric.load(path, state)
    done = state["step"]
    for step in range(done + 1, done + arguments.steps + 1):
        loss = model(batch(step, fabric.global_rank)).pow(2).mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
        state["step"] = step
        if step % 2 == 0:
            fabric.save(arguments.directory / str(step), state)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
