# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints of Megatron-LM, which keep their settings as an argparse Namespace under "args"."""

from __future__ import annotations

from typing import Any

from ckpt_fast.state import TrainState

# Where Megatron-LM keeps its settings in the common state.
ARGUMENTS = "args"

# Parallel sizes a Namespace may have, with what their absence means.
_PARALLEL_SIZES = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "encoder_tensor_model_parallel_size": 0,
    "encoder_pipeline_model_parallel_size": 0,
}


def _extract_megatron_lm_args_from_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The equivalent of a ``run_config.yaml``, derived from the arguments that Megatron-LM stored.

    Returns:
        {"model": parallel sizes, "checkpoint": what was saved}.

    Raises:
        RuntimeError: there are no arguments in the state dict.
    """
    if ARGUMENTS not in state_dict:
        raise RuntimeError(
            "Legacy checkpoint missing 'args' field in state_dict: it has neither run_config.yaml nor the "
            "arguments of Megatron-LM, so its parallel layout is unknown"
        )
    args = state_dict[ARGUMENTS]
    return {
        "model": {name: getattr(args, name, default) for name, default in _PARALLEL_SIZES.items()},
        "checkpoint": {
            "save_optim": not getattr(args, "no_save_optim", False),
            "save_rng": not getattr(args, "no_save_rng", False),
            "fully_parallel_save": getattr(args, "ckpt_fully_parallel_save", False),
        },
    }


def _get_train_state_from_state_dict(state_dict: dict[str, Any]) -> TrainState:
    """The progress of a Megatron-LM run; a counter it does not have is 0."""
    args = state_dict.get(ARGUMENTS)
    return TrainState(
        step=state_dict.get("iteration", 0),
        consumed_train_samples=getattr(args, "consumed_train_samples", 0),
        skipped_train_samples=getattr(args, "skipped_train_samples", 0),
        consumed_valid_samples=getattr(args, "consumed_valid_samples", 0),
        floating_point_operations_so_far=state_dict.get("num_floating_point_operations_so_far", 0),
    )
