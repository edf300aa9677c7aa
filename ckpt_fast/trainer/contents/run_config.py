# SPDX-License-Identifier: Apache-2.0
"""Making the content of a ``run_config.yaml`` safe to use in this process: it may be years old."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from typing import Any

logger = logging.getLogger(__name__)

# Objects of a running process; there is nothing of them to restore.
_RUNTIME_ONLY_TARGETS = frozenset({"megatron.core.timers.Timers"})

# Written without its recipes by older versions; it cannot be built again from what is in the file.
_RECIPE_TARGET = "megatron.core.quantization.quant_config.RecipeConfig"

# Packages whose dataclasses may be looked up by the name a file gives. Looking up imports, nothing more.
_KNOWN_PACKAGES = ("megatron.core.", "ckpt_fast.")


def sanitize_run_config_object(obj: Any) -> Any:
    """A copy of ``obj`` in which every part that cannot or need not be rebuilt is None."""
    if isinstance(obj, dict):
        target = obj.get("_target_")
        if target in _RUNTIME_ONLY_TARGETS:
            return None
        if target == _RECIPE_TARGET and not obj.keys() - {"_target_", "_call_"}:
            logger.warning("run_config.yaml names a %s without recipes; it is read as None", _RECIPE_TARGET)
            return None
        return {key: sanitize_run_config_object(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [sanitize_run_config_object(value) for value in obj]
    return obj


def apply_run_config_backward_compat(obj: Any) -> Any:
    """A copy of ``obj`` without the fields that the constructor of their dataclass does not take (any more).

    Older writers stored computed fields (``init=False``) too; passing them to the constructor would fail.
    """
    if isinstance(obj, dict):
        computed = _computed_fields(obj.get("_target_"))
        return {
            key: apply_run_config_backward_compat(value) for key, value in obj.items() if key not in computed
        }
    if isinstance(obj, list):
        return [apply_run_config_backward_compat(value) for value in obj]
    return obj


def _computed_fields(target: Any) -> frozenset[str]:
    """Names of the ``init=False`` fields of the dataclass ``target``; none for classes not looked up."""
    if not isinstance(target, str) or not target.startswith(_KNOWN_PACKAGES):
        return frozenset()
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return frozenset()
    if not dataclasses.is_dataclass(found):
        return frozenset()
    return frozenset(field.name for field in dataclasses.fields(found) if not field.init)
