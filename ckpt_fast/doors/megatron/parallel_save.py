# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's fully parallel save, with a cached distribution that no rank can fall out of."""

from __future__ import annotations

import hashlib
from typing import Any

from ckpt_fast import compat
from ckpt_fast.doors.megatron.sharded_state import shards_of
from ckpt_fast.errors import CheckpointMismatchError, also_raised_as
from ckpt_fast.pipeline.save.parts import Divided, Share
from ckpt_fast.ranks.group import ControlGroup


def share_of(strategy: Any, sharded: dict[str, Any]) -> Share:
    """Local. What this rank saves of a state dict that a wrapper divides: as last time, if that fits it.

    Args:
        strategy: any FullyParallelSaveStrategyWrapper.
        sharded: preprocessed.
    """
    entries = [each for each in compat.nested_values(sharded) if isinstance(each, compat.ShardedTensor)]
    as_given = [entry.replica_id for entry in entries]
    is_ours = isinstance(strategy, FastParallelSaveWrapper)
    is_divided = is_ours and strategy.is_unchanged(sharded)
    if is_divided:
        strategy.distribute_as_before(sharded)

    def divide() -> Divided:
        for entry, replica_id in zip(entries, as_given, strict=True):
            entry.replica_id = replica_id
        try:
            # Mistakes in the whole are found on rank 0 only.
            (strategy.distribute_anew if is_ours else strategy.apply_saving_parallelization)(sharded)
        except compat.CheckpointingException as error:
            raise CheckpointMismatchError(f"nothing was saved: {error}") from error
        return Divided(shards_of(sharded))

    # Before the ranks have divided it, nobody knows what this one will save.
    return Share(shards_of(sharded) if is_divided else (), division="" if is_divided else None, divide=divide)


class FastParallelSaveWrapper(compat.FullyParallelSaveStrategyWrapper):  # type: ignore[misc]
    """FullyParallelSaveStrategyWrapper whose ranks agree whether the cached distribution still holds.

    Megatron-Core's own takes it for granted with ``do_cache_distribution``: a tensor that came later is then
    saved by nobody. Here one small all-reduce at each save finds that the structure changed on some rank,
    and all ranks distribute anew.
    """

    cached_distribution: Any
    _structure: bytes | None = None
    _distribution: object = None  # a new one whenever the ranks distribute anew

    @property
    def distribution(self) -> object:
        """Identity of the distribution that is cached; None if there is none."""
        return self._distribution if self.do_cache_distribution else None

    def is_unchanged(self, sharded_state_dict: dict[str, Any]) -> bool:
        """Local. Whether the cached distribution matches this rank's state."""
        is_cached = self.do_cache_distribution and self._structure is not None
        return is_cached and self._structure == _structure_of(sharded_state_dict)

    def forget(self) -> None:
        """Local, on every rank. Let the next save distribute anew."""
        self.cached_distribution = self._structure = self._distribution = None

    @also_raised_as(compat.DistCheckpointingError)
    def apply_saving_parallelization(self, sharded_state_dict: dict[str, Any]) -> None:
        """Collective, over all ranks. Choose the rank that saves each tensor: ``replica_id`` is 0 there."""
        if ControlGroup().all_true(self.is_unchanged(sharded_state_dict)):
            self.distribute_as_before(sharded_state_dict)
        else:
            self.distribute_anew(sharded_state_dict)

    def distribute_anew(self, sharded_state_dict: dict[str, Any]) -> None:
        """Collective. Choose the ranks whatever was chosen before."""
        # Before replicas change their ids.
        structure = _structure_of(sharded_state_dict) if self.do_cache_distribution else None
        self.cached_distribution = self._structure = self._distribution = None
        super().apply_saving_parallelization(sharded_state_dict)
        # Only now: with a structure that was never distributed, no rank would save the tensor.
        self._structure, self._distribution = structure, object()

    def distribute_as_before(self, sharded_state_dict: dict[str, Any]) -> None:
        """Local. Choose the ranks as last time; all ranks have agreed that nothing has changed."""
        if self.cached_distribution is not None:  # as in a group of one
            super().apply_saving_parallelization(sharded_state_dict)


def _structure_of(sharded_state_dict: dict[str, Any]) -> bytes:
    """A digest of everything that decides the distribution."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in compat.nested_values(sharded_state_dict):
        if isinstance(entry, compat.ShardedTensor):
            place = (entry.key, tuple(entry.global_offset), tuple(entry.local_shape), entry.replica_id)
            digest.update(repr(place).encode())
    return digest.digest()
