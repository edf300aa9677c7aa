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

    _structure: list[Any] | None = None

    def apply_saving_parallelization(self, sharded_state_dict: dict[str, Any]) -> None:
        """Collective, over all ranks. Choose the rank that saves each tensor: ``replica_id`` is 0 there."""
        if self.do_cache_distribution:
            structure = [
                (entry.key, tuple(entry.global_offset), tuple(entry.local_shape), entry.replica_id)
                for entry in megatron.nested_values(sharded_state_dict)
                if isinstance(entry, megatron.ShardedTensor)
            ]
            if not ControlGroup().all_true(structure == self._structure):
                self.cached_distribution = None
            self._structure = structure
        super().apply_saving_parallelization(sharded_state_dict)
