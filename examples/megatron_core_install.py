# SPDX-License-Identifier: Apache-2.0
"""A loop in the style of Megatron-LM, which builds Megatron-Core's strategies itself, made fast by one line.

    torchrun --nproc-per-node 2 examples/megatron_core_install.py --directory ckpt

Run it again, and it continues where it stopped. Without ``ckpt_fast.install()``, the same program saves the
same files with Megatron-Core's own code, and each can read the other's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import fully_parallel
from tiny_gpt import Training

import ckpt_fast


def save(training: Training, directory: Path) -> None:
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = fully_parallel.FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)
    dist_checkpointing.save(training.sharded_state_dict(), str(directory), strategy)


def load(training: Training, directory: Path) -> None:
    strategy = get_default_load_sharded_strategy(str(directory))
    state = dist_checkpointing.load(training.sharded_state_dict(is_loading=True), str(directory), strategy)
    training.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6, help="of this run")
    options = parser.parse_args()

    installed = ckpt_fast.install()  # the only ckpt_fast line

    training = Training()
    if dist.get_rank() == 0:
        print(installed)
    saved = [int(path.parent.name) for path in options.directory.glob("*/metadata.json")]
    if saved:
        training.train_step()  # Megatron-Core loads only into an optimizer that has stepped
        load(training, options.directory / str(max(saved)))
    for _ in range(options.steps):
        loss = training.train_step()
        if dist.get_rank() == 0:
            print(f"step {training.step} loss {loss:.6f}", flush=True)
        if training.step % 3 == 0:
            save(training, options.directory / str(training.step))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
