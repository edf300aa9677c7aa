# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint to load: the iteration a root, a tracker or the user names, and the format it is in.

What depends on the presence of files is decided by rank 0 for all ranks, unless a function says that it is
local.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Literal

from ckpt_fast.doors.megatron.common_state import is_sealed
from ckpt_fast.errors import CheckpointNotFoundError, DamagedFileError, UnknownFormatError
from ckpt_fast.ranks.world import note_rank_0, on_rank_0, warn_rank_0
from ckpt_fast.retention.line import Noted, without_superseded
from ckpt_fast.trainer.places.catalog import (
    NOTHING,
    ORDER,
    Found,
    Published,
    Tier,
    list_checkpoints,
    noted_by,
    published,
    put_back,
)
from ckpt_fast.trainer.places.paths import (
    TRACKER_PREFIX,
    checkpoint_exists,
    file_exists,
    get_checkpoint_name,
    is_checkpoint_iteration_directory,
    is_file,
    is_hf_checkpoint_dir,
    iteration_of,
    join_paths,
)
from ckpt_fast.trainer.places.trackers import read_metadata

if TYPE_CHECKING:
    from ckpt_fast.config import CheckpointConfig

__all__ = [
    "TRACKER_PREFIX",
    "find_checkpoint_rank_0",
    "newest_global_non_persistent_checkpoint",
    "read_metadata",
]

logger = logging.getLogger(__name__)

_NON_PERSISTENT_CKPT_SUBDIR = "non_persistent"

# Returned instead of an iteration: the directory asked for is a checkpoint itself, not a root.
_DIRECT_ITERATION_DIR_SENTINEL = -2


def find_checkpoint_rank_0(checkpoints_path: str, iteration: int, release: bool = False) -> str | None:
    """The directory of an iteration if a complete torch_dist checkpoint is there, else None. Local."""
    directory = get_checkpoint_name(checkpoints_path, iteration, release)
    return directory if is_sealed(directory) else None


def _get_checkpoint_format(checkpoint_path: str) -> str:
    """The format of one checkpoint: "torch_dist", "fsdp_dtensor" or "hf". Local.

    Raises:
        NotImplementedError: it is none of these, or not complete.
        CheckpointCorruptError: its ``metadata.json`` cannot be understood.
    """
    return format_of(checkpoint_path, is_sealed(checkpoint_path))


def format_of(checkpoint_path: str, has_seal: bool) -> str:
    """``_get_checkpoint_format`` of a directory, where it is known whether it has a ``metadata.json``."""
    # torch_dist first: its directories contain a .metadata as well.
    if has_seal:
        note_rank_0(f"auto-detected the torch_dist checkpoint format in {checkpoint_path}")
        return "torch_dist"
    if file_exists(join_paths(checkpoint_path, ".metadata")):
        return "fsdp_dtensor"
    if is_hf_checkpoint_dir(checkpoint_path):
        note_rank_0(f"auto-detected a HuggingFace model in {checkpoint_path}")
        return "hf"
    raise UnknownFormatError(
        f"Unknown checkpoint format in {checkpoint_path}: it has neither metadata.json (torch_dist) nor "
        ".metadata (fsdp_dtensor) nor HuggingFace weights. An interrupted save leaves such a directory; "
        "load an older iteration."
    )


def _resolve_checkpoint_iteration(load_dir: str | None, ckpt_step_override: int | None) -> tuple[int, bool]:
    """Which iteration to load. Collective.

    A directory that is a checkpoint itself goes before ``ckpt_step_override``, which goes before the
    trackers (``latest_train_state.pt``, then that of Megatron-LM). Without a sound tracker it is the newest
    intact one, which is logged.

    Args:
        load_dir: a root of checkpoints, or one checkpoint, or None.
        ckpt_step_override: the iteration the user wants, or None for the newest.

    Returns:
        (iteration, release); iteration is _DIRECT_ITERATION_DIR_SENTINEL if ``load_dir`` is the checkpoint,
        and -1 if there is none.

    Raises:
        FileNotFoundError: there is no directory for ``ckpt_step_override``, or ``load_dir`` is a file.
        ValueError: ``ckpt_step_override`` without ``load_dir``.
        DamagedFileError: the trackers are damaged, and no iteration is whole.
    """
    answer = on_rank_0(lambda: _resolve(load_dir, ckpt_step_override))
    for note in answer.notes:
        warn_rank_0(f"{note} The next save writes both trackers anew.")
    return answer.iteration, answer.is_release


def _resolve(load_dir: str | None, step: int | None) -> Published:
    put_back(load_dir)
    if is_checkpoint_iteration_directory(load_dir):
        return Published(_DIRECT_ITERATION_DIR_SENTINEL)
    if not load_dir:
        if step is not None:
            raise ValueError(
                f"ckpt_step={step} specified but checkpoint.load is {load_dir!r}. Please set checkpoint.load "
                "to the base checkpoint directory."
            )
        return Published()
    if is_file(load_dir):
        raise CheckpointNotFoundError(
            f"{load_dir} is a file: checkpoint.load must name a directory of checkpoints, or one checkpoint"
        )
    if step is not None:
        directory = get_checkpoint_name(load_dir, step, release=False)
        if not file_exists(directory):
            raise CheckpointNotFoundError(
                f"ckpt_step={step} specified but checkpoint directory does not exist: {directory}\n"
                f"To see which iterations there are: ls {join_paths(load_dir, 'iter_*')}"
            )
        return Published(step)
    return published(load_dir)


# --- Non-persistent checkpoints --------------------------------------------------------------------------


def _get_non_persistent_iteration(
    non_persistent_global_dir: str,
    non_persistent_ckpt_type: Literal["global", "local"] | None = None,
    checkpointing_context: dict[str, Any] | None = None,
) -> int:
    """The newest iteration among temporary checkpoints, or -1. Collective.

    Args:
        non_persistent_global_dir: their root, for type "global".
        non_persistent_ckpt_type: None has none.
        checkpointing_context: holds the local checkpoint manager, for type "local".

    Raises:
        ValueError: another type, or "local" without its manager.
    """
    if non_persistent_ckpt_type is None:
        return NOTHING
    if non_persistent_ckpt_type == "global":
        why = ""
        try:
            iteration, _ = _resolve_checkpoint_iteration(non_persistent_global_dir, None)
        except DamagedFileError as error:
            iteration, why = NOTHING, f": {error}"
        if iteration < 0:
            say = warn_rank_0 if why else note_rank_0
            say(f"there is no non-persistent checkpoint in {non_persistent_global_dir}{why}")
        return max(iteration, NOTHING)
    if non_persistent_ckpt_type == "local":
        if not checkpointing_context or "local_checkpoint_manager" not in checkpointing_context:
            raise ValueError(
                "non_persistent_ckpt_type='local' needs the context that init_checkpointing_context returns"
            )
        return int(checkpointing_context["local_checkpoint_manager"].find_latest())
    raise ValueError(
        f"Invalid non_persistent_ckpt_type: {non_persistent_ckpt_type!r}. Must be 'local' or 'global'."
    )


def _get_global_non_persistent_checkpoint_dirs(
    load_dir: str | None, ckpt_cfg: CheckpointConfig
) -> tuple[str, ...]:
    """Roots in which temporary checkpoints of type "global" may be: the configured one alone, or that of
    the directory saved to, then that of the directory loaded from."""
    if ckpt_cfg.non_persistent_global_ckpt_dir:
        return (os.fspath(ckpt_cfg.non_persistent_global_ckpt_dir),)
    roots = [root for root in (ckpt_cfg.save, load_dir) if isinstance(root, (str, os.PathLike)) and str(root)]
    return tuple(dict.fromkeys(join_paths(root, _NON_PERSISTENT_CKPT_SUBDIR) for root in roots))


def _has_global_non_persistent_checkpoint(load_dir: str | None, ckpt_cfg: CheckpointConfig) -> bool:
    """Whether there is a temporary checkpoint of type "global" to resume from. Collective."""
    if ckpt_cfg.non_persistent_ckpt_type != "global":
        return False
    roots = _get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg)
    return on_rank_0(lambda: any(holds_checkpoint(root) for root in roots))


def holds_checkpoint(path: str | None) -> bool:
    """Local. Whether there is something to resume from: a checkpoint, trackers, or a whole iteration."""
    if not path:
        return False
    put_back(path)
    return checkpoint_exists(path) or published(path).iteration != NOTHING


def has_local_checkpoint(ckpt_cfg: CheckpointConfig, checkpointing_context: dict[str, Any] | None) -> bool:
    """Whether there is a temporary checkpoint of type "local" to resume from. Collective."""
    if ckpt_cfg.non_persistent_ckpt_type != "local":
        return False
    return _get_non_persistent_iteration("", "local", checkpointing_context) != NOTHING


def newest_global_non_persistent_checkpoint(
    load_dir: str | None, ckpt_cfg: CheckpointConfig
) -> tuple[str, int]:
    """(root, iteration) of the newest temporary checkpoint of type "global", or ("", -1). Collective.

    Of two equally new ones, that beside the directory saved to is taken.
    """
    newest = ("", NOTHING)
    for root in _get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg):
        iteration = _get_non_persistent_iteration(root, "global")
        if iteration > newest[1]:
            newest = (root, iteration)
    return newest


# --- The one to load, and those to fall back to -----------------------------------------------------------


def choose_checkpoint(
    load_dir: str | None, ckpt_cfg: CheckpointConfig, step: int | None, context: dict[str, Any] | None
) -> Found | None:
    """The checkpoint to load; None if there is nothing. Collective.

    A directory that is a checkpoint itself is taken as it is. Otherwise an explicit ``step`` wins; without
    one, the newest of the persistent and the recovery checkpoints (on a tie the recovery one). What is of a
    branch that the run has left for another of them does not count, and is named in one warning.

    Raises:
        DamagedFileError: the trackers in ``load_dir`` are damaged, and nothing whole is anywhere.
        FileNotFoundError, ValueError: see ``_resolve_checkpoint_iteration``.
    """
    problem, persistent = None, None
    try:
        iteration, release = _resolve_checkpoint_iteration(load_dir=load_dir, ckpt_step_override=step)
    except DamagedFileError as error:
        problem, iteration, release = error, NOTHING, False
    if iteration == _DIRECT_ITERATION_DIR_SENTINEL:
        assert load_dir is not None
        return Found("persistent", "", iteration_of(load_dir), os.fspath(load_dir))
    if iteration != NOTHING:
        assert load_dir is not None
        path = get_checkpoint_name(load_dir, iteration, release)
        persistent = Found("persistent", os.fspath(load_dir), iteration, path, is_release=release)
    recovery = _to_recover_from(load_dir, ckpt_cfg, context) if step is None else []
    if not recovery:
        if problem is not None:
            raise problem
        return persistent
    if problem is not None:
        warn_rank_0(str(problem))
    candidates = [*recovery, persistent] if persistent is not None else recovery
    noted = noted_by(candidates, context) if len(candidates) > 1 else {}
    chosen = _newest(candidates, noted)
    _warn_of_passed_over(candidates, noted, chosen)
    return chosen


def _to_recover_from(
    load_dir: str | None, ckpt_cfg: CheckpointConfig, context: dict[str, Any] | None
) -> list[Found]:
    """The recovery checkpoints that can be resumed from, each the newest of its root, or local. Collective.

    One beside the directory saved to comes before one beside that loaded from.
    """
    if ckpt_cfg.non_persistent_ckpt_type == "global":
        roots = _get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg)
        newest = {root: _get_non_persistent_iteration(root, "global") for root in roots}
        return [
            Found("recovery", root, iteration, get_checkpoint_name(root, iteration))
            for root, iteration in newest.items()
            if iteration != NOTHING
        ]
    kind: Any = ckpt_cfg.non_persistent_ckpt_type
    iteration = _get_non_persistent_iteration("", kind, context)
    if iteration == NOTHING:
        return []
    manager = (context or {})["local_checkpoint_manager"]
    # That of nvidia-resiliency-ext loads its newest, and no other.
    iterations = manager.iterations() if hasattr(manager, "iterations") else [iteration]
    return [Found("local", "", each, "") for each in iterations]


def _newest(candidates: list[Found], noted: dict[Found, Noted]) -> Found:
    on_the_line = without_superseded(candidates, lambda each: _noted(each, noted))
    return max(on_the_line, key=lambda each: (each.iteration, ORDER[each.tier]))


def _noted(found: Found, noted: dict[Found, Noted]) -> Noted:
    return noted.get(found, Noted(found.iteration))


def _warn_of_passed_over(candidates: list[Found], noted: dict[Found, Noted], chosen: Found) -> None:
    """Say what was not chosen although it is newer, or to recover from."""
    facts = _noted(chosen, noted)
    left = [each for each in candidates if facts.supersedes(_noted(each, noted))]
    if left:
        remedies = {
            "persistent": "ckpt_step={0.iteration} loads it",
            "recovery": "load={0.path} loads it",
            "local": "the next local save deletes it",
        }
        listed = "; ".join(
            f"the {each.tier} one of iteration {each.iteration} ({remedies[each.tier].format(each)})"
            for each in left
        )
        warn_rank_0(
            f"the {chosen.tier} checkpoint of iteration {chosen.iteration} is loaded. Passed over, as of a "
            f"branch that the run has left: {listed}."
        )
    older = [each for each in candidates if each.tier != "persistent" and each not in left]
    if chosen.tier == "persistent" and older:
        newest = max(each.iteration for each in older)
        warn_rank_0(
            f"the recovery checkpoint of iteration {newest} is older than the persistent "
            f"one of {chosen.iteration}, which is loaded"
        )


def older_checkpoints(
    load_dir: str | None, ckpt_cfg: CheckpointConfig, chosen: Found, context: dict[str, Any] | None
) -> list[Found]:
    """Checkpoints to fall back to when ``chosen`` is damaged, of any tier, newest first. Collective.

    They are those of the run that were published and are sealed. Those that an abandoned branch has left are
    not among them, and are named in the log. None where the user named one certain
    checkpoint: by ``ckpt_step``, or as ``load_dir`` itself; nor for a release.
    """
    if ckpt_cfg.ckpt_step is not None or chosen.is_release or not (chosen.root or chosen.tier == "local"):
        return []
    roots: dict[str, Tier] = {}
    if ckpt_cfg.non_persistent_ckpt_type == "global":
        roots = dict.fromkeys(_get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg), "recovery")
    if load_dir:
        roots.setdefault(load_dir, "persistent")
    local = context if ckpt_cfg.non_persistent_ckpt_type == "local" else None
    found = list_checkpoints(roots, local, ckpt_cfg.ckpt_format)
    tried = (chosen.path, chosen.iteration)
    older = [each for each in found if each.is_published and (each.path, each.iteration) != tried]
    line = _noted(chosen, noted_by([chosen], context)).line
    if line is None:
        return older
    noted = noted_by(older, context)
    left = [each for each in older if line.has_left(chosen.iteration, each.iteration, noted[each].line)]
    if left:
        warn_rank_0(
            f"an abandoned branch has left {', '.join(map(str, left))}: not fallen back to. Set "
            "ckpt_step to load one of them."
        )
    return [each for each in older if each not in left]
