# SPDX-License-Identifier: Apache-2.0
"""Names and places of a run's checkpoint files (``megatron.bridge.training.utils.checkpoint_utils``).

A table of contents, like ``ckpt_fast.checkpointing``: see the docstrings where the names are at home. Paths
may be local ones, or ``msc://`` URLs where multi-storage-client is enabled.
"""

from __future__ import annotations

import logging

from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRACKER_PREFIX,
    TRAIN_STATE_FILE,
    checkpoint_exists,
    ensure_directory_exists,
    file_exists,
    get_checkpoint_name,
    get_checkpoint_run_config_filename,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    get_hf_model_id_from_checkpoint,
    is_checkpoint_iteration_directory,
    is_hf_checkpoint_dir,
    join_paths,
)
from ckpt_fast.trainer.places.trackers import read_run_config, read_train_state

logger = logging.getLogger(__name__)

__all__ = [
    "CONFIG_FILE",
    "TRACKER_PREFIX",
    "TRAIN_STATE_FILE",
    "checkpoint_exists",
    "ensure_directory_exists",
    "file_exists",
    "get_checkpoint_name",
    "get_checkpoint_run_config_filename",
    "get_checkpoint_tracker_filename",
    "get_checkpoint_train_state_filename",
    "get_hf_model_id_from_checkpoint",
    "is_checkpoint_iteration_directory",
    "is_hf_checkpoint_dir",
    "join_paths",
    "logger",
    "read_run_config",
    "read_train_state",
]
