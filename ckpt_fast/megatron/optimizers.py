# SPDX-License-Identifier: Apache-2.0
"""Optimizers as a load needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def give_adam_its_state(optimizer: Any) -> None:
    """Let a distributed optimizer around torch's Adam, which is still without state, have zeros for it.

    torch's Adam makes its state in the first step; Megatron-Core's ``sharded_state_dict`` takes it for
    granted, also where it is asked for the scaffold of a load. (Transformer Engine's and Apex's Adam keep the
    step elsewhere and do not need this.) Parameters are not touched.
    """
    for distributed in _around_torch_adam(optimizer):
        adam = distributed.optimizer
        if adam.state:
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }


@contextlib.contextmanager
def keep_adam_steps(optimizer: Any) -> Iterator[None]:
    """Let a distributed optimizer around torch's Adam load a fully reshardable state.

    Megatron-Core leaves the step out of what it loads per parameter, having restored it from the parameter
    groups just before, and then misses it where Adam's own state has one. In here it finds the restored one.
    """
    with contextlib.ExitStack() as stack:
        for distributed in _around_torch_adam(optimizer):
            stack.enter_context(_step_supplied(distributed))
        yield


@contextlib.contextmanager
def _step_supplied(distributed: Any) -> Iterator[None]:
    set_states = distributed._set_main_param_and_optimizer_states

    def set_states_and_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = distributed.model_param_group_index_map[model_param]
        parameter = distributed.optimizer.param_groups[group]["params"][order]
        set_states(model_param, {"step": distributed.optimizer.state[parameter]["step"], **tensors})

    distributed._set_main_param_and_optimizer_states = set_states_and_step
    try:
        yield
    finally:
        del distributed._set_main_param_and_optimizer_states


def _around_torch_adam(optimizer: Any) -> Iterator[Any]:
    """The distributed optimizers among the members that keep the step in the state of torch's Adam."""
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(member, DistributedOptimizer) or getattr(member, "is_stub_optimizer", False):
            continue
        if isinstance(member.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            yield member
