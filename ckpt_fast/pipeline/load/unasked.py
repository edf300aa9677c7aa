# SPDX-License-Identifier: Apache-2.0
"""The parts of a checkpoint that a load does not request.

A load requests items by name. Anything the program forgets to request (the moments of an optimizer that has
none yet, a part of the model under another name) raises no error, and training continues from other values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast.format.types import readable

# What optimizers keep for each parameter; the latter names mean that only below an optimizer.
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_MASTERS = {"fp32_param", "master_param", "param"}
_MOST_SHOWN = 8


class Section(NamedTuple):
    """A part of a checkpoint that has a name of its own: its items and their bytes."""

    name: str
    items: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.items} items, {readable(self.nbytes)})"


class Unasked(NamedTuple):
    """The items that no rank of a load requested.

    Attributes:
        nbytes: bytes of items, of ``total_nbytes`` in the checkpoint.
        names: of the tensors and objects.
        sections: those of which nothing was asked for, each only once: not also as a part of a larger one.
    """

    nbytes: int
    total_nbytes: int
    names: list[str]
    sections: list[Section]


def sections_of(fqn: str, path: object = None) -> list[str]:
    """The sections that a tensor or object belongs to, the largest first.

    Args:
        fqn: its name.
        path: its keys in the nested state dict, where torch DCP has noted them. Otherwise the name is cut at
            its dots; "/shard_" and what follows is Megatron-Core's numbering of objects.
    """
    if isinstance(path, tuple):
        keys = [str(key) for key in path]
        sections = [".".join(keys[:depth]) for depth in (1, 2) if depth < len(keys)]
    else:
        keys = fqn.split("/shard_", 1)[0].split(".")
        sections = keys[:1] if len(keys) > 1 else []
    kinds = _MOMENTS | _MASTERS if "optimizer" in keys else _MOMENTS
    return sections + [_kind_section(key) for key in keys if key in kinds][:1]


def asks_for_optimizer(sections: Collection[str]) -> bool:
    """Whether sections that are asked for have state that an optimizer keeps for each parameter."""
    return any(_kind_section(kind) in sections for kind in _MOMENTS | _MASTERS)


def _kind_section(kind: str) -> str:
    return f"all {kind} of the optimizer"


def sections_left(metadata: Metadata, asked: Collection[str]) -> list[Section]:
    """The sections of a checkpoint that are not among those asked for."""
    sizes, items = _nbytes_by_name(metadata), defaultdict(list)
    for fqn in metadata.state_dict_metadata:
        left = next((name for name in sections_of(fqn, _path(metadata, fqn)) if name not in asked), None)
        if left is not None:
            items[left].append(sizes.get(fqn, 0))
    return [Section(name, len(nbytes), sum(nbytes)) for name, nbytes in sorted(items.items())]


def find_unasked(metadata: Metadata, asked: Collection[str]) -> Unasked:
    """The items that a load of these names does not request."""
    sizes = _nbytes_by_name(metadata)
    names = [fqn for fqn in metadata.state_dict_metadata if fqn not in asked]
    sections = {section for fqn in asked for section in sections_of(fqn, _path(metadata, fqn))}
    nbytes = sum(sizes.get(fqn, 0) for fqn in names)
    return Unasked(nbytes, sum(sizes.values()), names, sections_left(metadata, sections))


def warning_text(directory: str, sections: Iterable[Section], remedy: str) -> str:
    """The warning that names the sections that no rank requested."""
    shown = [str(section) for section in sections]
    more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return (
        f"no rank asked for these parts of {directory}: {', '.join(shown[:_MOST_SHOWN])}{more}. What they "
        f"would have filled stays as it was. {remedy}"
    )


def _nbytes_by_name(metadata: Metadata) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for index, info in (metadata.storage_data or {}).items():
        sizes[index.fqn] += info.length
    return sizes


def _path(metadata: Metadata, fqn: str) -> object:
    paths = metadata.planner_data
    return paths.get(fqn) if isinstance(paths, dict) else None
