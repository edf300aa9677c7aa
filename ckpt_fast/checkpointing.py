# SPDX-License-Identifier: Apache-2.0
"""The documented checkpoint API (``megatron.bridge.training.checkpointing``): a table of contents.

Every name is imported from its home; see the docstrings there. Beside the documented names there is what a
program needs to call them (configuration, state, callbacks), and what newer versions of Megatron Bridge have.
"""

from __future__ import annotations

import logging

from ckpt_fast.callbacks import Callback, CallbackContext, CallbackManager
from ckpt_fast.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    LoggerConfig,
    RNGConfig,
    TokenizerConfig,
)
from ckpt_fast.glu.layout import _is_model_section
from ckpt_fast.glu.model import (
    _apply_glu_interleave_to_tensor_data,
    _deinterleave_glu_tensor,
    _get_model_glu_interleave_sizes,
    _interleave_glu_tensor,
    _is_swiglu_fc1_checkpoint_key,
    _process_state_dict_for_glu_interleaving,
    _process_state_dict_for_model_glu_interleaving,
)
from ckpt_fast.state import GlobalState, TrainState
from ckpt_fast.trainer.contents import version as _version
from ckpt_fast.trainer.contents.fsdp import (
    _create_fsdp_dtensor_storage_writer,
    load_fsdp_dtensor_checkpoint,
    preprocess_fsdp_dtensor_state_dict,
    save_fsdp_dtensor_checkpoint,
)
from ckpt_fast.trainer.contents.megatron_lm import (
    _extract_megatron_lm_args_from_state_dict,
    _get_train_state_from_state_dict,
)
from ckpt_fast.trainer.contents.rng import get_rng_state
from ckpt_fast.trainer.contents.sidecars import (
    maybe_load_dataloader_state,
    maybe_save_dataloader_state,
    save_tokenizer_assets,
)
from ckpt_fast.trainer.contents.state_dict import (
    _build_sharded_state_dict_metadata,
    _generate_model_state_dict,
    _load_model_state_dict,
    apply_peft_adapter_filter_to_state_dict,
    delete_extra_state,
    generate_state_dict,
)
from ckpt_fast.trainer.contents.version import get_checkpoint_version, set_checkpoint_version
from ckpt_fast.trainer.contexts import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    CheckpointType,
    init_checkpointing_context,
)
from ckpt_fast.trainer.load.base import (
    _load_base_checkpoint,
    _load_global_dist_base_checkpoint,
    _load_non_persistent_base_checkpoint,
)
from ckpt_fast.trainer.load.load import _load_checkpoint_from_path, load_checkpoint
from ckpt_fast.trainer.load.weights import _load_model_weights_from_checkpoint
from ckpt_fast.trainer.manager import (
    CheckpointManager,
    DefaultCheckpointManager,
    create_checkpoint_manager,
)
from ckpt_fast.trainer.places.locate import (
    _DIRECT_ITERATION_DIR_SENTINEL,
    _NON_PERSISTENT_CKPT_SUBDIR,
    TRACKER_PREFIX,
    _get_checkpoint_format,
    _get_non_persistent_iteration,
    _resolve_checkpoint_iteration,
    find_checkpoint_rank_0,
    read_metadata,
)
from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRAIN_STATE_FILE,
    checkpoint_exists,
    ensure_directory_exists,
    file_exists,
    get_checkpoint_name,
    get_checkpoint_run_config_filename,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    is_checkpoint_iteration_directory,
    is_hf_checkpoint_dir,
    join_paths,
)
from ckpt_fast.trainer.places.retention import cleanup_old_non_persistent_checkpoint
from ckpt_fast.trainer.places.trackers import read_run_config, read_train_state
from ckpt_fast.trainer.save.async_save import (
    get_save_and_finalize_callbacks,
    is_empty_async_queue,
    maybe_finalize_async_save,
    schedule_async_save,
)
from ckpt_fast.trainer.save.save import save_checkpoint

_CHECKPOINT_VERSION: float | None

logger = logging.getLogger(__name__)

__all__ = [
    "TRACKER_PREFIX",
    "_CHECKPOINT_VERSION",
    "_DIRECT_ITERATION_DIR_SENTINEL",
    "_NON_PERSISTENT_CKPT_SUBDIR",
    "CheckpointLoadContext",
    "CheckpointManager",
    "CheckpointSaveContext",
    "CheckpointType",
    "DefaultCheckpointManager",
    "_apply_glu_interleave_to_tensor_data",
    "_build_sharded_state_dict_metadata",
    "_create_fsdp_dtensor_storage_writer",
    "_deinterleave_glu_tensor",
    "_extract_megatron_lm_args_from_state_dict",
    "_generate_model_state_dict",
    "_get_checkpoint_format",
    "_get_model_glu_interleave_sizes",
    "_get_non_persistent_iteration",
    "_get_train_state_from_state_dict",
    "_interleave_glu_tensor",
    "_is_model_section",
    "_is_swiglu_fc1_checkpoint_key",
    "_load_base_checkpoint",
    "_load_checkpoint_from_path",
    "_load_global_dist_base_checkpoint",
    "_load_model_state_dict",
    "_load_model_weights_from_checkpoint",
    "_load_non_persistent_base_checkpoint",
    "_process_state_dict_for_glu_interleaving",
    "_process_state_dict_for_model_glu_interleaving",
    "_resolve_checkpoint_iteration",
    "apply_peft_adapter_filter_to_state_dict",
    "cleanup_old_non_persistent_checkpoint",
    "create_checkpoint_manager",
    "delete_extra_state",
    "find_checkpoint_rank_0",
    "generate_state_dict",
    "get_checkpoint_version",
    "get_rng_state",
    "get_save_and_finalize_callbacks",
    "init_checkpointing_context",
    "is_empty_async_queue",
    "load_checkpoint",
    "load_fsdp_dtensor_checkpoint",
    "logger",
    "maybe_finalize_async_save",
    "maybe_save_dataloader_state",
    "preprocess_fsdp_dtensor_state_dict",
    "read_metadata",
    "save_checkpoint",
    "save_fsdp_dtensor_checkpoint",
    "save_tokenizer_assets",
    "schedule_async_save",
    "set_checkpoint_version",
]
__all__ += [
    "CONFIG_FILE",
    "TRAIN_STATE_FILE",
    "Callback",
    "CallbackContext",
    "CallbackManager",
    "CheckpointConfig",
    "ConfigContainer",
    "DistributedInitConfig",
    "GlobalState",
    "LoggerConfig",
    "RNGConfig",
    "TokenizerConfig",
    "TrainState",
    "checkpoint_exists",
    "ensure_directory_exists",
    "file_exists",
    "get_checkpoint_name",
    "get_checkpoint_run_config_filename",
    "get_checkpoint_tracker_filename",
    "get_checkpoint_train_state_filename",
    "is_checkpoint_iteration_directory",
    "is_hf_checkpoint_dir",
    "join_paths",
    "maybe_load_dataloader_state",
    "read_run_config",
    "read_train_state",
]


def __getattr__(name: str) -> object:
    # A copy of the name would not follow set_checkpoint_version.
    if name == "_CHECKPOINT_VERSION":
        return _version._CHECKPOINT_VERSION
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
