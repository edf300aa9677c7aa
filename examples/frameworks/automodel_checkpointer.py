# SPDX-License-Identifier: Apache-2.0
"""NeMo Automodel's Checkpointer, saving with DCP (``model_save_format="torch_save"``).

    torchrun --nproc-per-node 2 -m ckpt_fast.run \\
        examples/frameworks/automodel_checkpointer.py --directory ckpt

The script knows nothing of ckpt_fast. ``--background`` chooses ``is_async``, which needs a GPU without
ckpt_fast.
"""

from __future__ import annotations

import torch.distributed as dist
from nemo_automodel.components.checkpoint.checkpointing import Checkpointer
from nemo_automodel.components.checkpoint.config import CheckpointingConfig
from tiny import newest, options, report, sharded, train_step


def main() -> None:
    arguments = options(__doc__)
    dist.init_process_group("gloo")
    model, optimizer = sharded()
    config = CheckpointingConfig(
        checkpoint_dir=arguments.directory,
        model_save_format="torch_save",
        model_repo_id="none",
        save_consolidated=False,
        is_async=arguments.background,
    )
    checkpointer = Checkpointer(config, dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0)
    done = 0
    if (path := newest(arguments.directory)) is not None:
        checkpointer.load_model(model, str(path / "model"))
        checkpointer.load_optimizer(optimizer, model, str(path))
        done = int(path.stem)
    for step in range(done + 1, done + arguments.steps + 1):
        checkpointer.maybe_wait_for_staging()
        report(step, train_step(model, optimizer, step))
        if step % 2 == 0:
            checkpointer.async_wait()  # for the one before
            path = arguments.directory / str(step)
            checkpointer.save_model(model, str(path))
            checkpointer.save_optimizer(optimizer, model, str(path))
    checkpointer.async_wait()
    checkpointer.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
