# SPDX-License-Identifier: Apache-2.0
"""Engine and twin take the same modules, tensors and names from a tree of torch modules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from ckpt_fast import native


def tree() -> torch.nn.Module:
    """Return modules that share a child, a parameter and a buffer, and have parts that are None."""
    root = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    root.add_module("again", root[0])
    root.add_module("nothing", None)
    root.register_buffer("kept", torch.zeros(2))
    root.register_buffer("passing", root.kept, persistent=False)
    root.hook = root[1].register_state_dict_post_hook(lambda *_: None)
    root.hook_before = root[1].register_state_dict_pre_hook(lambda *_: None)
    root[2].state_dict = dict
    root.register_parameter("tied", root[0].weight)
    return root


def test_what_is_registered_comes_in_order(native_impl: str) -> None:
    root = tree()
    modules, tensors, _ = native.walk_modules([root, root[2]])
    norm = root[1]
    expected = [root, root[0], norm, root[2], root[0], root[2]]
    assert [id(each) for each in modules] == [id(each) for each in expected]
    running = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    weights = [root.tied, root.kept, root.passing, root[0].weight, norm.weight, norm.bias, *running]
    assert [id(each) for each in tensors] == [id(each) for each in [*weights, root[0].weight]]


def rename(root: torch.nn.Module) -> None:
    root._modules["first"] = root._modules.pop("0")


CHANGES: dict[str, Callable[[torch.nn.Module], object]] = {
    "a child's name": rename,
    "a child": lambda root: root.add_module("nothing", torch.nn.ReLU()),
    "a tensor": lambda root: root[0].register_parameter("bias", torch.nn.Parameter(torch.zeros(3))),
    "a buffer for a parameter": lambda root: (
        delattr(root, "tied"),
        root.register_buffer("tied", torch.zeros(1)),
    ),
    "persistence": lambda root: root.register_buffer("passing", root.kept),
    "a hook": lambda root: root[1].register_state_dict_post_hook(lambda *_: None),
    "a hook before": lambda root: root[1].register_state_dict_pre_hook(lambda *_: None),
    "which buffer is persistent": lambda root: (
        root.register_buffer("passing", root.kept),
        root.register_buffer("kept", root.kept, persistent=False),
    ),
    "another hook": lambda root: (
        root.hook.remove(),
        root[1].register_state_dict_post_hook(lambda *_: None),
    ),
    "another hook before": lambda root: (
        root.hook_before.remove(),
        root[1].register_state_dict_pre_hook(lambda *_: None),
    ),
    "another method of its own": lambda root: setattr(root[2], "state_dict", list),
    "how it is saved": lambda root: setattr(root[2], "_save_to_state_dict", list),
    "its class": lambda root: setattr(root[2], "__class__", torch.nn.Tanh),
    "a method of its own": lambda root: setattr(root[2], "sharded_state_dict", dict),
    "depth": lambda root: root.add_module("nothing", torch.nn.Sequential(torch.nn.ReLU())),
}


def test_names_tell_trees_apart() -> None:
    original, found = tree(), []
    for change in (lambda _: None, *CHANGES.values()):
        changed = copy.deepcopy(original)
        change(changed)
        names = []
        for implementation in ("engine", "fallback"):
            with native.using(implementation):  # type: ignore[arg-type]
                names.append(native.walk_modules([changed])[2])
        assert names[0] == names[1]
        found.append(names[0])
    assert len(set(found)) == 1 + len(CHANGES)


@pytest.mark.parametrize("what", [3, object(), [], torch.zeros(2)])
def test_what_is_no_module(native_impl: str, what: object) -> None:
    with pytest.raises(TypeError):
        native.walk_modules([what])


def test_modules_that_keep_their_parts_otherwise(native_impl: str) -> None:
    module = torch.nn.ReLU()
    module.__dict__["_modules"] = [module]
    with pytest.raises(TypeError):
        native.walk_modules([module])


def test_a_module_that_contains_itself(native_impl: str) -> None:
    module = torch.nn.Sequential()
    module.add_module("self", module)
    with pytest.raises(RecursionError):
        native.walk_modules([module])
