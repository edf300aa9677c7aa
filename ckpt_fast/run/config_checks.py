# SPDX-License-Identifier: Apache-2.0
"""Checks across the parts of a configuration that saving and loading depend on."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any, get_args

from ckpt_fast import settings
from ckpt_fast.retention.policies import require_policies

logger = logging.getLogger(__name__)

_BACKGROUND_FORMATS = ("torch_dist", "fsdp_dtensor")

# What CheckpointConfig's fields of our own may be, the default first.
_CHOICES = {
    "on_corrupt": ("fallback", "raise"),
    "on_save_in_progress": ("wait", "skip", "queue"),
    "on_save_error": ("raise", "warn"),
    "load_glu_rows": ("recorded", "contiguous", "interleaved"),
}

# Fields of CheckpointConfig that nothing here acts on, and why.
_DUMPS = "Megatron-LM's training loop makes such dumps"
_ARGUMENTS = "the configuration of the run counts, not the arguments in the checkpoint"
_CONVERSION = "loading converts no checkpoint"
_GROUP = "all data-parallel ranks, those of context parallelism included, share the work"
_THREADS = "threads of the training process write background saves, no worker process does"
UNUSED = {
    "save_params_interval": _DUMPS,
    "save_activations_interval": _DUMPS,
    "save_tokens_per_expert_interval": _DUMPS,
    "save_wgrads_interval": _DUMPS,
    "save_dgrads_interval": _DUMPS,
    "save_retain_interval": "most_recent_k and retention say which checkpoints are kept",
    "use_checkpoint_args": _ARGUMENTS,
    "use_mp_args_from_checkpoint_args": _ARGUMENTS,
    "use_tokenizer_model_from_checkpoint_args": _ARGUMENTS,
    "auto_detect_ckpt_format": "the format of a checkpoint is always detected",
    "ckpt_convert_format": _CONVERSION,
    "ckpt_convert_save": _CONVERSION,
    "ckpt_convert_update_legacy_dist_opt_format": _CONVERSION,
    "ckpt_fully_parallel_load_exchange_algo": "ranks exchange what they have read by broadcast",
    "ckpt_fully_parallel_save_process_group": _GROUP,
    "ckpt_fully_parallel_load_process_group": _GROUP,
    "ckpt_fully_parallel_load_per_rank_objects": "every rank reads its own objects",
    "ckpt_pg_tensors_cache_path": "there is no such cache",
    "ckpt_pg_tensors_cache_create": "there is no such cache",
    "ckpt_load_validate_sharding_integrity": "the sharding is always validated",
    "dist_ckpt_save_pre_mcore_014": "checkpoints have the layout of Megatron-Core 0.14 and later",
    "verify_integrity": "checksums are always recorded and compared; no integrity.json is written",
    "use_persistent_ckpt_worker": _THREADS,
    "async_ckpt_cpu_priority": _THREADS,
    "async_ckpt_io_priority": _THREADS,
    "async_ckpt_use_cpu_shm": _THREADS,
    "async_write_results_mp_mode": _THREADS,
    "dist_ckpt_workers": "storage_writers_per_rank says how many files a rank writes, in every format",
}
_warned: set[str] = set()


def require(condition: object, message: str) -> None:
    """Raise AssertionError, the documented kind, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def check_choices(checkpoint: Any) -> None:
    """Check the fields that only ckpt_fast has; Megatron Bridge's object may lack them.

    Raises:
        ValueError: naming the field and what it may be.
    """
    for name, choices in _CHOICES.items():
        value = getattr(checkpoint, name, choices[0])
        if value not in choices:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")
    action = getattr(checkpoint, "on_save_failure", None)
    if action is not None and action not in get_args(settings.OnSaveFailure):
        raise ValueError(
            f"on_save_failure={action!r}: use one of {', '.join(get_args(settings.OnSaveFailure))}"
        )
    require_policies(getattr(checkpoint, "retention", None))
    most = getattr(checkpoint, "max_failed_saves", None)
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ValueError(f"max_failed_saves={most!r} is not a positive whole number")
    nbytes = getattr(checkpoint, "host_buffer_bytes", None)
    if nbytes is not None and nbytes < 1:
        raise ValueError(f"host_buffer_bytes={nbytes} is not a positive number of bytes")


def warn_of_unused(checkpoint: Any) -> None:
    """Warn, once per process, of each field that is set and has no effect here.

    Args:
        checkpoint: set is what differs from the default of its own class; an object that is no dataclass has
            no defaults, and nothing is reported.
    """
    if not dataclasses.is_dataclass(checkpoint):
        return
    for field in dataclasses.fields(checkpoint):
        value = getattr(checkpoint, field.name)
        if field.name in UNUSED and value != field.default and field.name not in _warned:
            _warned.add(field.name)
            logger.warning(
                "checkpoint.%s=%r has no effect in ckpt_fast: %s", field.name, value, UNUSED[field.name]
            )


def check_container(cfg: Any) -> None:
    """The checks of ``ConfigContainer.validate``; ``cfg`` is any object with the same attributes.

    Parts may be None. Finalizes the checkpoint and logger parts first.

    Raises:
        AssertionError, ValueError: naming the fields that do not go together.
    """
    for part in (cfg.checkpoint, cfg.logger):
        if hasattr(part, "finalize"):
            part.finalize()
    if cfg.checkpoint is None:
        return
    _check_fsdp(cfg)
    _check_process_groups(cfg)
    _check_model(cfg)
    tensor_inspect = getattr(cfg, "tensor_inspect", None)
    if tensor_inspect is not None and getattr(tensor_inspect, "log_dir", None) is None:
        tensor_inspect.log_dir = cfg.checkpoint.save or "."


def hf_source(cfg: Any) -> str | None:
    """The Hugging Face model that an export takes its configuration from; None when nothing names one."""
    if cfg is None:
        return None
    candidates = (
        getattr(cfg.checkpoint, "hf_source_path", None),
        getattr(cfg.model, "hf_model_id", None),
        getattr(cfg.tokenizer, "tokenizer_model", None),
    )
    return next((str(candidate) for candidate in candidates if candidate), None)


def _check_fsdp(cfg: Any) -> None:
    checkpoint = cfg.checkpoint
    if checkpoint.save is None and checkpoint.load is None:
        return
    megatron_fsdp = getattr(cfg.ddp, "use_megatron_fsdp", False) or getattr(
        cfg.dist, "use_megatron_fsdp", False
    )
    if megatron_fsdp:
        require(
            checkpoint.ckpt_format == "fsdp_dtensor",
            "Megatron-FSDP requires the fsdp_dtensor checkpointing format: set checkpoint.ckpt_format, "
            f"which is {checkpoint.ckpt_format!r}",
        )
        require(
            os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1",
            "Megatron-FSDP cannot run with CUDA_DEVICE_MAX_CONNECTIONS=1: unset it or choose a larger value",
        )
    if checkpoint.ckpt_format == "fsdp_dtensor":
        require(
            megatron_fsdp and not getattr(cfg.dist, "use_torch_fsdp2", False),
            "fsdp_dtensor checkpoint format only supports Megatron FSDP: set ddp.use_megatron_fsdp=True and "
            "dist.use_torch_fsdp2=False",
        )


def _check_process_groups(cfg: Any) -> None:
    checkpoint = cfg.checkpoint
    known = checkpoint.ckpt_format in _BACKGROUND_FORMATS
    formats = " or ".join(_BACKGROUND_FORMATS)
    require(
        known or not checkpoint.async_save,
        f"async_save requires ckpt_format {formats}, not {checkpoint.ckpt_format!r}",
    )
    without_gloo = not getattr(cfg.dist, "use_gloo_process_groups", True)
    require(
        known or not (without_gloo and getattr(cfg.optimizer, "use_distributed_optimizer", False)),
        f"A distributed optimizer without gloo process groups requires ckpt_format {formats}, "
        f"not {checkpoint.ckpt_format!r}",
    )


def _check_model(cfg: Any) -> None:
    checkpoint = cfg.checkpoint
    if getattr(cfg, "peft", None) is not None:
        require(
            checkpoint.pretrained_checkpoint is not None,
            "PEFT requires checkpoint.pretrained_checkpoint: the weights that the adapters adapt",
        )
    if getattr(checkpoint, "also_save_hf_checkpoint", False) and hf_source(cfg) is None:
        raise ValueError(
            "also_save_hf_checkpoint=True requires an HF source: set checkpoint.hf_source_path, "
            "model.hf_model_id or tokenizer.tokenizer_model"
        )
    if (
        getattr(cfg.model, "restore_modelopt_state", False)
        and checkpoint.non_persistent_ckpt_type is not None
    ):
        raise ValueError(
            "model.restore_modelopt_state does not go together with checkpoint.non_persistent_ckpt_type="
            f"{checkpoint.non_persistent_ckpt_type!r}: non-persistent checkpoints hold no ModelOpt state"
        )
