# SPDX-License-Identifier: Apache-2.0
"""The steps of a load through the Megatron-Core door: what is wanted, is it there, read it, what is left."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

from ckpt_fast import compat
from ckpt_fast.doors.megatron.common_state import read_common_state
from ckpt_fast.doors.megatron.sharded_state import Path, entries_of, merge_in_place, mismatches
from ckpt_fast.glu.factory import in_place
from ckpt_fast.pipeline.load import unasked
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.ranks.group import ControlGroup

logger = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """The items that a sharded state dict requests.

    Attributes:
        sharded: what is to be read.
        factories: what joins some of it afterwards.
        state_dict: what needs no reading: the common state, and what the sharded state dict itself holds.
    """

    sharded: dict[str, Any]
    factories: Any
    state_dict: dict[str, Any]


def prepare(
    sharded_state_dict: dict[str, Any],
    checkpoint: OpenCheckpoint,
    common: dict[str, Any] | None,
    *,
    into_views: bool,
) -> Wanted:
    """Local. Take a sharded state dict apart.

    Args:
        checkpoint: to be loaded.
        common: its common state, if it has been read; it is merged into.
        into_views: gated layers may be read into views of them.
    """
    with checkpoint.named():
        state_dict = read_common_state(checkpoint) if common is None else common
    asked = in_place(sharded_state_dict) if into_views else sharded_state_dict
    wanted, nonpersistent, factories = compat.load_preprocess(merge_in_place(asked))
    compat.merge(state_dict, nonpersistent)
    return Wanted(compat.extract_sharded_base(wanted)[0], factories, state_dict)


def check_keys(
    wanted: dict[str, Any], checkpoint_dir: str, strategy: Any, strict: Any, validate_access_integrity: bool
) -> tuple[dict[str, Any], set[str], set[str]]:
    """Collective. The items to read, those missing from the checkpoint, and those that no rank requests.

    Raises:
        CheckpointError: on every rank: the ranks' requests do not fit together, or not what was saved.
    """
    validate = validate_access_integrity and dist.is_available() and dist.is_initialized()
    explicit = compat.StrictHandling.requires_explicit_ckpt_mismatch_check(strict)
    local = everyone = None
    if validate:
        local, everyone = compat.determine_global_metadata(wanted)
    elif compat.StrictHandling.requires_global_app_metadata(strict):
        local = [entry.without_data() for entry in compat.nested_values(wanted)]
        everyone = [local]

    def check() -> tuple[dict[str, Any], set[str], set[str]]:
        saved = strategy.load_sharded_metadata(checkpoint_dir) if explicit else None
        with mismatches(f"{checkpoint_dir} does not fit what is asked of it"):
            result: tuple[dict[str, Any], set[str], set[str]] = compat.validate_integrity_and_strict_load(
                wanted, strict, validate, local, everyone, saved
            )
            return result

    return ControlGroup().agree(check)


def divided(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[Collection[Path], Collection[Path]]:
    """Local. The paths in the sharded state dict of what ``check_keys`` has left out, and of the rest.

    Both are empty if it has left out nothing.
    """
    if found is wanted:
        return (), ()
    rest = dict(entries_of(found)).keys()
    return dict(entries_of(wanted)).keys() - rest, rest


def load_wanted(
    wanted: dict[str, Any], checkpoint_dir: str, strategy: Any, checkpoint: OpenCheckpoint
) -> dict[str, Any]:
    """Collective. Load, and let rank 0 say which sections of the checkpoint no rank wanted."""
    group = ControlGroup()
    loaded: dict[str, Any] = group.agree(lambda: strategy.load(wanted, checkpoint_dir))
    keys = set(_keys(wanted))
    everyone = group.gather({section for key in keys for section in unasked.sections_of(key)})
    if group.is_coordinator:
        _warn_of_unasked(checkpoint_dir, checkpoint.index, keys, set().union(*everyone))
    return loaded


def _keys(wanted: dict[str, Any]) -> Iterator[str]:
    for entry in compat.nested_values(wanted):
        yield entry.unique_key if isinstance(entry, compat.ShardedObject) else entry.key


def _warn_of_unasked(checkpoint_dir: str, index: CheckpointIndex, keys: set[str], asked: set[str]) -> None:
    """A load that wants nothing of an optimizer is one of weights, or of less, on purpose."""
    if not unasked.asks_for_optimizer(asked):
        return
    rest = (name for name in index.names if name not in keys)
    if all(asked.issuperset(unasked.sections_of(name)) for name in rest):
        return  # without the metadata, which takes longer to unpickle than all the rest
    sections = unasked.sections_left(index.metadata, asked)
    if sections:
        remedy = "Check that model and optimizer are those that were saved."
        logger.warning("%s", unasked.warning_text(checkpoint_dir, sections, remedy))
