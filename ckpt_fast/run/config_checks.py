# SPDX-License-Identifier: Apache-2.0
"""What must hold between the parts of a configuration for saving and loading to work."""

from __future__ import annotations

import os
from typing import Any

_BACKGROUND_FORMATS = ("torch_dist", "fsdp_dtensor")


def require(condition: object, message: str) -> None:
    """Raise AssertionError, the documented kind, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


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
