# SPDX-License-Identifier: Apache-2.0
"""The strategy for the common state, and the table of strategies, that Megatron-Core had before 0.19."""

from __future__ import annotations

import logging
from typing import Any

from ckpt_fast.optional import import_names

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"

(TorchCommonSaveStrategy,) = import_names(f"{_STRATEGIES}.common", "TorchCommonSaveStrategy")
_found: tuple[Any, ...] = import_names(f"{_STRATEGIES}.base", "default_strategies")
# By action, and by backend and version.
default_strategies: dict[str, dict[tuple[str, int], Any]] = _found[0] or {}

_DEPRECATED = "load_common is deprecated"


def accept_common_file() -> None:
    """Let Megatron-Core read ``common.pt`` without a warning, once and for all.

    From 0.19 on, each rank warns of it at each load. The file is there on purpose: earlier versions need it.
    """
    logging.getLogger(f"{_STRATEGIES}.common").addFilter(_is_no_complaint)


def _is_no_complaint(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_DEPRECATED)
