# SPDX-License-Identifier: Apache-2.0
"""The state dict of a training run and its parts, as saved in a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.glu.layout import _is_model_section

_CHECKPOINT_FORMAT_VERSION = 3.0
_EXTRA_STATE = "_extra_state"
RERUN_KEY = "rerun_state_machine"


def generate_state_dict(
    ckpt_cfg: Any,
    model: list[Any],
    optimizer: Any | None,
    opt_param_scheduler: Any | None,
    rng_state: Any | None,
    iteration: int | None = None,
    optim_sd_kwargs: dict[str, Any] | None = None,
    model_sd_kwargs: dict[str, Any] | None = None,
    rerun_state: dict[str, Any] | None = None,
    *,
    pg_collection: Any | None = None,
) -> dict[str, Any]:
    """Collect everything a checkpoint stores.

    Args:
        ckpt_cfg: CheckpointConfig; ``save_optim``, ``save_rng`` and ``ckpt_format`` are read.
        model: model chunks, unwrapped.
        optimizer: None or a stub leaves the optimizer out.
        opt_param_scheduler: the learning-rate scheduler, stored together with the optimizer.
        rng_state: what ``get_rng_state`` returned.
        iteration: training step; left out when None.
        optim_sd_kwargs: passed to ``optimizer.sharded_state_dict``. With ``is_loading`` in it the result is
            the scaffold of a load: it asks for optimizer and RNG whatever the save options say.
        model_sd_kwargs: passed to ``sharded_state_dict`` of each chunk.
        rerun_state: state of the rerun state machine; left out when None.
        pg_collection: process groups of the model.

    Returns:
        Keys ``checkpoint_version``, ``iteration``, ``model`` (or ``model0`` ...), ``optimizer``,
        ``opt_param_scheduler``, ``rerun_state_machine``, ``rng_state``, as far as they apply.
    """
    loading = bool((optim_sd_kwargs or {}).get("is_loading"))
    state_dict: dict[str, Any] = {"checkpoint_version": _CHECKPOINT_FORMAT_VERSION}
    if iteration is not None:
        state_dict["iteration"] = iteration
    state_dict.update(
        _generate_model_state_dict(model, model_sd_kwargs, ckpt_cfg.ckpt_format, pg_collection=pg_collection)
    )
    if ckpt_cfg.save_optim or loading:
        if optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
            state_dict["optimizer"] = _optimizer_state_dict(
                optimizer, state_dict, ckpt_cfg.ckpt_format, optim_sd_kwargs
            )
        if opt_param_scheduler is not None:
            state_dict["opt_param_scheduler"] = opt_param_scheduler.state_dict()
    if rerun_state is not None:
        state_dict[RERUN_KEY] = rerun_state
    if ckpt_cfg.save_rng or (loading and rng_state is not None):
        state_dict["rng_state"] = rng_state
    return state_dict


def _generate_model_state_dict(
    model: list[Any],
    model_sd_kwargs: dict[str, Any] | None = None,
    ckpt_format: str = "torch_dist",
    *,
    pg_collection: Any | None = None,
) -> dict[str, Any]:
    """The model sections: ``model`` for one chunk, ``model0``, ``model1``, ... for several, none for none."""
    sections = ["model"] if len(model) == 1 else [f"model{number}" for number in range(len(model))]
    if ckpt_format == "torch_dist":
        return {
            section: chunk.sharded_state_dict(**(model_sd_kwargs or {}))
            for section, chunk in zip(sections, model, strict=True)
        }
    return {
        section: chunk.state_dict_for_save_checkpoint()
        for section, chunk in zip(sections, model, strict=True)
    }


def _optimizer_state_dict(
    optimizer: Any, state_dict: dict[str, Any], ckpt_format: str, kwargs: dict[str, Any] | None
) -> Any:
    compat.give_adam_its_state(optimizer)
    if ckpt_format == "torch_dist":
        return optimizer.sharded_state_dict(state_dict, **(kwargs or {}))
    if ckpt_format == "fsdp_dtensor":
        return optimizer.sharded_state_dict(state_dict, **{"metadata": {}, **(kwargs or {})})
    return optimizer.state_dict()


def _build_sharded_state_dict_metadata(use_distributed_optimizer: bool, cfg: Any) -> dict[str, Any]:
    """Content metadata: how model and optimizer shape their sharded state dicts.

    It is stored with the checkpoint, and the loader builds its scaffold from what it finds there.

    Args:
        use_distributed_optimizer: whether a sharding type of the distributed optimizer is needed.
        cfg: CheckpointConfig; ``ckpt_format`` and the two ``fully_reshardable`` options are read.
    """
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if not use_distributed_optimizer:
        return metadata
    if cfg.ckpt_format == "fsdp_dtensor":
        metadata["distrib_optim_sharding_type"] = "fsdp_dtensor"
    elif cfg.dist_ckpt_optim_fully_reshardable:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = (
            cfg.distrib_optim_fully_reshardable_mem_efficient
        )
    else:
        metadata["distrib_optim_sharding_type"] = "dp_reshardable"
    return metadata


def uses_distributed_optimizer(cfg: Any) -> bool:
    """Whether the run's optimizer shards its state over data-parallel ranks."""
    return bool(getattr(cfg.optimizer, "use_distributed_optimizer", False))


def delete_extra_state(state_dict: Any) -> Any:
    """Remove every key that contains ``_extra_state`` from the model section, in place.

    Args:
        state_dict: a checkpoint's state dict (its ``model`` section is cleaned) or a model's.

    Returns:
        The argument itself. Anything whose keys cannot be had is returned unchanged.
    """
    target = state_dict["model"] if isinstance(state_dict, dict) and "model" in state_dict else state_dict
    try:
        doomed = [key for key in target.keys() if isinstance(key, str) and _EXTRA_STATE in key]  # noqa: SIM118
    except Exception:
        return state_dict
    for key in doomed:
        del target[key]
    return state_dict


def apply_peft_adapter_filter_to_state_dict(state_dict: dict[str, Any], peft_config: Any) -> dict[str, Any]:
    """Keep only adapter parameters in the model sections; everything else passes through by identity.

    Args:
        state_dict: from ``generate_state_dict``; not modified.
        peft_config: its ``adapter_key_filter(key)`` decides. ``_extra_state`` entries are dropped even where
            the filter accepts them: loading adapters does without, and they collide between expert ranks.
    """

    def is_adapter(key: Any) -> bool:
        return bool(peft_config.adapter_key_filter(key)) and not (
            isinstance(key, str) and _EXTRA_STATE in key
        )

    return {
        section: {key: value for key, value in content.items() if is_adapter(key)}
        if _is_model_section(section)
        else content
        for section, content in state_dict.items()
    }


def _load_model_state_dict(module: torch.nn.Module, state_dict: dict[str, Any], strict: bool) -> None:
    """Load a model section into a module; with ``strict`` only ``_extra_state`` keys may differ.

    Raises:
        CheckpointMismatchError: other keys are missing or unexpected, or shapes differ (``strict`` only;
            without it the module's own exception is passed on).
    """
    if compat.MegatronFSDP is not None and isinstance(module, compat.MegatronFSDP):
        for key in list(state_dict):
            state_dict[f"module.{key}"] = state_dict.pop(key)
    try:
        module.load_state_dict(state_dict, strict=strict)
    except Exception as error:
        if not strict:
            raise
        _load_without_extra_state(module, state_dict, error)


def _load_without_extra_state(
    module: torch.nn.Module, state_dict: dict[str, Any], strict_error: Exception
) -> None:
    try:
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
    except Exception as error:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit the model: {error}. Use the configuration it was saved with."
        ) from error
    missing = [key for key in missing if not key.endswith(_EXTRA_STATE)]
    unexpected = [key for key in unexpected if not key.endswith(_EXTRA_STATE)]
    if missing or unexpected:
        raise _misfit(missing, unexpected) from strict_error


def require_whole_model(missing: Iterable[tuple[Any, ...]]) -> None:
    """Raise unless only ``_extra_state`` is missing of a model, as ``_load_model_state_dict`` with ``strict``
    would once everything else is loaded.

    Args:
        missing: paths, in the whole state dict, of what the checkpoint lacks.

    Raises:
        CheckpointMismatchError: other parts of a model section are missing.
    """
    keys = {str(path[1]) for path in missing if len(path) > 1 and _is_model_section(path[0])}
    lacking = sorted(key for key in keys if not key.endswith(_EXTRA_STATE))
    if lacking:
        raise _misfit(lacking, [])


def _misfit(missing: list[str], unexpected: list[str]) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        "the checkpoint does not fit the model."
        f"{_grouped(' Missing in the checkpoint', missing)}"
        f"{_grouped(' Unknown to the model', unexpected)}"
        " Use the configuration it was saved with, or load with strict=False to skip these."
    )


def _grouped(title: str, keys: Iterable[str], shown: int = 6) -> str:
    """``title (12): decoder.layers.0 (7 keys), ...``: one entry per module, the rest counted."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[key.rpartition(".")[0] or key].append(key)
    if not groups:
        return ""
    texts = [
        members[0] if len(members) == 1 else f"{prefix} ({len(members)} keys)"
        for prefix, members in groups.items()
    ]
    rest = f", and {len(texts) - shown} more modules" if len(texts) > shown else ""
    return f"{title} ({sum(map(len, groups.values()))}): {', '.join(texts[:shown])}{rest}."
