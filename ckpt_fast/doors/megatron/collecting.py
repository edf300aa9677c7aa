# SPDX-License-Identifier: Apache-2.0
"""What one rank brings to a save, collected when it is asked for and as far as it is needed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ckpt_fast import compat
from ckpt_fast.doors.megatron.parallel_save import FastParallelSaveWrapper, share_of
from ckpt_fast.doors.megatron.reuse import Collector, KnownTensors, Preprocess
from ckpt_fast.doors.megatron.sharded_state import shards_of
from ckpt_fast.format.types import Shard
from ckpt_fast.pipeline.save.parts import Divided, Share
from ckpt_fast.pipeline.save.program import Prepared, ProgramCache
from ckpt_fast.ranks.group import ControlGroup

logger = logging.getLogger(__name__)


class Collecting:
    """One rank's part of one save.

    Args:
        source: Megatron-Core's sharded state dict, or what collects it.
        strategy: FastSaveStrategy, or FullyParallelSaveStrategyWrapper around one.
        preprocess: gives the sharded and the common part of a state dict.
        known: the tensors of the strategy's last save; None: everything is collected.
        programs: of the strategy's saves.
    """

    def __init__(
        self,
        source: dict[str, Any] | Callable[[], dict[str, Any]] | Collector,
        strategy: Any,
        preprocess: Preprocess,
        known: KnownTensors | None,
        programs: ProgramCache,
    ) -> None:
        self._source = source
        self._collector = None if isinstance(source, dict) or callable(source) else source
        self._strategy = strategy
        self._is_wrapped = isinstance(strategy, compat.FullyParallelSaveStrategyWrapper)
        self._preprocess = preprocess
        self._known = known if self._collector is not None else None
        self._programs = programs
        self._whole: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._outline: Any = None
        self._shards: Sequence[Shard] | None = None

    def collect(self, group: ControlGroup) -> None:
        """Collective. Collect everything now, and let ranks compare it."""
        state_dict = group.agree(self._everything)
        self._whole = group.agree(lambda: self._preprocess(state_dict, True))

    def share(self, snapshot: bool, bound: int | None) -> tuple[Share, dict[str, Any]]:
        """Local. The share of this rank and its common state.

        Args:
            snapshot: whether tensors may change while they are written.
            bound: bytes of host buffers that the save may take.
        """
        if self._whole is None and self._known is not None and self._collector is not None:
            found = self._known.prepare(
                self._collector, self._preprocess, self._programs, self._distribution, snapshot, bound
            )
            if found is not None:
                prepared, common = found
                return Share(prepared, divide=self._divide), common
        sharded, common = self._collected()
        if not self._is_wrapped:
            self._shards = shards_of(sharded)
            return Share(self._shards), common
        share = share_of(self._strategy, sharded)
        assert not isinstance(share.shards, Prepared)
        self._shards = share.shards
        return replace(share, divide=functools.partial(self._divide, share)), common

    def learn(self, structure: bytes | None) -> None:
        """Local. Let the next save know what this one, which has been staged, was like.

        Args:
            structure: of the save program; None if there will be none.
        """
        if self._known is None or self._collector is None or self._shards is None or self._whole is None:
            return
        try:
            self._known.learn(
                self._collector,
                self._preprocess,
                self._shards,
                self._whole[1],
                self._outline,
                structure,
                self._distribution,
            )
        except Exception:  # this save has all it needs, and the other ranks count on it
            logger.warning("the next save collects everything again", exc_info=True)

    @property
    def _distribution(self) -> Any:
        """What decides which ranks save what; a new object where that has to be decided again."""
        if not self._is_wrapped:
            return None
        is_ours = isinstance(self._strategy, FastParallelSaveWrapper)
        return (self._strategy.distribution if is_ours else None) or object()

    def _everything(self) -> dict[str, Any]:
        source = self._source
        if isinstance(source, dict):
            return source
        if callable(source):
            return source()
        state_dict = source.everything()
        self._outline = source.outline(state_dict) if self._known is not None else None
        return state_dict

    def _collected(self) -> tuple[dict[str, Any], dict[str, Any]]:
        if self._whole is None:
            self._whole = self._preprocess(self._everything(), False)
        return self._whole

    def _divide(self, share: Share | None = None) -> Divided:
        """Collective. The tensors of some rank have changed: divide them anew.

        Args:
            share: of this rank; None if it has yet to collect its tensors, because only others' have changed.
        """
        # No rank may wait in the division for one that cannot collect.
        share = ControlGroup().agree(lambda: share or share_of(self._strategy, self._collected()[0]))
        assert share.divide is not None
        divided = share.divide()
        self._shards = divided.shards
        return divided
