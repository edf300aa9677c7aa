# SPDX-License-Identifier: Apache-2.0
"""TorchTitan's CheckpointManager, with its three modes of saving.

    torchrun --nproc-per-node 2 -m ckpt_fast.run examples/frameworks/torchtitan_manager.py --directory ckpt

The script knows nothing of ckpt_fast. ``--background`` chooses ``async_with_pinned_mem``, which needs a GPU
without ckpt_fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from tiny import options, report, sharded, train_step
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torchtitan.components.checkpointer.dcp import CheckpointManager


class Part:
    """A part of the state, as the manager wants it."""

    def __init__(self, read: Any, write: Any) -> None:
        self.state_dict, self.load_state_dict = read, write


def main() -> None:
    arguments = options(__doc__)
    dist.init_process_group("gloo")
    model, optimizer = sharded()
    progress = {"step": torch.tensor(0)}
    manager = CheckpointManager(
        CheckpointManager.Config(
            enable=True,
            folder=arguments.directory.name,
            interval=2,
            async_mode="async_with_pinned_mem" if arguments.background else "disabled",
            last_save_model_only=False,
        ),
        dataloader=Part(dict, lambda _: None),
        model_parts=[model],
        optimizers=Part(
            lambda: get_optimizer_state_dict(model, optimizer),
            lambda state: set_optimizer_state_dict(model, optimizer, state),
        ),
        lr_schedulers=Part(dict, lambda _: None),
        states={"train_state": Part(lambda: progress, progress.update)},
        sd_adapter=None,
        base_folder=str(arguments.directory.parent),
    )
    manager.load()
    first = int(progress["step"]) + 1
    for step in range(first, first + arguments.steps):
        manager.maybe_wait_for_staging()
        report(step, train_step(model, optimizer, step))
        progress["step"].fill_(step)
        manager.save(step)
    manager.maybe_wait_for_saving()
    manager.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
