# SPDX-License-Identifier: Apache-2.0
"""A state dict whose values change with every step, as in training, and whose structure changes now and then.

What chance decides is the same on all ranks, so all of them have the same structure.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from tests.models import identical
from tests.soak.faults import Stateful

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
_OBJECTS: tuple[Any, ...] = (
    None,
    7,
    -0.0,
    "text" * 9,
    (True, {3}),
    [1, 2.5],
    b"bytes" * 700,
    {"a": {"b": 1}},
)
_MOST_TENSORS, _FEWEST_TENSORS = 24, 4
_MOST_GROUPS = 4


@functools.cache
def mesh() -> DeviceMesh:
    """Return the mesh of all ranks; there is one for the life of the process."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


class Contents:
    """A state dict.

    Attributes:
        state: what to save.
    """

    def __init__(self, chance: Random) -> None:
        self._names = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._groups: list[dict[str, Any]] = [{"lr": 0.1, "names": ["w"], "moment": torch.zeros(5)}]
        self._part = Stateful({"seen": 0, "buffer": torch.zeros(33)})
        self.state: dict[str, Any] = {
            "model": self._tensors,
            "groups": self._groups,
            "part": self._part,
            "objects": {},
            f"own.{dist.get_rank()}": torch.zeros(100),
            "step": 0,
        }
        for _ in range(12):
            self._add(chance)

    def train(self, chance: Random) -> None:
        """Change all values in place."""
        seed = chance.randrange(1 << 40)
        generator = torch.Generator().manual_seed(seed)
        own = torch.Generator().manual_seed(seed + 1 + dist.get_rank())
        for tensor in self._tensors.values():
            _fill(tensor, own if isinstance(tensor, DTensor) else generator)
        for group in self._groups:
            group["lr"] = chance.random()
            _fill(group["moment"], generator)
        _fill(self._part.state["buffer"], generator)
        _fill(self.state[f"own.{dist.get_rank()}"], own)
        self.state["step"] = self._part.state["seen"] = seed

    def change(self, chance: Random) -> str:
        """Change the structure; return how."""
        change = chance.choice(
            (
                *(self._add, self._remove, self._replace, self._resize, self._convert),
                *(self._tie, self._turn, self._add_object, self._change_groups),
            )
        )
        change(chance)
        return change.__name__.strip("_")

    def _add(self, chance: Random) -> None:
        if len(self._tensors) < _MOST_TENSORS:
            self._names += 1
            self._tensors[f"w{self._names}"] = _new_tensor(chance)

    def _remove(self, chance: Random) -> None:
        if len(self._tensors) > _FEWEST_TENSORS:
            del self._tensors[chance.choice(sorted(self._tensors))]

    def _replace(self, chance: Random) -> None:
        name = chance.choice(sorted(self._tensors))
        self._tensors[name] = _copied(self._tensors[name])

    def _resize(self, chance: Random) -> None:
        self._tensors[chance.choice(sorted(self._tensors))] = _new_tensor(chance)

    def _convert(self, chance: Random) -> None:
        name, dtype = chance.choice(sorted(self._tensors)), chance.choice(_DTYPES)
        self._tensors[name] = self._tensors[name].to(dtype)

    def _tie(self, chance: Random) -> None:
        first, second = chance.sample(sorted(self._tensors), 2)
        self._tensors[first] = self._tensors[second]

    def _turn(self, chance: Random) -> None:
        plain = sorted(name for name, each in self._tensors.items() if not isinstance(each, DTensor))
        if plain:
            name = chance.choice(plain)
            tensor = self._tensors[name]
            self._tensors[name] = tensor.t() if tensor.dim() == 2 else tensor.clone()

    def _add_object(self, chance: Random) -> None:
        self.state["objects"][f"o{chance.randrange(6)}"] = copy.deepcopy(chance.choice(_OBJECTS))

    def _change_groups(self, chance: Random) -> None:
        if len(self._groups) < _MOST_GROUPS and chance.random() < 0.6:
            self._groups.append({"lr": 0.0, "names": [], "moment": torch.zeros(chance.randrange(1, 9000))})
        elif len(self._groups) > 1:
            self._groups.pop()


def _new_tensor(chance: Random) -> torch.Tensor:
    dtype, rows, columns = chance.choice(_DTYPES), chance.choice((1, 7, 100)), chance.choice((1, 33, 200))
    if chance.random() < 0.4:
        return DTensor.from_local(
            torch.zeros(rows, columns, dtype=dtype), mesh(), [Shard(0)], run_check=False
        )
    shape = chance.choice(((rows, columns), (rows,), (), (0, columns), (rows, 2, columns)))
    return torch.zeros(shape, dtype=dtype)


def _fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    local = _local(tensor)
    if local.dtype.is_floating_point:
        local.normal_(generator=generator)
    else:
        local.random_(generator=generator)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    return (
        DTensor.from_local(local, mesh(), [Shard(0)], run_check=False)
        if isinstance(tensor, DTensor)
        else local
    )


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return _like(tensor, _local(tensor).clone())


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    return _like(tensor, torch.full_like(_local(tensor), 1))


def copied(state: Any) -> Any:
    """Return a copy of a state dict; its tensors have memory of their own."""
    return _mapped(state, _copied, copy.deepcopy)


def blank(state: Any) -> Any:
    """Return a state dict of the same structure and other values, to load into."""
    return _mapped(state, _blank, lambda _: "to be loaded")


def equal(one: Any, other: Any) -> bool:
    """Return whether two state dicts are the same, bit for bit, on this rank."""
    first, second = (_mapped(each, _local, lambda value: value, dict) for each in (one, other))
    return identical(first, second)


def _mapped(
    value: Any,
    tensor: Callable[[torch.Tensor], Any],
    leaf: Callable[[Any], Any],
    part: Callable[[dict[str, Any]], Any] = Stateful,
) -> Any:
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, Stateful):
        return part(_mapped(value.state, tensor, leaf, part))
    if isinstance(value, dict):
        return {name: _mapped(each, tensor, leaf, part) for name, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, tensor, leaf, part) for each in value]
    return leaf(value)
