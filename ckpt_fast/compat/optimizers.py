# SPDX-License-Identifier: Apache-2.0
"""Optimizers as saves and loads need them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ckpt_fast.errors import CheckpointMismatchError


def give_adam_its_state(optimizer: Any) -> None:
    """Let torch's Adam, where it is still without state, have zeros for it.

    It would make them in the first step. Megatron-Core takes them for granted in the sharded state dict of a
    distributed optimizer, and of any optimizer in the scaffold of a load; and what is saved before the first
    step has to have what that scaffold asks for. (Transformer Engine's and Apex's Adam keep the step
    elsewhere.) Parameters are not touched.
    """
    for member in _around_torch_adam(optimizer):
        adam = member.optimizer
        # Who merely looks at the state of a parameter leaves an empty one behind.
        if any(adam.state.values()):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }


def without_parameter_state(optimizer: Any) -> Any | None:
    """A stand-in whose sharded state dict, of type "dp_reshardable", has all but the state of parameters.

    None for optimizers other than distributed ones, whose state of parameters is not told apart.
    """
    if type(optimizer) is ChainedOptimizer:
        members = [without_parameter_state(member) for member in optimizer.chained_optimizers]
        if None in members:
            return None
        stand_in = copy.copy(optimizer)
        stand_in.chained_optimizers = members
        return stand_in
    if type(optimizer) is not DistributedOptimizer:
        return None
    stand_in = copy.copy(optimizer)
    stand_in.gbuf_ranges = []
    stand_in.optimizer = _of_one_parameter(optimizer.optimizer)
    return stand_in


def _of_one_parameter(adam: Any) -> Any:
    """A stand-in for torch's Adam with the state of one parameter, if all have made as many steps.

    Megatron-Core takes the groups' options and the step of a state dict in which each parameter has a part.
    To build it, and to compare the steps one by one, takes longer than all else that a save collects. Any
    other optimizer is returned as it is.
    """
    if type(adam) not in (torch.optim.Adam, torch.optim.AdamW) or "state_dict" in vars(adam):
        return adam
    if adam._optimizer_state_dict_pre_hooks or adam._optimizer_state_dict_post_hooks or not adam.state:
        return adam
    try:
        steps = torch.stack([state["step"] for state in adam.state.values()])
    except (KeyError, TypeError, RuntimeError):
        return adam
    if not bool((steps == steps[0]).all()):
        return adam
    parameter, state = next(iter(adam.state.items()))
    stand_in = object.__new__(type(adam))
    vars(stand_in).update(vars(adam))
    stand_in.state = {parameter: state}
    stand_in.param_groups = [{**group, "params": [parameter]} for group in adam.param_groups]
    return stand_in


def padding_in(sharded_state: Any) -> list[torch.Tensor]:
    """The tensors that a distributed optimizer makes up to fill the gaps between parameters."""
    if isinstance(sharded_state, dict):
        mark = sharded_state.get("padding")
        if isinstance(mark, LocalNonpersistentObject) and mark.obj:
            return [each.data for each in sharded_state.values() if isinstance(each, ShardedTensor)]
        sharded_state = list(sharded_state.values())
    if isinstance(sharded_state, list):
        return [tensor for each in sharded_state for tensor in padding_in(each)]
    return []


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


def fit_to_members(optimizer: Any, saved: dict[Any, Any]) -> dict[Any, Any]:
    """The loaded state of a chain of distributed optimizers, in as many parts as this run's chain has.

    Megatron-Core gives experts an optimizer of their own once they are parallel, and stores what is not
    tensors (parameter groups, the kind of sharding) per optimizer. The tensors bear the parameters' names and
    fit either chain.

    Args:
        optimizer: of this run.
        saved: "optimizer" of the loaded state dict; not modified.

    Raises:
        CheckpointMismatchError: the chains differ, and this optimizer's state does not fit another one.
    """
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = {key: part for key, part in saved.items() if isinstance(key, int)}
    whole = {key: part for key, part in saved.items() if not isinstance(key, int)}
    if not (parts and whole):
        return saved
    if not all(isinstance(member, DistributedOptimizer) for member in members):
        raise CheckpointMismatchError(
            "the optimizer was saved with another expert parallelism, with which Megatron-Core divides it "
            "otherwise. Use the same expert_model_parallel_size, a distributed optimizer saved with "
            "dist_ckpt_optim_fully_reshardable=True, or load_optim=False."
        )
    if len(members) == 1:
        first = parts[min(parts)]
        saved_groups = [group for part in parts.values() for group in part["optimizer"]["param_groups"]]
        return {**first, **whole, "optimizer": _with_groups(first, saved_groups)}
    groups = whole["optimizer"]["param_groups"]
    return {key: {**whole, **part, "optimizer": _with_groups(whole, groups)} for key, part in parts.items()}


def _with_groups(part: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The "optimizer" of a part with parameter groups for experts and others alike."""
    both = [{**group, "is_expert_parallel": kind} for group in groups for kind in (False, True)]
    # A group that was saved goes before one that is made up, which goes by what is found last.
    return {**part["optimizer"], "param_groups": [*both, *groups]}


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
