# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a state dict: flattened as torch DCP's default planners do, without their objects.

Everything here is read at every save and load, tensor by tensor, and so is kept to a few operations each.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._sharded_tensor_utils import _flatten_sharded_tensors
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.utils import find_tensor_shard
from torch.distributed.tensor import DTensor

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.consistency import Region
from ckpt_fast.pipeline.memory.forms import PLAIN_TENSORS, Described, describe
from ckpt_fast.pipeline.save.program import digest_of

_MOST_LAYOUTS = 1 << 16

_NEVER_STATEFUL = PLAIN_TENSORS | {dict, list, int, float, str}

# Where a shard lies in the whole tensor, and that one's shape; see LocalState.
Place = tuple[tuple[int, ...], tuple[int, ...]] | tuple[()] | None


class Parent(NamedTuple):
    """A dict or list of a nested state dict, and the keys that lead to it."""

    container: Any
    path: tuple[str | int, ...]


class Flattened:
    """The leaves of a nested state dict in columns, in torch DCP's order and by its names.

    Attributes:
        names: of the leaves: their keys, joined by dots.
        values: the leaves.
        parents, keys: what each leaf is in, and its key there.
        outline: what containers there are, and which leaves are in them.
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self.names: list[str] = []
        self.values: list[Any] = []
        self.parents: list[Parent] = []
        self.keys: list[Any] = []
        self.outline: list[Any] = []
        self._visit(Parent(state_dict, ()), *_columns_of(state_dict), "")

    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """torch DCP's mapping of names to keys, by which its tools nest a state dict again."""
        leaves = zip(self.names, self.parents, self.keys, strict=True)
        return {name: (*parent.path, _step(parent, key)) for name, parent, key in leaves}

    def require_unique(self) -> None:
        """Check that no two leaves have the same name.

        Raises:
            CheckpointMismatchError: two have.
        """
        if len(set(self.names)) < len(self.names):
            (name, _), *_ = Counter(self.names).most_common(1)
            raise CheckpointMismatchError(
                f"two values of the state dict are called {name}: nested keys are joined by dots. Rename one "
                "of them."
            )

    def _visit(self, parent: Parent, own_keys: Sequence[Any], own_values: Sequence[Any], prefix: str) -> None:
        names, values, parents, keys = self.names, self.values, self.parents, self.keys
        # Most of what there is, taken in a few steps for all of it.
        if set(map(type, own_keys)) <= {str} and set(map(type, own_values)) <= PLAIN_TENSORS:
            names.extend(map(prefix.__add__, own_keys) if prefix else own_keys)
            values.extend(own_values)
            parents.extend([parent] * len(own_keys))
            keys.extend(own_keys)
            return
        for key, value in zip(own_keys, own_values, strict=True):
            name = prefix + (key if type(key) is str else str(key))
            if type(value) not in PLAIN_TENSORS and not isinstance(value, torch.Tensor):
                if isinstance(value, Mapping):
                    self._enter(Parent(value, (*parent.path, _step(parent, key))), name)
                    continue
                if isinstance(value, list) and _is_divided(value):
                    self._enter(Parent(value, (*parent.path, _step(parent, key))), name)
                    continue
            names.append(name)
            values.append(value)
            parents.append(parent)
            keys.append(key)

    def _enter(self, parent: Parent, name: str) -> None:
        inner = parent.container
        is_list = isinstance(inner, list)
        self.outline.append((parent.path, is_list, len(self.names)))
        if is_list:
            self._visit(parent, range(len(inner)), inner, name + ".")
        else:
            self._visit(parent, *_columns_of(inner), name + ".")
        self.outline.append(len(self.names))


def _columns_of(container: Mapping[Any, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Keys and values, as ``items`` has them: a class of its own may define that alone."""
    if type(container) is dict:
        return list(container), list(container.values())
    items = list(container.items())
    return [key for key, _ in items], [value for _, value in items]


def _step(parent: Parent, key: Any) -> str | int:
    return key if isinstance(parent.container, list) else str(key)


def _is_divided(values: list[Any]) -> bool:
    """Whether the elements of a list are leaves of their own: torch DCP keeps other lists whole."""
    return any(
        isinstance(value, (torch.Tensor, Mapping)) or (isinstance(value, list) and _is_divided(value))
        for value in values
    )


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A shallow copy, with the state dict of each ``Stateful`` object in its place."""
    if set(map(type, state_dict.values())) <= _NEVER_STATEFUL:
        return dict(state_dict)
    return {key: value.state_dict() if is_stateful(value) else value for key, value in state_dict.items()}


def is_stateful(value: Any) -> bool:
    """Whether torch DCP asks the value for its state dict."""
    # Checking for a protocol takes longer than all else that is done about a tensor.
    if type(value) in _NEVER_STATEFUL or isinstance(value, torch.Tensor):
        return False
    return isinstance(value, Stateful)


class LocalState:
    """The shards and objects that this rank could save, in columns of one entry each.

    Args:
        state_dict: nested; of tensors of any kind and objects.

    Attributes:
        names: of the whole tensors, and of the objects.
        values: this rank's memory, or the object.
        places: where it lies in the whole tensor, and that one's shape; None where it is the whole tensor,
            () for an object.

    Raises:
        CheckpointMismatchError: a tensor is not what its sharding says.
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._flat = flat = Flattened(state_dict)
        self.names: list[str] = flat.names
        self.values: list[Any] = flat.values
        self.places: list[Place] = [None] * len(flat.values)
        if set(map(type, flat.values)) <= PLAIN_TENSORS:
            return
        others = [number for number, value in enumerate(flat.values) if type(value) not in PLAIN_TENSORS]
        if any(isinstance(flat.values[number], torch.Tensor) for number in others):
            self._divide()
        else:
            for number in others:
                self.places[number] = ()

    @property
    def leaves(self) -> list[Any]:
        """What ``values`` were taken from: the tensors and objects of the state dict, whole."""
        return self._flat.values

    @cached_property
    def described(self) -> Described:
        """The memory of ``values``."""
        return describe(self.values)

    def _divide(self) -> None:
        """Put shards in the place of tensors that have some."""
        self.names, self.values, self.places = [], [], []
        with torch.no_grad():
            for name, value in zip(self._flat.names, self._flat.values, strict=True):
                if type(value) not in PLAIN_TENSORS and isinstance(value, torch.Tensor):
                    self._add_shards(name, value)
                    continue
                self.names.append(name)
                self.values.append(value)
                self.places.append(None if type(value) in PLAIN_TENSORS else ())

    def _add_shards(self, name: str, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.size())
        for region, local in shards_of_tensor(name, tensor):
            if local.shape != region.sizes:
                raise CheckpointMismatchError(
                    f"{name} is divided so that this rank has {region} of it, but its tensor has the shape "
                    f"{tuple(local.shape)}; what would be written could not be loaded"
                )
            # Where there are more ranks than rows, some have nothing.
            if 0 not in region.sizes or 0 in shape:
                self.names.append(name)
                self.values.append(local)
                self.places.append((region.offsets, shape))

    def paths(self) -> dict[str, tuple[str | int, ...]]:
        """See ``Flattened.paths``.

        Raises:
            CheckpointMismatchError: two values have the same name.
        """
        self._flat.require_unique()
        return self._flat.paths()

    def structure(self, options: tuple[Any, ...]) -> bytes | None:
        """A digest of everything but values and addresses; None if there is something that it cannot tell.

        Args:
            options: what else is to be the same.
        """
        described = self.described
        # Stored by torch itself, so no save program is made of them.
        others = [
            (number, id(self.values[number].dtype), tuple(self.values[number].shape))
            for number in (described.forms < 0).nonzero().flatten().tolist()
            if self.places[number] != ()
        ]
        rows = (self.names, self.places, described.keys(), others)
        try:
            return digest_of((options, self._flat.outline, rows))
        except ValueError:  # sizes that are more than plain integers
            return None


def shards_of_tensor(name: str, tensor: torch.Tensor) -> Sequence[tuple[Region, torch.Tensor]]:
    """This rank's shards of a tensor of any kind: their places, and the memory itself."""
    if type(tensor) in PLAIN_TENSORS:
        return [(Region((0,) * tensor.dim(), tuple(tensor.shape)), tensor)]
    if isinstance(tensor, DTensor) and type(tensor._local_tensor) is torch.Tensor:
        return [(region, tensor._local_tensor) for region in _layouts.regions(tensor)]
    if isinstance(tensor, ShardedTensor):
        flattened = _flatten_sharded_tensors({name: tensor}).get(name)
        if flattened is None:
            return []
        tensor = flattened
    return [
        (region, find_tensor_shard(tensor, MetadataIndex(name, torch.Size(region.offsets))))
        for region in regions_of(tensor)
    ]


def regions_of(value: object) -> Sequence[Region]:
    """The places of this rank's shards of a tensor, as torch's planners see them; none of another value."""
    if not isinstance(value, torch.Tensor):
        return []
    if type(value) in PLAIN_TENSORS:
        return [Region((0,) * value.dim(), tuple(value.shape))]
    if isinstance(value, DTensor) and type(value._local_tensor) is torch.Tensor:
        return _layouts.regions(value)
    return _regions(value)


class _Layouts:
    """The places of shards by mesh, shape and placements: to compute them takes longer than all else."""

    def __init__(self) -> None:
        self._all: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
        # Most tensors in a row are on the same mesh.
        self._latest: tuple[Callable[[], Any], dict[Any, list[Region]]] = (lambda: None, {})

    def regions(self, tensor: DTensor) -> list[Region]:
        """``regions_of`` a DTensor whose local tensor is a plain one."""
        mesh = tensor.device_mesh
        latest, known = self._latest
        if latest() is not mesh:
            # Meshes of the same ranks are equal, but a process that has joined again may be another rank.
            place = mesh.get_coordinate()
            known = self._all.setdefault(mesh, {}).setdefault(place and tuple(place), {})
            self._latest = weakref.ref(mesh), known
        layout = (tensor.shape, tensor.placements)
        regions = known.get(layout)
        if regions is None:
            if len(known) >= _MOST_LAYOUTS:
                known.clear()
            regions = known[layout] = _regions(tensor)
        return regions


_layouts = _Layouts()


def _regions(tensor: torch.Tensor) -> list[Region]:
    if isinstance(tensor, DTensor) and tensor.device_mesh.get_coordinate() is None:
        return []  # of ranks that this one is not among
    return [Region(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in _create_chunk_list(tensor)]
