# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's fully parallel save, with a cached distribution that no rank can fall out of."""

from __future__ import annotations

from typing import Any

from ckpt_fast import megatron
from ckpt_fast.pipeline.group import ControlGroup


class FastParallelSaveWrapper(megatron.FullyParallelSaveStrategyWrapper):  # type: ignore[misc]
    """FullyParallelSaveStrategyWrapper whose ranks agree whether the cached distribution still holds.

    Megatron-Core's own takes it for granted with ``do_cache_distribution``: a tensor that came later is then
    saved by nobody. Here one small all-reduce at each save finds that the structure changed on some rank,
    and all ranks distribute anew.
    """

    cached_distribution: Any
    _structure: list[Any] | None = None

    def is_unchanged(self, sharded_state_dict: dict[str, Any]) -> bool:
        """Local. Whether the cached distribution fits this rank's part, which is remembered."""
        structure = [
            (entry.key, tuple(entry.global_offset), tuple(entry.local_shape), entry.replica_id)
            for entry in megatron.nested_values(sharded_state_dict)
            if isinstance(entry, megatron.ShardedTensor)
        ]
        before, self._structure = self._structure, structure
        return self.do_cache_distribution and self.cached_distribution is not None and structure == before

    def apply_saving_parallelization(self, sharded_state_dict: dict[str, Any]) -> None:
        """Collective, over all ranks. Choose the rank that saves each tensor: ``replica_id`` is 0 there."""
        if ControlGroup().all_true(self.is_unchanged(sharded_state_dict)):
            self.distribute_as_before(sharded_state_dict)
        else:
            self.distribute_anew(sharded_state_dict)

    def distribute_anew(self, sharded_state_dict: dict[str, Any]) -> None:
        """Collective. Choose the ranks whatever was chosen before."""
        self.cached_distribution = None
        super().apply_saving_parallelization(sharded_state_dict)

    def distribute_as_before(self, sharded_state_dict: dict[str, Any]) -> None:
        """Local. Choose the ranks as last time; all ranks have agreed that nothing has changed."""
        super().apply_saving_parallelization(sharded_state_dict)
