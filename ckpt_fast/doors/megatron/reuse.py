# SPDX-License-Identifier: Apache-2.0
"""Saves whose tensors are proven to be those of the save before: only objects are collected again.

Building a sharded state dict costs Python for every tensor. What it says of tensors follows from the modules
and optimizers, and from the tensors registered with them. An inventory of those is far cheaper. While it is
the same, so are the shards: each is a view of a registered tensor, at an offset that is known.
"""

from __future__ import annotations

import hashlib
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ckpt_fast import native
from ckpt_fast.doors.megatron.common_state import common_bytes
from ckpt_fast.doors.megatron.sharded_state import shards_of
from ckpt_fast.format.types import ObjectShard, Shard, TensorShard
from ckpt_fast.pipeline.memory.forms import Described, describe
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.objects import object_bytes
from ckpt_fast.pipeline.save.program import Prepared, ProgramCache

# Gives the sharded and the common part of a state dict; whether ranks compare theirs.
Preprocess = Callable[[dict[str, Any], bool], tuple[dict[str, Any], dict[str, Any]]]


class Inventory(NamedTuple):
    """What decides which tensors a save holds.

    Attributes:
        owners: modules and optimizers.
        tensors: those registered with them.
        facts: everything else that matters about both, as bytes to compare.
    """

    owners: list[Any]
    tensors: list[torch.Tensor]
    facts: bytes


class Outline(NamedTuple):
    """A state dict without its tensors.

    Attributes:
        extra_states: the modules whose extra states make up each object, by the name of the object.
        padding: tensors whose content is of no account.
    """

    extra_states: dict[str, list[weakref.ref[torch.nn.Module]]]
    padding: list[torch.Tensor]


class Collector(Protocol):
    """What a run collects for one save. All local, unless said otherwise."""

    def everything(self) -> dict[str, Any]:
        """The sharded state dict."""

    def outline(self, state_dict: dict[str, Any]) -> Outline | None:
        """What there is besides tensors in ``everything``; None where those are not accounted for."""

    def objects(self) -> dict[str, Any]:
        """``everything`` without the model and without the tensors that ``inventory`` accounts for."""

    def inventory(self) -> Inventory | None:
        """What decides the tensors in ``everything``; None if only building it can tell."""


class _Known(NamedTuple):
    """The tensors of one save, by where they lie in its inventory. Keeps none of them alive.

    Attributes:
        structure: names the save program.
        distribution: that decided which ranks save what; None without one.
        owners, tensors: weak references to the inventory's.
        facts: the inventory's digest.
        holders: numbers of the tensors whose memory has to do with shards.
        described: the holders.
        source: int64 [shards]: the holder of each shard, by its place among them; then comes the padding.
        offset: int64 [shards]: distance of the two addresses in bytes.
        views: shape and stride of each shard.
        outline: of the state dict.
        names: of the objects.
    """

    structure: bytes
    distribution: Any
    owners: list[weakref.ref[Any]]
    tensors: list[weakref.ref[torch.Tensor]]
    facts: bytes
    holders: array[int]
    described: Described
    source: torch.Tensor
    offset: torch.Tensor
    views: list[tuple[torch.Size, tuple[int, ...]]]
    outline: Outline
    names: list[str]

    def holders_in(self, inventory: Inventory) -> list[torch.Tensor] | None:
        """The holders, if the inventory is that of the save; else None."""
        if self.facts != _digest(inventory.facts):
            return None
        are_same = native.refer_to
        if not (are_same(self.owners, inventory.owners) and are_same(self.tensors, inventory.tensors)):
            return None
        holders = list(map(inventory.tensors.__getitem__, self.holders))
        return holders if describe(holders).equals(self.described) else None


class KnownTensors:
    """The tensors of a strategy's last save, as long as they are there."""

    def __init__(self) -> None:
        self._known: _Known | None = None

    @without_collections
    def prepare(
        self,
        collector: Collector,
        preprocess: Preprocess,
        programs: ProgramCache,
        distribution: Any,
        snapshot: bool,
        bound: int | None,
    ) -> tuple[Prepared, dict[str, Any]] | None:
        """This save's shards and its common state; None if anything but values may have changed.

        Args:
            collector: of this save.
            preprocess: of its state dict.
            programs: of the saves before.
            distribution: that is in force now.
            snapshot: whether tensors may change while they are written.
            bound: bytes of host buffers that the save may take.
        """
        known = self._known
        program = programs.find(known.structure) if known is not None else None
        if known is None or program is None or known.distribution is not distribution:
            return None
        if not program.suits(snapshot, bound):
            return None
        inventory = collector.inventory()
        holders = known.holders_in(inventory) if inventory is not None else None
        if holders is None:
            self._known = None
            return None
        found, common = _collect_objects(collector, preprocess, known.outline)
        if found is None or found.keys() != set(known.names):
            return None
        payloads = [found[name] for name in known.names]
        if not program.holds(payloads):
            return None
        holders += known.outline.padding
        addresses = torch.cat([known.described.addresses, describe(known.outline.padding).addresses])

        def tensors() -> list[torch.Tensor]:
            places = zip(known.source.tolist(), known.offset.tolist(), known.views, strict=True)
            return [_view(holders[source], offset, view) for source, offset, view in places]

        return Prepared(program, addresses[known.source] + known.offset, payloads, tensors, holders), common

    @without_collections
    def learn(
        self,
        collector: Collector,
        preprocess: Preprocess,
        shards: Sequence[Shard],
        common: dict[str, Any],
        outline: Outline | None,
        structure: bytes | None,
        distribution: Any,
    ) -> None:
        """Take note of a save that was collected as a whole, if the next may be like it.

        Args:
            collector: of the save; nothing has changed since it collected everything.
            preprocess: of its state dict.
            shards, common: what came of it.
            outline: of the state dict that was collected.
            structure: of the shards; None if no program can describe them.
            distribution: that decided them.
        """
        self._known = None
        if structure is None or outline is None:
            return
        inventory = collector.inventory()
        if inventory is None:
            return
        objects = {shard.fqn: shard.payload for shard in shards if isinstance(shard, ObjectShard)}
        # The short way must give what the long one gave.
        found, same = _collect_objects(collector, preprocess, outline)
        if found != objects or common_bytes(same) != common_bytes(common):
            return
        tensors = [shard.tensor for shard in shards if isinstance(shard, TensorShard)]
        with torch._C.DisableTorchFunction():
            holders = _holders(inventory.tensors, tensors)
            holding = [inventory.tensors[number] for number in holders]
            described = describe(holding)
            if bool((described.forms < 0).any()):
                return
            places = _places(tensors, [*holding, *outline.padding])
            if places is None:
                return
            views = _shared([(tensor.shape, tensor.stride()) for tensor in tensors])
            self._known = _Known(
                structure,
                distribution,
                list(map(weakref.ref, inventory.owners)),
                list(map(weakref.ref, inventory.tensors)),
                _digest(inventory.facts),
                array("q", holders),
                described,
                torch.tensor([source for source, _ in places], dtype=torch.int64),
                torch.tensor([offset for _, offset in places], dtype=torch.int64),
                views,
                outline,
                list(objects),
            )


def _collect_objects(
    collector: Collector, preprocess: Preprocess, outline: Outline
) -> tuple[dict[str, bytes] | None, dict[str, Any]]:
    """The bytes of each object by name, None if there are tensors among them; and the common state."""
    sharded, common = preprocess(collector.objects(), False)
    found = {}
    for name, references in outline.extra_states.items():
        modules = [reference() for reference in references]
        states = [module.get_extra_state() for module in modules if module is not None]
        found[name] = object_bytes(states, name)
    for shard in shards_of(sharded):
        if isinstance(shard, TensorShard) or shard.fqn in found:
            return None, common
        found[shard.fqn] = shard.payload
    return found, common


def _digest(facts: bytes) -> bytes:
    return hashlib.blake2b(facts, digest_size=16).digest()


def _shared(values: list[Any]) -> list[Any]:
    """One object for equal values: most tensors have one of few shapes."""
    known: dict[Any, Any] = {}
    return [known.setdefault(value, value) for value in values]


def _holders(tensors: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]) -> list[int]:
    """Numbers of the tensors whose memory overlaps that of a shard."""
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted((shard.data_ptr(), shard.data_ptr() + _span(shard)) for shard in shards):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        elif end > start:
            starts.append(start)
            ends.append(end)
    holders = []
    for number, tensor in enumerate(tensors):
        start, nbytes = tensor.data_ptr(), _span(tensor)
        at = bisect_right(ends, start)
        if nbytes and at < len(starts) and starts[at] < start + nbytes:
            holders.append(number)
    return holders


def _places(shards: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> list[tuple[int, int]] | None:
    """For each shard a tensor whose memory holds it, and the distance; None if one has no such tensor."""
    extents = sorted((tensor.data_ptr(), -_span(tensor), number) for number, tensor in enumerate(sources))
    if not extents:
        return None if shards else []
    starts = [start for start, _, _ in extents]
    places = []
    for shard in shards:
        start, span = shard.data_ptr(), _span(shard)
        if not span:
            places.append((0, 0))  # never read
            continue
        at = bisect_right(starts, start) - 1
        # The longest of those that start here, else the nearest before.
        at = bisect_right(starts, starts[at] - 1) if at >= 0 else at
        if at < 0:
            return None
        begin, nbytes, number = extents[at]
        source = sources[number]
        if start + span > begin - nbytes or (source.dtype, source.device) != (shard.dtype, shard.device):
            return None
        places.append((number, start - begin))
    return places


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _view(source: torch.Tensor, offset: int, view: tuple[torch.Size, tuple[int, ...]]) -> torch.Tensor:
    shape, stride = view
    start = source.storage_offset() + offset // source.element_size()
    return source.detach().as_strided(shape, stride, start)
