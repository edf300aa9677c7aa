# SPDX-License-Identifier: Apache-2.0
"""Engine and twin take the same tensors from a torch optimizer, and see the same objects again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckpt_fast import native


def adam() -> torch.optim.Adam:
    """Return an optimizer of two groups, after a step; the last parameter has no state."""
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (1, 2, 3)]
    optimizer = torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1}])
    for parameter in parameters[:2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def walk(optimizer: torch.optim.Optimizer) -> tuple[list[Any], bytes]:
    return native.walk_optimizer(optimizer.param_groups, optimizer.state, torch.Tensor)


def reverse(optimizer: torch.optim.Adam) -> None:
    states = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update(reversed(states))


@pytest.mark.parametrize("order", ["parameters'", "reversed", "with a stranger"])
def test_each_parameter_comes_before_its_state(native_impl: str, order: str) -> None:
    optimizer = adam()
    if order == "reversed":
        reverse(optimizer)
    if order == "with a stranger":
        states = list(optimizer.state.items())
        optimizer.state.clear()
        optimizer.state[torch.zeros(1)] = {"exp_avg": torch.zeros(1)}
        optimizer.state.update(states)
    first, second, third = (each for group in optimizer.param_groups for each in group["params"])
    expected = []
    for parameter in (first, second):
        state = optimizer.state[parameter]
        expected += [parameter, state["step"], state["exp_avg"], state["exp_avg_sq"]]
    tensors, facts = walk(optimizer)
    assert [id(each) for each in tensors] == [id(each) for each in [*expected, third]]
    names = b"step\0exp_avg\0exp_avg_sq\0;"
    assert facts == b"2:" + 2 * names + b"1:"


def last_state(optimizer: torch.optim.Adam) -> dict[str, Any]:
    *_, state = optimizer.state.values()
    return state


CHANGES: dict[str, Callable[[torch.optim.Adam], object]] = {
    "a group": lambda adam: adam.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
    "a parameter": lambda adam: adam.param_groups[1]["params"].append(torch.nn.Parameter(torch.ones(1))),
    "another group": lambda adam: adam.param_groups[1]["params"].append(adam.param_groups[0]["params"].pop()),
    "a state": lambda adam: adam.state.popitem(),
    "an empty state": lambda adam: last_state(adam).clear(),
    "a name": lambda adam: last_state(adam).update(more=last_state(adam).pop("exp_avg")),
    "a tensor": lambda adam: last_state(adam).update(more=torch.zeros(1)),
    "a number": lambda adam: last_state(adam).update(step=1.0),
}


def test_facts_tell_optimizers_apart() -> None:
    found = []
    for change in (lambda _: None, *CHANGES.values()):
        optimizer = adam()
        change(optimizer)
        facts = []
        for implementation in ("engine", "fallback"):
            with native.using(implementation):  # type: ignore[arg-type]
                facts.append(walk(optimizer)[1])
        assert facts[0] == facts[1]
        found.append(facts[0])
    assert len(set(found)) == 1 + len(CHANGES)


def test_what_is_no_tensor_is_left_out(native_impl: str) -> None:
    parameter, moment = torch.zeros(1), torch.zeros(1)
    state = {parameter: {"step": 1, 3: "three", "moment": moment}}
    tensors, facts = native.walk_optimizer([{"params": [parameter]}], state, torch.Tensor)
    assert [id(each) for each in tensors] == [id(parameter), id(moment)]
    assert facts == b"1:moment\0;"


@pytest.mark.parametrize(
    ("groups", "state"),
    [
        ([3], {}),
        ([{"params": (1, 2)}], {}),
        ([{"params": ["a"]}], {"a": [1]}),
        ([{"params": ["a"]}], {"a": {3: torch.zeros(1)}}),
    ],
)
def test_what_is_built_otherwise(native_impl: str, groups: list[Any], state: dict[Any, Any]) -> None:
    with pytest.raises(TypeError):
        native.walk_optimizer(groups, state, torch.Tensor)


def test_a_group_without_parameters(native_impl: str) -> None:
    with pytest.raises(KeyError):
        native.walk_optimizer([{}], {}, torch.Tensor)


def test_references(native_impl: str) -> None:
    tensors = [torch.zeros(1) for _ in range(3)]
    references = [weakref.ref(each) for each in tensors]
    assert native.refer_to(references, tensors)
    assert native.refer_to([], [])
    assert not native.refer_to(references, tensors[:2])
    assert not native.refer_to(references, [*tensors[:2], copy.copy(tensors[2])])
    assert not native.refer_to(references, [tensors[1], tensors[0], tensors[2]])
    del tensors[2]
    assert not native.refer_to(references, [*tensors, torch.zeros(1)])


def test_what_is_no_reference(native_impl: str) -> None:
    with pytest.raises(TypeError):
        native.refer_to([torch.zeros(1)], [torch.zeros(1)])  # type: ignore[list-item]
