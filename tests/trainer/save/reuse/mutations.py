# SPDX-License-Identifier: Apache-2.0
"""What may happen to a run between two saves. Each is a function of the run and a random generator.

All ranks have generators of the same seed. ``ON_ONE_RANK`` are those that a rank may suffer alone.
"""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from ckpt_fast import compat
from tests.models import Run

Mutation = Callable[[Run, Random], None]
_AUXILIARY = "auxiliary"
_EXTRA_STATES: tuple[Any, ...] = (
    None,
    7,
    1 << 40,
    -0.0,
    "text" * 9,
    "long text" * 4000,
    b"bytes" * 700,
    {"a": [1, 2.5, None], "b": (True, {3})},
    collections.OrderedDict(x=1),
    torch.arange(6.0).view(2, 3),
    {"amax": torch.ones(300, dtype=torch.bfloat16), "names": ["n"] * 50},
)


def model_of(run: Run) -> Any:
    """Return the model inside its wrappers."""
    return compat.unwrap_model(run.model)[0]


def nothing(_: Run, __: Random) -> None:
    """Train only."""


def parameter_replaced(run: Run, chance: Random) -> None:
    module, name = chance.choice(_places(run))
    module._parameters[name] = _copy_of(module._parameters[name])


def memory_replaced(run: Run, chance: Random) -> None:
    module, name = chance.choice(_places(run))
    parameter = module._parameters[name]
    parameter.data = parameter.data.clone()


def data_swapped(run: Run, chance: Random) -> None:
    (one, first), (other, second) = _alike(run, chance)
    a, b = one._parameters[first], other._parameters[second]
    a.data, b.data = b.data, a.data


def parameters_swapped(run: Run, chance: Random) -> None:
    (one, first), (other, second) = _alike(run, chance)
    a, b = one._parameters[first], other._parameters[second]
    one._parameters[first], other._parameters[second] = b, a


def parameters_tied(run: Run, chance: Random) -> None:
    (one, first), (other, second) = _alike(run, chance)
    one._parameters[first] = other._parameters[second]


def parameters_untied(run: Run, _: Random) -> None:
    """Give parameters that are registered twice copies of their own."""
    seen: set[int] = set()
    for module, name in _places(run):
        parameter = module._parameters[name]
        if id(parameter) in seen:
            module._parameters[name] = _copy_of(parameter)
        seen.add(id(module._parameters[name]))


def layers_frozen(run: Run, chance: Random) -> None:
    for module, name in chance.sample(_places(run), 2):
        module._parameters[name].requires_grad_(False)


def module_replaced(run: Run, chance: Random) -> None:
    parent, name = chance.choice(
        [
            (parent, name)
            for parent in model_of(run).modules()
            for name in parent._modules
            if parent._modules[name]
        ]
    )
    module = copy.copy(parent._modules[name])
    for part in ("_parameters", "_buffers", "_modules"):
        setattr(module, part, dict(getattr(module, part)))
    if parent is not model_of(run):
        parent._modules[name] = module


def moments_swapped(run: Run, chance: Random) -> None:
    state = chance.choice(states_of(run))
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def states_swapped(run: Run, chance: Random) -> None:
    states = states_of(run)
    one = chance.choice(states)
    other = chance.choice([each for each in states if each["exp_avg"].shape == one["exp_avg"].shape])
    one["exp_avg"], other["exp_avg"] = other["exp_avg"], one["exp_avg"]


def state_tensor_replaced(run: Run, chance: Random) -> None:
    state = chance.choice(states_of(run))
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def state_recreated(run: Run, _: Random) -> None:
    for adam in adams(run):
        adam.load_state_dict(copy.deepcopy(adam.state_dict()))


def loaded(run: Run, _: Random) -> None:
    """Load what was saved last, or go on if that has other contents than the run."""
    run.checkpoint.load, step = run.checkpoint.save, run.state.train_state.step
    if run.checkpoint.load is None or not (run.checkpoint.save_optim and run.checkpoint.save_rng):
        return
    if not any(name.endswith(_AUXILIARY) for name, _ in _named(run)):
        run.load()
        run.state.train_state.step = step + 1


def buffer_changed(run: Run, chance: Random) -> None:
    """Add or remove a buffer, or change its length, dtype or place."""
    owner = model_of(run)
    buffer = owner._buffers.get(_AUXILIARY)
    kind = chance.randrange(4)
    if buffer is None:
        owner.register_buffer(_AUXILIARY, torch.arange(chance.randrange(1, 400), dtype=torch.float32))
    elif kind == 0:
        del owner._buffers[_AUXILIARY]
    elif kind == 1:
        buffer.resize_(chance.randrange(1, 900)).fill_(chance.random())
    elif kind == 2:
        owner._buffers[_AUXILIARY] = buffer.to(chance.choice([torch.float64, torch.float16, torch.int32]))
    else:
        buffer.set_(buffer.untyped_storage(), 0, (max(1, buffer.numel() // 2),), (1,))


def extra_state_changed(run: Run, chance: Random) -> None:
    modules = [module for module in model_of(run).decoder.modules() if _has_extra_state(module)]
    for module in chance.sample(modules, min(3, len(modules))):
        value = chance.choice(_EXTRA_STATES)
        module.get_extra_state = lambda value=value: value  # type: ignore[method-assign]
        module.set_extra_state = lambda _: None  # type: ignore[method-assign]


def sizes_changed(run: Run, chance: Random) -> None:
    """Let gated layers count as interleaved in other blocks."""
    for config in (model_of(run).config, run.state.cfg.model):
        if run.setup.glu != (None, None):
            config.moe_shared_expert_glu_interleave_size = chance.choice([2, 4])


def group_added(run: Run, _: Random) -> None:
    for adam in adams(run):
        if len(adam.param_groups) < 4:
            adam.add_param_group({**adam.param_groups[0], "params": []})


def group_options_changed(run: Run, chance: Random) -> None:
    group = chance.choice(chance.choice(adams(run)).param_groups)
    group["weight_decay"], group["note"] = chance.random(), [chance.random()]


def state_dict_hooked(run: Run, chance: Random) -> None:
    """Let the state dicts of an optimizer say something else from now on."""
    note = chance.random()

    def hook(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for number, group in enumerate(state_dict["param_groups"]):
            group["hooked"] = [note, number, len(group["params"]), len(state_dict["state"])]

    chance.choice(adams(run)).register_state_dict_post_hook(hook)


def saving_of_optimizer_switched(run: Run, _: Random) -> None:
    # Stock code keeps no optimizer's state with rows interleaved, and numbers parameters once and for all.
    if run.setup.distributed and run.setup.glu == (None, None):
        run.checkpoint.save_optim = not run.checkpoint.save_optim


def saving_of_rng_switched(run: Run, _: Random) -> None:
    run.checkpoint.save_rng = not run.checkpoint.save_rng


ON_ONE_RANK: tuple[Mutation, ...] = (
    parameter_replaced,
    memory_replaced,
    module_replaced,
    state_tensor_replaced,
    state_recreated,
    moments_swapped,
    data_swapped,
    extra_state_changed,
)
ON_ALL_RANKS: tuple[Mutation, ...] = (
    *ON_ONE_RANK,
    nothing,
    nothing,
    parameters_swapped,
    parameters_tied,
    parameters_untied,
    layers_frozen,
    states_swapped,
    loaded,
    buffer_changed,
    buffer_changed,
    sizes_changed,
    group_added,
    group_options_changed,
    state_dict_hooked,
    saving_of_optimizer_switched,
    saving_of_rng_switched,
)


def _named(run: Run) -> list[tuple[str, torch.Tensor]]:
    return [*model_of(run).named_parameters(), *model_of(run).named_buffers()]


def _places(run: Run) -> list[tuple[torch.nn.Module, str]]:
    """Return where parameters are registered."""
    return [
        (module, name)
        for module in model_of(run).modules()
        for name, p in module._parameters.items()
        if p is not None
    ]


def _alike(run: Run, chance: Random) -> list[tuple[torch.nn.Module, str]]:
    """Return two places of parameters of one shape."""
    shapes: dict[Any, list[tuple[torch.nn.Module, str]]] = {}
    for module, name in _places(run):
        shapes.setdefault((module._parameters[name].shape, module._parameters[name].dtype), []).append(
            (module, name)
        )
    return chance.sample(chance.choice([places for places in shapes.values() if len(places) > 1]), 2)


def _copy_of(parameter: Any) -> torch.nn.Parameter:
    copied = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    copied.__dict__.update(parameter.__dict__)
    return copied


def _has_extra_state(module: torch.nn.Module) -> bool:
    return type(module).get_extra_state is not torch.nn.Module.get_extra_state


def adams(run: Run) -> list[Any]:
    return [each.optimizer for each in getattr(run.optimizer, "chained_optimizers", [run.optimizer])]


def states_of(run: Run) -> list[dict[str, torch.Tensor]]:
    compat.give_adam_its_state(run.optimizer)
    return list(itertools.chain.from_iterable(adam.state.values() for adam in adams(run)))


def apply(run: Run, chance: Random) -> str:
    """Apply one or two, on all ranks or on one; return what was done."""
    done = []
    for _ in range(chance.choice([1, 1, 2])):
        alone = chance.random() < 0.4
        mutation = chance.choice(ON_ONE_RANK if alone else ON_ALL_RANKS)
        rank, seed = chance.randrange(dist.get_world_size()), chance.randrange(1 << 30)
        done.append(f"{mutation.__name__} on {rank if alone else 'all'}")
        if not alone or dist.get_rank() == rank:
            mutation(run, Random(seed))
    return ", ".join(done)
