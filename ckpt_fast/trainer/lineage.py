# SPDX-License-Identifier: Apache-2.0
"""The line of the run that a state belongs to: begun by a load, noted by each save."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.retention.line import LINE, Lineage, Origin, line_in

# In the state dict of a local checkpoint, which has no other place for it.
LINE_KEY = "ckpt_fast_line"
_ATTRIBUTE = "_ckpt_fast_lineage"


def lineage_of(state: Any) -> Lineage:
    """The line of a run; it begins with the first call if nothing was loaded.

    Args:
        state: GlobalState; Megatron Bridge's as well.
    """
    lineage = getattr(state, _ATTRIBUTE, None)
    if lineage is None:
        lineage = Lineage()
        setattr(state, _ATTRIBUTE, lineage)
    return lineage


def resume(state: Any, iteration: int, facts: tuple[str | None, Mapping[str, Any]] | None) -> None:
    """The run goes on from a checkpoint; with ``facts`` None it begins anew.

    Args:
        state: of the run.
        iteration: of the checkpoint.
        facts: ``facts_of`` it.
    """
    origin = None if facts is None else Origin(iteration, facts[0], line_in(facts[1]))
    setattr(state, _ATTRIBUTE, Lineage(origin))


def facts_of(
    checkpoint: OpenCheckpoint | None, state_dict: Mapping[str, Any]
) -> tuple[str | None, Mapping[str, Any]]:
    """Save id and notes of a checkpoint that has been loaded. Local.

    Args:
        checkpoint: still open; None for a local one.
        state_dict: of a local one.
    """
    if checkpoint is None:
        return None, {LINE: state_dict.get(LINE_KEY)}
    # What is not readable has not been loaded either: the load has said so, or did not need it.
    with contextlib.suppress(CheckpointError, OSError):
        manifest = checkpoint.manifest
        if manifest is not None:
            return manifest.save_id, manifest.notes
    return None, {}
