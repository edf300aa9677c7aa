# SPDX-License-Identifier: Apache-2.0
"""Deleting old checkpoints, without ever deleting the one to resume from.

Whatever is asked, these stay: the iterations that the trackers of the directory name, and checkpoints newer
than the last published save, which may still be in the making. A checkpoint loses its seal before anything
else of it, so a crash while deleting never leaves a half that passes for a whole.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckpt_fast.megatron import object_storage
from ckpt_fast.pipeline.commit import DATA_SUFFIX, METADATA_FILE, SEAL_FILE, SIDECAR_FILE, fsync_directory
from ckpt_fast.pipeline.decode import decode_object
from ckpt_fast.trainer.paths import (
    TRACKER_PREFIX,
    file_exists,
    get_checkpoint_tracker_filename,
    get_checkpoint_train_state_filename,
    join_paths,
    names_in,
    read_file,
)
from ckpt_fast.trainer.ranks import get_rank_safe, print_rank_0

logger = logging.getLogger(__name__)

# Deletions of overlapping saves run one after the other, so that none sees another's half-deleted state.
_CHECKPOINT_CLEANUP_LOCK = threading.Lock()

_PREFIX = "iter_"


@dataclass(frozen=True)
class _Checkpoint:
    iteration: int
    path: str


def cleanup_old_non_persistent_checkpoint(
    save_dir: str,
    leave_ckpt_num: int | None = 1,
    do_async: bool = False,
    *,
    max_iteration: int | None = None,
) -> None:
    """Delete all but the newest ``iter_*`` checkpoints directly in ``save_dir``. Rank 0 acts, others return.

    A deletion that fails is logged and costs disk space, not the save that asked for it.

    Args:
        save_dir: the directory of the checkpoints and their trackers.
        leave_ckpt_num: how many to keep; 0 deletes all that may be deleted, None or a negative number none.
            Checkpoints that were never finished (data files without ``.metadata``) do not count.
        do_async: delete in a background thread, which a normal exit of the process waits for.
        max_iteration: the last published iteration; newer checkpoints are neither counted nor deleted.
            None: the iteration that the trackers name, if any.
    """
    if get_rank_safe() != 0 or leave_ckpt_num is None or leave_ckpt_num < 0:
        return
    try:
        removed, kept = _choose(save_dir, leave_ckpt_num, max_iteration)
    except Exception:
        logger.exception("cannot tell which checkpoints in %s are old: none is deleted", save_dir)
        return
    if not removed and not kept:
        return
    print_rank_0(f"Checkpoints scheduled for removal: {_names(removed)}")
    print_rank_0(f"Checkpoints kept: {_names(kept)}")
    paths = [each.path for each in removed]
    if not do_async:
        _remove_checkpoints(paths)
    elif paths:
        threading.Thread(target=_remove_checkpoints, args=(paths,)).start()


def cleanup_old_dataloader_states(states_dir: str, checkpoint_roots: Sequence[str], newest: int) -> None:
    """Delete the data loader states whose checkpoints are gone. Rank 0 acts, others return.

    Those of iterations after ``newest`` stay, and the two newest of the others: they may belong to local
    checkpoints, which are in no shared directory.

    Args:
        states_dir: has a directory ``iter_*`` for each save.
        checkpoint_roots: where the checkpoints are.
        newest: the last published iteration.
    """
    if get_rank_safe() != 0:
        return
    try:
        old = [each for each in _list_checkpoints(states_dir) if each.iteration <= newest][:-2]
        needed = {each.iteration for root in checkpoint_roots for each in _list_checkpoints(root)}
    except Exception:
        logger.exception("cannot tell which data loader states in %s are old: none is deleted", states_dir)
        return
    _remove_checkpoints([each.path for each in old if each.iteration not in needed])


def _choose(
    save_dir: str, leave: int, max_iteration: int | None
) -> tuple[list[_Checkpoint], list[_Checkpoint]]:
    """(to delete, to keep), oldest first; checkpoints too new to be judged are in neither.

    Raises:
        Exception: the directory or a tracker in it cannot be read.
    """
    tracked = _tracked_iterations(save_dir)
    newest = max_iteration if max_iteration is not None else max(tracked, default=None)
    old = [each for each in _list_checkpoints(save_dir) if newest is None or each.iteration <= newest]
    finished = [each for each in old if not _is_unfinished(each.path)]
    kept = {each for each in old if each.iteration in tracked}
    kept.update(finished[max(0, len(finished) - leave) :])
    return [each for each in old if each not in kept], [each for each in old if each in kept]


def _names(checkpoints: list[_Checkpoint]) -> list[str]:
    return [os.path.basename(each.path) for each in checkpoints]


def _list_checkpoints(save_dir: str) -> list[_Checkpoint]:
    """The directories ``iter_<number>`` in ``save_dir``, oldest first; other names are not ours to delete."""
    storage = object_storage(save_dir)
    if storage:
        paths = [str(path) for path in storage.Path(save_dir).glob(f"{_PREFIX}*")]
    elif os.path.isdir(save_dir):
        with os.scandir(save_dir) as entries:
            # A link to a checkpoint elsewhere is somebody's own arrangement.
            paths = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    else:
        return []
    found = []
    for path in paths:
        name = os.path.basename(path.rstrip("/"))
        digits = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and digits.isascii() and digits.isdigit():
            found.append(_Checkpoint(int(digits), path))
    return sorted(found, key=lambda each: each.iteration)


def _tracked_iterations(save_dir: str) -> set[int]:
    """The iterations that a resuming run would load.

    Raises:
        Exception: a tracker exists and cannot be understood.
    """
    tracked = set()
    train_state = get_checkpoint_train_state_filename(save_dir, prefix=TRACKER_PREFIX)
    if file_exists(train_state):
        content = decode_object(read_file(train_state), train_state, verify=True)
        tracked.add(int(content["step"].item()))
    megatron_lm = get_checkpoint_tracker_filename(save_dir)
    if file_exists(megatron_lm):
        text = read_file(megatron_lm).decode().strip()
        if text != "release":
            tracked.add(int(text))
    return tracked


def _is_unfinished(path: str) -> bool:
    """Whether a save died here: there is data, and nothing that says what it is."""
    return not file_exists(join_paths(path, METADATA_FILE)) and bool(names_in(path, f"*{DATA_SUFFIX}"))


def _remove_checkpoints(paths: list[str]) -> None:
    with _CHECKPOINT_CLEANUP_LOCK:
        for path in paths:
            try:
                if file_exists(path):
                    _remove_checkpoint(path, object_storage(path))
            except Exception:
                logger.exception("cannot delete the old checkpoint %s", path)


def _remove_checkpoint(path: str, storage: Any) -> None:
    for seal in (SEAL_FILE, METADATA_FILE, SIDECAR_FILE):
        file = join_paths(path, seal)
        if not file_exists(file):
            continue
        if storage:
            storage.delete(file)
        else:
            os.unlink(file)
            fsync_directory(path)
    if storage:
        storage.delete(path, recursive=True)
    else:
        shutil.rmtree(path)
