# SPDX-License-Identifier: Apache-2.0
"""The reading part of a load through the Megatron-Core door, and what it leaves lying."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from ckpt_fast import megatron
from ckpt_fast.pipeline import unasked
from ckpt_fast.pipeline.group import ControlGroup

logger = logging.getLogger(__name__)


def load_wanted(wanted: dict[str, Any], checkpoint_dir: str, strategy: Any) -> dict[str, Any]:
    """Collective. Load, and let rank 0 say which sections of the checkpoint no rank wanted."""
    group = ControlGroup()
    loaded: dict[str, Any] = group.agree(lambda: strategy.load(wanted, checkpoint_dir))
    mine = {section for key in _keys(wanted) for section in unasked.sections_of(key)}
    everyone = group.gather(mine)
    if group.is_coordinator:
        metadata = getattr(getattr(strategy, "base_strategy", strategy), "cached_global_metadata", None)
        _warn_of_unasked(checkpoint_dir, metadata, set().union(*everyone))
    return loaded


def _keys(wanted: dict[str, Any]) -> Iterator[str]:
    for entry in megatron.nested_values(wanted):
        yield entry.unique_key if isinstance(entry, megatron.ShardedObject) else entry.key


def _warn_of_unasked(checkpoint_dir: str, metadata: Any, asked: set[str]) -> None:
    """A load that wants nothing of an optimizer is one of weights, or of less, on purpose."""
    if metadata is None or not unasked.asks_for_optimizer(asked):
        return
    sections = unasked.sections_left(metadata, asked)
    if sections:
        remedy = "Check that model and optimizer are those that were saved."
        logger.warning("%s", unasked.warning_text(checkpoint_dir, sections, remedy))
