# SPDX-License-Identifier: Apache-2.0
"""State shared by the steps of a save."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ckpt_fast.run.config_checks import warn_of_unused
from ckpt_fast.trainer.places.paths import settle_directories
from ckpt_fast.trainer.save.loader_position import can_save_position

_DATALOADER_STATE_SUBDIR = "energon"


@dataclass(frozen=True)
class SaveRun:
    """The inputs of a save that its steps share: the objects being trained, and the options."""

    state: Any
    model: list[Any]
    optimizer: Any | None
    scheduler: Any | None
    iterator: Any | None
    context: dict[str, Any] | None
    pg_collection: Any
    module_name: str | None

    def __post_init__(self) -> None:
        settle_directories(self.cfg)
        warn_of_unused(self.ckpt_cfg)

    @property
    def cfg(self) -> Any:
        return self.state.cfg

    @property
    def ckpt_cfg(self) -> Any:
        return self.state.cfg.checkpoint

    @property
    def is_async(self) -> bool:
        return bool(self.ckpt_cfg.async_save)


def dataloader_path(run: SaveRun) -> str | None:
    """Root of the data loader's states; None or "" where none are saved."""
    path: str | None = getattr(run.cfg.dataset, "dataloader_save", None)
    if path is None and run.ckpt_cfg.save and can_save_position(run.iterator):
        return os.path.join(run.ckpt_cfg.save, _DATALOADER_STATE_SUBDIR)
    return path
