# SPDX-License-Identifier: Apache-2.0
"""The inputs of a checkpoint manager: the kind of checkpoint, and everything a save or load needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch

from ckpt_fast import compat

if TYPE_CHECKING:
    from ckpt_fast.compat import MegatronModule, MegatronOptimizer, ProcessGroupCollection
    from ckpt_fast.config import CheckpointConfig
    from ckpt_fast.state import GlobalState


class CheckpointType(Enum):
    """Types of checkpoints to save."""

    LOCAL = auto()
    """Per-node files of nvidia-resiliency-ext, for recovery only."""
    GLOBAL = auto()
    """A distributed checkpoint in one shared directory."""
    FSDP_DTENSOR = auto()
    """A torch DCP checkpoint of Megatron FSDP."""


@dataclass
class CheckpointSaveContext:
    """Everything a save needs.

    Attributes:
        state: GlobalState with config, train state, loggers and the queue of saves in flight.
        model: model chunks.
        optimizer: may be None (checkpoints for inference).
        opt_param_scheduler: learning rate scheduler.
        num_floating_point_operations_so_far: cumulative FLOPs up to this point.
        train_data_iterator: its state is saved if it can give one.
        non_persistent_ckpt: save a temporary checkpoint.
        pg_collection: process groups; the model's own when None.
        module_name: namespace of the RNG state in a multi-module (MIMO) model.
    """

    state: GlobalState
    model: list[MegatronModule]
    optimizer: MegatronOptimizer | None
    opt_param_scheduler: Any | None
    num_floating_point_operations_so_far: int
    train_data_iterator: Any | None = None
    non_persistent_ckpt: bool = False
    pg_collection: ProcessGroupCollection | None = None
    module_name: str | None = None


@dataclass
class CheckpointLoadContext:
    """Everything a load needs.

    Attributes:
        state: GlobalState; its train state is replaced by the checkpoint's.
        model: model chunks to load into.
        optimizer: optimizer to load into.
        opt_param_scheduler: learning rate scheduler to load into.
        strict: as of ``torch.nn.Module.load_state_dict``.
        skip_load_to_model_and_opt: load the rest (iteration, RNG) and leave model and optimizer alone.
        pg_collection: process groups; the model's own when None.
        module_name: namespace of the RNG state in a multi-module (MIMO) model.
    """

    state: GlobalState
    model: list[MegatronModule]
    optimizer: MegatronOptimizer | None
    opt_param_scheduler: Any | None
    strict: bool = True
    skip_load_to_model_and_opt: bool = False
    pg_collection: ProcessGroupCollection | None = None
    module_name: str | None = None


def init_checkpointing_context(checkpoint_config: CheckpointConfig) -> dict[str, Any]:
    """The dictionary that a manager keeps across saves and loads.

    Returns:
        ``{"local_checkpoint_manager": ...}`` for local checkpoints (collective if they are replicated),
        otherwise an empty dictionary.

    Raises:
        RuntimeError: local checkpoints are configured and nvidia_resiliency_ext is not installed.
        ValueError: local checkpoints are configured without ``non_persistent_local_ckpt_dir``.
    """
    if checkpoint_config.non_persistent_ckpt_type != "local":
        return {}
    if not compat.HAVE_RESIL:
        raise RuntimeError(
            "non_persistent_ckpt_type='local' needs nvidia_resiliency_ext, which is not installed: "
            "pip install nvidia-resiliency-ext, or use non_persistent_ckpt_type='global'"
        )
    directory = checkpoint_config.non_persistent_local_ckpt_dir
    if not directory:
        raise ValueError(
            "non_persistent_ckpt_type='local' needs checkpoint.non_persistent_local_ckpt_dir: name a "
            "directory on each node's own disk or memory"
        )
    # Importing it imports nvidia-resiliency-ext's, which asks for GPUs.
    from ckpt_fast.doors.local.manager import FastLocalCheckpointManager

    _, replication_strategy = compat.import_local_checkpointing()
    replication = None
    if checkpoint_config.replication:
        jump = checkpoint_config.replication_jump
        replication = replication_strategy.from_replication_params(
            _ranks_per_node() if jump is None else jump, checkpoint_config.replication_factor
        )
    return {"local_checkpoint_manager": FastLocalCheckpointManager(directory, repl_strategy=replication)}


def _ranks_per_node() -> int:
    """The number of ranks that fail together: replicas belong on another node."""
    return torch.cuda.device_count() or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
