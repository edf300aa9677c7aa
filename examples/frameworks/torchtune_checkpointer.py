# SPDX-License-Identifier: Apache-2.0
"""torchtune's DistributedCheckpointer, as its distributed recipes use it.

    torchrun --nproc-per-node 2 -m ckpt_fast.run \\
        examples/frameworks/torchtune_checkpointer.py --directory ckpt

The script knows nothing of ckpt_fast. ``--background`` saves with ``save_async``.
"""

from __future__ import annotations

import torch.distributed as dist
from tiny import options, report, sharded, train_step
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torchtune.training.checkpointing import DistributedCheckpointer


def main() -> None:
    arguments = options(__doc__)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    model, optimizer = sharded()
    checkpointer = DistributedCheckpointer(
        checkpoint_dir=str(arguments.directory),
        output_dir=str(arguments.directory),
        process_group=dist.new_group(backend="gloo"),
    )
    done = 0
    if any(arguments.directory.rglob(".metadata")):
        weights, moments = get_state_dict(model, optimizer)
        state = checkpointer.load_checkpoint({"model": weights, "optimizer": moments, "steps_run": 0})
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        done = state["steps_run"]
    for step in range(done + 1, done + arguments.steps + 1):
        report(step, train_step(model, optimizer, step))
        if step % 2 == 0:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "steps_run": step}
            checkpointer.save_checkpoint(state, epoch=step, save_async=arguments.background)
    if checkpointer._checkpoint_future is not None:
        checkpointer._checkpoint_future.result()  # a recipe's last save is not asynchronous
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
