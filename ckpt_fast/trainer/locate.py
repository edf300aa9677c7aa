# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint to load: the iteration a root, a tracker or the user names, and the format it is in.

What depends on the presence of files is decided by rank 0 for all ranks, unless a function says that it is
local.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, Literal

from ckpt_fast.doors.common_state import is_sealed
from ckpt_fast.errors import CheckpointNotFoundError, UnknownFormatError
from ckpt_fast.pipeline.commit import METADATA_FILE, SEAL_FILE
from ckpt_fast.trainer.paths import (
    TRACKER_PREFIX,
    checkpoint_exists,
    file_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    is_checkpoint_iteration_directory,
    is_file,
    is_hf_checkpoint_dir,
    join_paths,
    names_in,
)
from ckpt_fast.trainer.ranks import on_rank_0, print_rank_0
from ckpt_fast.trainer.trackers import read_metadata, read_train_state

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

_NOTHING_FOUND = -1


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
    # torch_dist first: its directories contain a .metadata as well.
    if is_sealed(checkpoint_path):
        print_rank_0(f"auto-detected the torch_dist checkpoint format in {checkpoint_path}")
        return "torch_dist"
    if file_exists(join_paths(checkpoint_path, ".metadata")):
        return "fsdp_dtensor"
    if is_hf_checkpoint_dir(checkpoint_path):
        print_rank_0(f"auto-detected a HuggingFace model in {checkpoint_path}")
        return "hf"
    raise UnknownFormatError(
        f"Unknown checkpoint format in {checkpoint_path}: it has neither metadata.json (torch_dist) nor "
        ".metadata (fsdp_dtensor) nor HuggingFace weights. An interrupted save leaves such a directory; "
        "load an older iteration."
    )


def _resolve_checkpoint_iteration(load_dir: str | None, ckpt_step_override: int | None) -> tuple[int, bool]:
    """Which iteration to load. Collective.

    A directory that is a checkpoint itself goes before ``ckpt_step_override``, which goes before the
    trackers (``latest_train_state.pt``, then that of Megatron-LM).

    Args:
        load_dir: a root of checkpoints, or one checkpoint, or None.
        ckpt_step_override: the iteration the user wants, or None for the newest.

    Returns:
        (iteration, release); iteration is _DIRECT_ITERATION_DIR_SENTINEL if ``load_dir`` is the checkpoint,
        and -1 if there is none.

    Raises:
        FileNotFoundError: there is no directory for ``ckpt_step_override``, or ``load_dir`` is a file.
        ValueError: ``ckpt_step_override`` without ``load_dir``.
    """
    source, value = on_rank_0(lambda: _resolve_source(load_dir, ckpt_step_override))
    if source == "train_state":
        return int(read_train_state(value).step), False
    if source == "megatron_lm":
        return read_metadata(value)
    return value, False


def _resolve_source(load_dir: str | None, step: int | None) -> tuple[str, Any]:
    """Where the iteration comes from: ("known", iteration), or the kind of tracker and its path."""
    if is_checkpoint_iteration_directory(load_dir):
        return "known", _DIRECT_ITERATION_DIR_SENTINEL
    if not load_dir:
        if step is not None:
            raise ValueError(
                f"ckpt_step={step} specified but checkpoint.load is {load_dir!r}. Please set checkpoint.load "
                "to the base checkpoint directory."
            )
        return "known", _NOTHING_FOUND
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
        return "known", step
    tracker = get_checkpoint_train_state_filename(load_dir, prefix=TRACKER_PREFIX)
    if file_exists(tracker):
        return "train_state", tracker
    tracker = get_checkpoint_tracker_filename(load_dir)
    if file_exists(tracker):
        return "megatron_lm", tracker
    return "known", _NOTHING_FOUND


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
        return _NOTHING_FOUND
    if non_persistent_ckpt_type == "global":
        tracker = get_checkpoint_train_state_filename(non_persistent_global_dir, prefix=TRACKER_PREFIX)
        if on_rank_0(lambda: file_exists(tracker)):
            return int(read_train_state(tracker).step)
        print_rank_0(f"WARNING: there is no non-persistent checkpoint in {non_persistent_global_dir}")
        return _NOTHING_FOUND
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
        return (ckpt_cfg.non_persistent_global_ckpt_dir,)
    roots = [root for root in (ckpt_cfg.save, load_dir) if isinstance(root, str) and root]
    return tuple(dict.fromkeys(join_paths(root, _NON_PERSISTENT_CKPT_SUBDIR) for root in roots))


def _has_global_non_persistent_checkpoint(load_dir: str | None, ckpt_cfg: CheckpointConfig) -> bool:
    """Whether there is a temporary checkpoint of type "global" to resume from. Collective."""
    if ckpt_cfg.non_persistent_ckpt_type != "global":
        return False
    roots = _get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg)
    return on_rank_0(lambda: any(checkpoint_exists(root) for root in roots))


def has_local_checkpoint(ckpt_cfg: CheckpointConfig, checkpointing_context: dict[str, Any] | None) -> bool:
    """Whether there is a temporary checkpoint of type "local" to resume from. Collective."""
    if ckpt_cfg.non_persistent_ckpt_type != "local":
        return False
    return _get_non_persistent_iteration("", "local", checkpointing_context) != _NOTHING_FOUND


def newest_global_non_persistent_checkpoint(
    load_dir: str | None, ckpt_cfg: CheckpointConfig
) -> tuple[str, int]:
    """(root, iteration) of the newest temporary checkpoint of type "global", or ("", -1). Collective.

    Of two equally new ones, that beside the directory saved to is taken.
    """
    newest = ("", _NOTHING_FOUND)
    for root in _get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg):
        iteration = _get_non_persistent_iteration(root, "global")
        if iteration > newest[1]:
            newest = (root, iteration)
    return newest


# --- When the newest is damaged ---------------------------------------------------------------------------


def older_checkpoints(load_dir: str | None, ckpt_cfg: CheckpointConfig) -> list[str]:
    """Checkpoints to fall back to when the one that is chosen is damaged, newest first. Collective.

    They are those of the run, persistent or for recovery, that are not newer than what their tracker names.
    None where the user named one certain checkpoint: by ``ckpt_step``, or as ``load_dir`` itself.
    """
    if ckpt_cfg.ckpt_step is not None:
        return []
    iteration, release = _resolve_checkpoint_iteration(load_dir, None)
    if release or iteration == _DIRECT_ITERATION_DIR_SENTINEL:
        return []
    newest = {} if load_dir is None else {load_dir: iteration}
    chosen = (load_dir, iteration)
    if ckpt_cfg.non_persistent_ckpt_type == "global":
        for root in _get_global_non_persistent_checkpoint_dirs(load_dir, ckpt_cfg):
            newest[root] = _get_non_persistent_iteration(root, "global")
        recovery = newest_global_non_persistent_checkpoint(load_dir, ckpt_cfg)
        if recovery[1] >= iteration:
            chosen = recovery
    seal = METADATA_FILE if ckpt_cfg.ckpt_format == "fsdp_dtensor" else SEAL_FILE
    return on_rank_0(lambda: _sealed(newest, chosen, seal))


def _sealed(newest: dict[str, int], chosen: tuple[str | None, int], seal: str) -> list[str]:
    """Complete checkpoints of several roots up to the iterations given, without the one ``chosen``."""
    found = []
    for root, last in newest.items():
        for name in names_in(root, "iter_*"):
            iteration = int(name[5:]) if re.fullmatch(r"iter_\d{7,}", name) else last + 1
            is_sealed_one = file_exists(join_paths(root, name, seal))
            if iteration <= last and (root, iteration) != chosen and is_sealed_one:
                found.append((iteration, join_paths(root, name)))
    return [path for _, path in sorted(found, reverse=True)]
