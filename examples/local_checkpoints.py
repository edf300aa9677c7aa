# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints with replicas: a node's disk is lost, and the run continues from its neighbor's copy.

    torchrun --nproc-per-node 2 examples/local_checkpoints.py --directory /local/disk

Needs nvidia-resiliency-ext. Every rank keeps its own state and its neighbor's. The example deliberately
deletes the directory of rank 1.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy
from tiny_gpt import Training

from ckpt_fast import FastLocalCheckpointManager


def build_manager(directory: Path) -> Any:
    # On a cluster the jump is the number of ranks per node: they fail together.
    replication = CliqueReplicationStrategy.from_replication_params(replication_jump=1, replication_factor=2)
    return FastLocalCheckpointManager(directory, repl_strategy=replication)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    training = Training()
    group = {"parallelization_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    manager = build_manager(options.directory)
    for _ in range(3):
        training.train_step()
        state, _ = MCoreTensorAwareStateDict.from_state_dict(training.sharded_state_dict(), **group)
        manager.save(state, training.step)
    expected = training.train_step()

    dist.barrier()
    if dist.get_rank() == 1:
        shutil.rmtree(options.directory / "1")
    dist.barrier()

    manager = build_manager(options.directory)
    found = manager.find_latest()
    state, _ = manager.load()
    scaffold = training.sharded_state_dict(is_loading=True)
    training.load_state_dict(state.to_state_dict(scaffold, algo="fully_parallel", **group))
    loss = training.train_step()
    if dist.get_rank() == 0:
        print(f"resumed from the local checkpoint of step {found}; step {training.step}: loss {loss:.6f}")
        print("as before the loss" if loss == expected else f"instead of {expected:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
