# SPDX-License-Identifier: Apache-2.0
"""Optimizers as a load needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def give_adam_its_state(optimizer: Any) -> None:
    """Let torch's Adam, where it is still without state, have zeros for it.

    It would make them in the first step. Megatron-Core takes them for granted in the sharded state dict of a
    distributed optimizer, and of any optimizer in the scaffold of a load; and what is saved before the first
    step has to have what that scaffold asks for. (Transformer Engine's and Apex's Adam keep the step
    elsewhere.) Parameters are not touched.
    """
    for member in _around_torch_adam(optimizer):
        adam = member.optimizer
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
    """Let an optimizer around torch's Adam load states that come without a step.

    Megatron-Core leaves the step out of what it loads per parameter into a distributed optimizer, having
    restored it from the parameter groups just before, and then misses it where Adam's own state has one. In
    here it finds the restored one. Of the other optimizers it does not save a step of 0; in here they get it.
    """
    with contextlib.ExitStack() as stack:
        for member in _around_torch_adam(optimizer):
            if isinstance(member, DistributedOptimizer):
                stack.enter_context(_step_supplied(member))
            else:
                stack.callback(member.optimizer.register_load_state_dict_pre_hook(_start_at_step_0).remove)
        yield


def _start_at_step_0(_: Any, state_dict: dict[str, Any]) -> None:
    for state in state_dict["state"].values():
        state.setdefault("step", torch.zeros((), dtype=torch.float32))


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
    """The members of a Megatron-Core optimizer that keep the step in the state of torch's Adam."""
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(member, "optimizer", None)
        if isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)) and not getattr(
            member, "is_stub_optimizer", False
        ):
            yield member
