# SPDX-License-Identifier: Apache-2.0
"""ModelOpt (quantised models): the functions that carry its state through a checkpoint, or nothing.

Importing modelopt takes seconds and patches torch modules. A model can only carry ModelOpt state if the
program imported modelopt itself, so saving never has a reason to import it first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from ckpt_fast.errors import UnavailableError
from ckpt_fast.optional import safe_import

# In the checkpoint's directory.
MODELOPT_DIR = "modelopt_state"


def uses_modelopt() -> bool:
    """Whether the program has imported modelopt, so that its models may carry its state."""
    return sys.modules.get("modelopt") is not None


def _modelopt(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module("modelopt.torch.opt.plugins"), name)
    return function


def save_modelopt_state(model: Any, state_dict: dict[str, Any]) -> None:
    """Put the model's ModelOpt state into ``state_dict``; nothing for a model that has none."""
    if uses_modelopt():
        _modelopt("save_modelopt_state")(model, state_dict)


def save_sharded_modelopt_state(model: Any, checkpoint_name: str, strategy: Any) -> None:
    """Write the model's ModelOpt state to ``<checkpoint_name>/modelopt_state``; nothing if it has none."""
    if uses_modelopt():
        _modelopt("save_sharded_modelopt_state")(model, checkpoint_name, strategy)


def restore_modelopt_state(model: Any, state_dict: dict[str, Any]) -> None:
    """Convert ``model`` as the checkpoint's ModelOpt state says.

    Raises:
        UnavailableError: the checkpoint has such state and modelopt is not installed.
    """
    if "modelopt_state" in state_dict:
        _require_modelopt()
    if uses_modelopt():
        _modelopt("restore_modelopt_state")(model, state_dict)


def _require_modelopt() -> None:
    if not safe_import("modelopt.torch.opt.plugins")[1]:
        raise UnavailableError(
            "this checkpoint was written by a model that nvidia-modelopt had converted: "
            "install nvidia-modelopt to load it"
        )
