# SPDX-License-Identifier: Apache-2.0
"""The documented API of ``megatron.bridge.training.checkpointing``, transcribed from its documentation. The
bodies are empty: these are the signatures that ``ckpt_fast.checkpointing`` must have, with names, order,
kinds and defaults. Types of parameters are left out; results are annotated where a caller relies on them.
``test_signatures.py`` compares.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

import torch

# --- Data. The documentation shows None for a value that it does not evaluate. ------------------------------

DATA: dict[str, object] = {
    "TRACKER_PREFIX": "latest",
    "_CHECKPOINT_VERSION": None,
    "_NON_PERSISTENT_CKPT_SUBDIR": "non_persistent",
    # Documented by behavior, not by value: no iteration (>= 0), and not "nothing found" (-1).
    "_DIRECT_ITERATION_DIR_SENTINEL": -2,
}


# --- Classes ------------------------------------------------------------------------------------------------


class CheckpointType(Enum):
    LOCAL = 1
    GLOBAL = 2
    FSDP_DTENSOR = 3


class CheckpointSaveContext:
    def __init__(
        self,
        state,
        model,
        optimizer,
        opt_param_scheduler,
        num_floating_point_operations_so_far,
        train_data_iterator=None,
        non_persistent_ckpt=False,
        pg_collection=None,
        module_name=None,
    ) -> None: ...


class CheckpointLoadContext:
    def __init__(
        self,
        state,
        model,
        optimizer,
        opt_param_scheduler,
        strict=True,
        skip_load_to_model_and_opt=False,
        pg_collection=None,
        module_name=None,
    ) -> None: ...


class CheckpointManager(Protocol):
    def __init__(self, checkpoint_config) -> None: ...
    def save(self, ctx, callback_manager) -> None: ...
    def load(self, ctx) -> tuple[int, int]: ...
    def finalize_async_saves(self, state, blocking=False, terminate=False) -> None: ...


class DefaultCheckpointManager:
    def __init__(self, checkpoint_config) -> None: ...
    @property
    def checkpointing_context(self) -> dict[str, Any]: ...
    def save(self, ctx, callback_manager) -> None: ...
    def load(self, ctx) -> tuple[int, int]: ...
    def finalize_async_saves(self, state, blocking=False, terminate=False) -> None: ...


# --- Functions, in the order of the documentation -----------------------------------------------------------


def set_checkpoint_version(value) -> None: ...
def get_checkpoint_version() -> float | None: ...
def delete_extra_state(state_dict): ...
def _get_checkpoint_format(checkpoint_path) -> str: ...
def find_checkpoint_rank_0(checkpoints_path, iteration, release=False) -> str | None: ...
def read_metadata(tracker_filename) -> tuple[int, bool]: ...
def _extract_megatron_lm_args_from_state_dict(state_dict) -> dict[str, Any]: ...
def schedule_async_save(global_state, async_request) -> None: ...
def maybe_finalize_async_save(global_state, ckpt_cfg, blocking=False, terminate=False) -> None: ...
def is_empty_async_queue(global_state) -> bool: ...
def get_save_and_finalize_callbacks(writer, save_state_dict_ret): ...
def get_rng_state(
    data_parallel_random_init, ckpt_format="torch_dist", *, pg_collection, module_name=None
): ...
def create_checkpoint_manager(checkpoint_config) -> CheckpointManager: ...


def save_checkpoint(
    state,
    model,
    optimizer,
    opt_param_scheduler,
    num_floating_point_operations_so_far,
    checkpointing_context=None,
    pipeline_rank=None,
    tensor_rank=None,
    non_persistent_ckpt=False,
    train_data_iterator=None,
    preprocess_common_state_dict_fn=None,
    prebuilt_state_dict=None,
    pg_collection=None,
    callback_manager=None,
    module_name=None,
) -> None: ...


def cleanup_old_non_persistent_checkpoint(save_dir, leave_ckpt_num=1, do_async=False) -> None: ...
def maybe_save_dataloader_state(
    model, train_iterator, iteration, dataloader_save_path=None, *, pg_collection=None
) -> None: ...
def save_tokenizer_assets(tokenizer, tokenizer_config, checkpoint_path) -> None: ...
def _generate_model_state_dict(
    model, model_sd_kwargs=None, ckpt_format="torch_dist", *, pg_collection=None
): ...
def generate_state_dict(
    ckpt_cfg,
    model,
    optimizer,
    opt_param_scheduler,
    rng_state,
    iteration=None,
    optim_sd_kwargs=None,
    model_sd_kwargs=None,
    rerun_state=None,
    *,
    pg_collection=None,
) -> dict[str, Any]: ...
def preprocess_fsdp_dtensor_state_dict(cfg, raw_state_dict, model) -> dict[str, Any]: ...
def save_fsdp_dtensor_checkpoint(
    checkpoint_path, state_dict, *, cfg, model, storage_writer=None, barrier=True
) -> Any: ...
def _create_fsdp_dtensor_storage_writer(checkpoint_path) -> Any: ...


def _load_model_weights_from_checkpoint(
    checkpoint_path,
    model,
    fully_parallel_load=False,
    return_state_dict=False,
    dist_ckpt_strictness="assume_ok_unexpected",
    strict=True,
): ...
def load_checkpoint(
    state,
    model,
    optimizer,
    opt_param_scheduler,
    strict=True,
    checkpointing_context=None,
    skip_load_to_model_and_opt=False,
    pg_collection=None,
    module_name=None,
) -> tuple[int, int]: ...


def _deinterleave_glu_tensor(tensor, interleave_size) -> torch.Tensor: ...
def _interleave_glu_tensor(tensor, interleave_size) -> torch.Tensor: ...
def _is_swiglu_fc1_checkpoint_key(
    key, *, include_routed_experts=True, include_shared_experts=False, include_dense=True
) -> bool: ...
def _apply_glu_interleave_to_tensor_data(tensor, interleave_size, interleave) -> torch.Tensor: ...
def _process_state_dict_for_glu_interleaving(
    model_state_dict,
    interleave_size,
    interleave=True,
    use_megatron_fsdp=False,
    include_routed_experts=True,
    include_shared_experts=False,
    include_dense=True,
) -> dict[str, Any]: ...
def _get_model_glu_interleave_sizes(model, cfg) -> tuple[int | None, int | None]: ...
def _process_state_dict_for_model_glu_interleaving(
    model_state_dict,
    routed_interleave_size,
    shared_interleave_size,
    interleave=True,
    use_megatron_fsdp=False,
) -> dict[str, Any]: ...


def _load_model_state_dict(module, state_dict, strict): ...
def _load_checkpoint_from_path(
    load_dir,
    state,
    model,
    optimizer,
    opt_param_scheduler,
    strict=True,
    checkpointing_context=None,
    skip_load_to_model_and_opt=False,
    ignore_ckpt_step=False,
    pg_collection=None,
    module_name=None,
) -> tuple[int, int]: ...
def init_checkpointing_context(checkpoint_config) -> dict[str, Any]: ...
def apply_peft_adapter_filter_to_state_dict(state_dict, peft_config) -> dict[str, Any]: ...
def _is_model_section(section_key) -> bool: ...
def _resolve_checkpoint_iteration(load_dir, ckpt_step_override) -> tuple[int, bool]: ...
def _get_non_persistent_iteration(
    non_persistent_global_dir, non_persistent_ckpt_type=None, checkpointing_context=None
) -> int: ...
def _load_non_persistent_base_checkpoint(
    non_persistent_global_dir,
    ckpt_cfg,
    rank0,
    sharded_state_dict,
    non_persistent_iteration,
    checkpointing_context=None,
    *,
    pg_collection,
): ...
def _load_global_dist_base_checkpoint(
    load_dir,
    ckpt_cfg,
    rank0,
    sharded_state_dict,
    iteration,
    release,
    checkpoint_path_override=None,
    checkpointing_context=None,
    is_megatron_mimo=False,
    *,
    pg_collection,
): ...
def _load_base_checkpoint(
    load_dir,
    ckpt_cfg,
    rank0=False,
    sharded_state_dict=None,
    checkpointing_context=None,
    ignore_ckpt_step=False,
    cfg=None,
    is_megatron_mimo=False,
    *,
    pg_collection,
): ...
def load_fsdp_dtensor_checkpoint(
    load_dir,
    ckpt_cfg,
    rank0,
    sharded_state_dict,
    iteration,
    release=False,
    checkpoint_path_override=None,
    checkpointing_context=None,
    cfg=None,
): ...
def _build_sharded_state_dict_metadata(use_distributed_optimizer, cfg) -> dict[str, Any]: ...
def _get_train_state_from_state_dict(state_dict): ...
