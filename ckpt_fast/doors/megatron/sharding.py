# SPDX-License-Identifier: Apache-2.0
"""Whether all ranks together save every element exactly once: validated when it has changed.

Megatron-Core sends a description of every shard to every rank, and rank 0 checks them all, at every save.
The answer depends on the descriptions alone. While every rank's are those of the last save that passed, it is
known, and the ranks agree on that with one small all-reduce.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

from ckpt_fast import compat
from ckpt_fast.ranks.group import ControlGroup, PerGroup

# What a shard brings besides its description.
_DATA = {"data", "rows"}
# The rest, by class.
_attributes: dict[type, Callable[[Any], Any]] = {}


class ValidatedSharding:
    """The sharding of a strategy's saves that was found valid, for each process group."""

    def __init__(self) -> None:
        self._known = PerGroup[list[int]](list)

    def require_valid(self, sharded: dict[str, Any], common: dict[str, Any]) -> None:
        """Collective. Nothing, if the shards of all ranks fit together.

        Args:
            sharded: the sharded part of the state dict.
            common: the other part, as ranks compare it; a difference is logged by Megatron-Core.

        Raises:
            CheckpointingException: on rank 0.
        """
        group = ControlGroup()
        known = self._known.get(group, None)
        described = fingerprint(sharded)
        if group.all_true(described is not None and known == [described]):
            compat.validate_sharding_integrity([], common)
            return
        # If it fails on this rank alone, what the others remember must not be taken for valid with what was
        # valid here before.
        known.clear()
        everyone = compat.determine_global_metadata(sharded)[1]
        compat.validate_sharding_integrity(everyone, common)
        if described is not None:
            known.append(described)


def fingerprint(sharded: dict[str, Any]) -> int | None:
    """A number of 64 bits for the descriptions of all shards, in order; None if one cannot be told."""
    try:
        return hash(tuple(_description(entry) for entry in compat.nested_values(sharded)))
    except TypeError:  # a value without a hash, as ranges of flattened tensors are before Python 3.12
        return None


def _description(entry: Any) -> tuple[Any, ...]:
    kind = type(entry)
    get = _attributes.get(kind)
    if get is None:
        names = [field.name for field in dataclasses.fields(kind) if field.name not in _DATA]
        get = _attributes[kind] = operator.attrgetter(*names)
    return kind, get(entry)
