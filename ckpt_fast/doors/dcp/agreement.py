# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a load have in common: they read one save, and leave out what none of them asks for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.pipeline.load.unasked import Unasked, find_unasked, warning_text

logger = logging.getLogger(__name__)


def require_same_save(directory: str, identity: str | None, of_ranks: Mapping[int, str]) -> None:
    """Coordinator. Check that all ranks see the same ``.metadata``.

    Args:
        directory: the checkpoint.
        identity: of the save that the coordinator sees; None: it cannot tell.
        of_ranks: rank to the identity of the save that it sees.

    Raises:
        CheckpointError: naming the ranks that see another one.
    """
    others = [str(rank) for rank, other in of_ranks.items() if other != identity]
    if others and identity is not None:
        raise CheckpointError(
            f"{_named(others)} another {METADATA_FILE} in {directory} than the rank that "
            "coordinates the load. All ranks must see the same files: the path must be on a file system "
            "that they share, and no save may be running into it. Load again."
        )


def report_unasked(
    directory: str, metadata: Metadata, asked: Collection[str], *, is_partial: bool
) -> Unasked:
    """Coordinator. Log whole sections of the checkpoint that no rank has asked for; returns what it was.

    Args:
        directory: the checkpoint.
        metadata: of it.
        asked: names that any rank asked for.
        is_partial: parts are left out on purpose: warn of none.
    """
    unasked = find_unasked(metadata, asked)
    logger.debug("%d of %d bytes in %s were not asked for", *unasked[:2], directory)
    if unasked.sections and not is_partial:
        remedy = (
            "Put them into the state dict (an optimizer has no moments before its first step; "
            "get_state_dict of torch makes them). If they are left out on purpose, load with "
            "FastLoadPlanner(allow_partial_load=True), or allow_partial_load=True."
        )
        logger.warning("%s", warning_text(directory, unasked.sections, remedy))
    return unasked


def _named(ranks: list[str]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} sees"
    shown = ", ".join(ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"the ranks {shown} see"
