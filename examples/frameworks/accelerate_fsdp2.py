# SPDX-License-Identifier: Apache-2.0
"""Accelerate's checkpoints of FSDP2, as ``Accelerator.save_state`` and transformers' Trainer make them.

    torchrun --nproc-per-node 2 -m ckpt_fast.run examples/frameworks/accelerate_fsdp2.py --directory ckpt

The script knows nothing of ckpt_fast. Accelerate shards only on accelerators; so that this runs on a CPU, the
model is sharded here, and its functions for checkpoints are called directly.
"""

from __future__ import annotations

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp_utils
from tiny import newest, options, report, sharded, train_step


def main() -> None:
    arguments = options(__doc__)
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    model, optimizer = sharded()
    done = 0
    if (path := newest(arguments.directory)) is not None:
        fsdp_utils.load_fsdp_model(plugin, accelerator, model, path)
        fsdp_utils.load_fsdp_optimizer(plugin, accelerator, optimizer, model, path)
        done = int(path.stem)
    for step in range(done + 1, done + arguments.steps + 1):
        report(step, train_step(model, optimizer, step))
        if step % 2 == 0:
            path = arguments.directory / str(step)
            fsdp_utils.save_fsdp_model(plugin, accelerator, model, path)
            fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, model, path)
    accelerator.end_training()


if __name__ == "__main__":
    main()
