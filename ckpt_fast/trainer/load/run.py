# SPDX-License-Identifier: Apache-2.0
"""State shared by the steps of a load."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from ckpt_fast import compat


@dataclass(frozen=True)
class LoadRun:
    """The inputs of a load that its steps share: the objects to load into, and the options.

    Attributes:
        ckpt_cfg: which checkpoint, and how strictly; ``cfg.checkpoint``, or a copy that differs in what this
            load needs otherwise.
        cfg: the whole configuration; the documented loaders of a state dict alone may have none.
        context: kept by the caller between saves and loads.
        pg_collection: process groups; the model's own when None.
        state: GlobalState; this and what follows is None or empty where a state dict alone is loaded.
        model: unwrapped chunks.
        strict: model keys must match, except ``_extra_state``.
        skip_model_and_optimizer: leave them alone.
        module_name: namespace of the RNG state in a multi-module model.
    """

    ckpt_cfg: Any
    cfg: Any | None
    context: dict[str, Any] | None
    pg_collection: Any | None
    state: Any = None
    model: list[Any] = field(default_factory=list)
    optimizer: Any | None = None
    scheduler: Any | None = None
    strict: bool = True
    skip_model_and_optimizer: bool = False
    module_name: str | None = None

    @functools.cached_property
    def groups(self) -> Any:
        """The process groups."""
        return self.pg_collection or compat.get_pg_collection(self.model)
