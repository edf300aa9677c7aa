# SPDX-License-Identifier: Apache-2.0
"""The target of a save: kind, directory, iteration, and which checkpoints are kept there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ckpt_fast.retention.policies import KeepNewest, Policy, require_policies
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.places.locate import _NON_PERSISTENT_CKPT_SUBDIR
from ckpt_fast.trainer.places.paths import get_checkpoint_name


@dataclass(frozen=True)
class SaveTarget:
    """The target of a save. ``policies`` say which checkpoints retention keeps there; (): all."""

    ckpt_type: CheckpointType
    save_dir: str
    step: int
    policies: tuple[Policy, ...] = ()

    @property
    def checkpoint_name(self) -> str:
        return get_checkpoint_name(self.save_dir, self.step, release=False)

    @property
    def is_local(self) -> bool:
        return self.ckpt_type is CheckpointType.LOCAL

    def is_torch_dist(self, ckpt_cfg: Any) -> bool:
        return not self.is_local and bool(ckpt_cfg.ckpt_format == "torch_dist")


def choose_target(
    ckpt_cfg: Any, context: dict[str, Any] | None, step: int, non_persistent: bool
) -> SaveTarget:
    """The target of the next save.

    Args:
        ckpt_cfg: CheckpointConfig.
        context: holds the local checkpoint manager, for local checkpoints.
        step: iteration to save.
        non_persistent: save for recovery, as ``non_persistent_ckpt_type`` says.

    Raises:
        ValueError: that type is neither "local" nor "global", its manager is missing, no directory is named,
            or ``retention`` holds what is no policy.
    """
    if not non_persistent:
        if not ckpt_cfg.save:
            raise ValueError("checkpoint.save is not set: name the directory to save checkpoints to")
        return SaveTarget(CheckpointType.GLOBAL, os.fspath(ckpt_cfg.save), step, _policies(ckpt_cfg))
    kind = ckpt_cfg.non_persistent_ckpt_type
    if kind == "local":
        if not context or "local_checkpoint_manager" not in context:
            raise ValueError(
                "non_persistent_ckpt_type is 'local' but checkpointing_context has no "
                "'local_checkpoint_manager': pass what init_checkpointing_context(cfg.checkpoint) returns"
            )
        return SaveTarget(CheckpointType.LOCAL, context["local_checkpoint_manager"].local_ckpt_dir, step)
    if kind == "global":
        if not (ckpt_cfg.non_persistent_global_ckpt_dir or ckpt_cfg.save):
            raise ValueError(
                "neither checkpoint.non_persistent_global_ckpt_dir nor checkpoint.save is set: name the "
                "directory to save recovery checkpoints to"
            )
        save_dir = os.fspath(
            ckpt_cfg.non_persistent_global_ckpt_dir
            or os.path.join(ckpt_cfg.save, _NON_PERSISTENT_CKPT_SUBDIR)
        )
        keep = ckpt_cfg.most_recent_k
        count = 2 if keep is None or keep < 0 else max(1, keep)
        return SaveTarget(CheckpointType.GLOBAL, save_dir, step, (KeepNewest(count),))
    raise ValueError(f"Invalid non_persistent_ckpt_type: {kind!r}. Must be 'local' or 'global'.")


def _policies(ckpt_cfg: Any) -> tuple[Policy, ...]:
    """``most_recent_k``, and our own ``retention``, which Megatron Bridge's object may lack."""
    keep = ckpt_cfg.most_recent_k
    newest = () if keep is None or keep < 0 else (KeepNewest(keep),)
    return (*newest, *require_policies(getattr(ckpt_cfg, "retention", None)))
