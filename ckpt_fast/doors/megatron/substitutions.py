# SPDX-License-Identifier: Apache-2.0
"""What ``install`` changes in Megatron-Core, for programs that build strategies themselves."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_fast import compat
from ckpt_fast.doors.megatron.common_save import FastCommonSaveStrategy
from ckpt_fast.doors.megatron.load_strategy import FastLoadStrategy
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper
from ckpt_fast.doors.megatron.torch_dist import FastSaveStrategy
from ckpt_fast.doors.substitution import Constructed, Substitution

# What of the stock classes dist_checkpointing and the wrappers call.
_LOADING = ("load", "load_tensors_metadata", "load_sharded_metadata", "remove_sharded_tensors")


class _MadeAlready:
    """The common strategies that Megatron-Core has made, to take them where no strategy is named."""

    name = "megatron.core.dist_checkpointing.strategies.base.default_strategies"

    def check(self) -> None:
        """Nothing is called of a table."""

    def make(self) -> None:
        self._replace(compat.TorchCommonSaveStrategy, FastCommonSaveStrategy)

    def undo(self) -> None:
        self._replace(FastCommonSaveStrategy, compat.TorchCommonSaveStrategy)

    def _replace(self, old: type, new: type) -> None:
        for strategies in compat.default_strategies.values():
            for place, strategy in strategies.items():
                if type(strategy) is old:
                    strategies[place] = new(*place)


def substitutions() -> Sequence[Substitution]:
    """The changes, none of them made."""
    found: list[Substitution] = [
        Constructed(compat.TorchDistSaveShardedStrategy, FastSaveStrategy, ("save", "async_save")),
        Constructed(compat.TorchDistLoadShardedStrategy, FastLoadStrategy, _LOADING),
        Constructed(
            compat.FullyParallelSaveStrategyWrapper,
            FastParallelSaveWrapper,
            ("apply_saving_parallelization",),
        ),
    ]
    if compat.TorchCommonSaveStrategy is not None:
        common = Constructed(compat.TorchCommonSaveStrategy, FastCommonSaveStrategy, ("save_common",))
        # Undone in this order: the stock class is to make stock objects when the table gets them back.
        found += [common, _MadeAlready()]
    return found
